"""Memory and traffic of strategies, predicted from formulas: what `scaling.py` compares its counts with."""

from dataclasses import dataclass

GPU_MEMORY = 80e9


# Left for what the model leaves out.
HEADROOM = 8e9


STRATEGIES = ("ddp", "zero1", "zero2", "zero3")


NAMES = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3, FSDP2", "offload": "ZeRO-3, offloaded"}


@dataclass(frozen=True)
class Architecture:
    """A Llama: its sizes, with heads of 128."""

    name: str
    parameters: float
    hidden: int
    mlp: int
    heads: int
    key_value_heads: int
    layers: int
    vocabulary: int = 32000

    @property
    def lora(self) -> float:
        """Parameters of a LoRA of rank 16 on all linear layers."""
        hidden, key_value = self.hidden, 128 * self.key_value_heads
        return 16 * self.layers * (2 * 2 * hidden + 2 * (hidden + key_value) + 3 * (hidden + self.mlp))

    @property
    def recomputed(self) -> float:
        """Parameters that activation checkpointing runs again: of each layer all but its last matrix."""
        key_value = 128 * self.key_value_heads
        return self.layers * 2 * self.hidden * (self.hidden + key_value + self.mlp)

    @property
    def gathered(self) -> float:
        """Bytes of weights in use at a time where they are split: two layers or the embedding, bf16."""
        embedding = self.vocabulary * self.hidden
        return 2 * max(embedding, 2 * (self.parameters - 2 * embedding) / self.layers)

    def activations(self, tokens: int, row_length: int, *, checkpointing: bool, shared: bool) -> float:
        """Bytes that autograd keeps for a batch of `tokens` in rows of `row_length`, and the mask if it is shared."""
        layer = 24 * self.hidden + 8 * self.mlp + 4 * self.heads + 8
        kept = 2 * self.hidden * self.layers + layer if checkpointing else layer * self.layers
        return tokens * kept + (2 * row_length**2 if shared else 0)


ARCHITECTURES = (
    Architecture("7B", 6.74e9, 4096, 11008, 32, 32, 32),
    Architecture("70B", 68.98e9, 8192, 28672, 64, 8, 80),
)


# one prompt on each GPU: tokens of the prompt, tokens of each answer, answers
BATCHES = ((2048, 512, 2), (2048, 512, 6))


def states(strategy: str, parameters: float, trained: float, processes: int) -> float:
    """
    Bytes of weights, gradients and optimiser states on each process; frozen weights are bf16.

    Args:
        strategy (`str`): `"ddp"`, `"zero1"`, `"zero2"`, `"zero3"` (also FSDP2) or `"offload"`.
        parameters, trained (`float`): of the model, and those that are trained.
        processes (`int`): N.
    """
    kept, split = {"ddp": (16, 0), "zero1": (4, 12), "zero2": (2, 14), "zero3": (0, 16), "offload": (0, 0)}[strategy]
    frozen = parameters - trained
    return trained * (kept + split / processes) + frozen * frozen_bytes(strategy, processes)


def frozen_bytes(strategy: str, processes: int) -> float:
    """Bytes on each process for each parameter that is not trained, a reference model's for instance."""
    return {"zero3": 2 / processes, "offload": 0.0}.get(strategy, 2.0)


def communication(
    strategy: str,
    parameters: float,
    trained: float,
    *,
    bytes_each: int = 2,
    recomputed: float = 0,
    parts: int = 1,
    frozen_embedding: float = 0,
    keeps_weights: bool = False,
) -> float:
    """
    Volume in bytes for one forward and backward of one optimiser step.

    Args:
        strategy, parameters, trained: as in [`states`].
        bytes_each (`int`): of a weight or gradient on the wire.
        recomputed (`float`): parameters of what is run again for the backward.
        parts (`int`): in which `max_completions_per_forward` runs a batch.
        frozen_embedding (`float`): parameters of an input embedding that is not trained, which no backward needs.
        keeps_weights (`bool`): ZeRO-3 keeps what it gathered till the backward, as DeepSpeed does by default with
            models of less than `stage3_max_live_parameters`, 10^9.
    """
    if strategy in ("ddp", "zero1", "zero2"):
        return (2 if strategy == "ddp" else 3) * bytes_each * trained
    gathered = parameters if keeps_weights else parts * (2 * parameters - frozen_embedding + recomputed)
    return bytes_each * (gathered + trained)


BASE = {
    "model": "39M",
    "prompt": 96,
    "answer": 32,
    "k": 2,
    "lora": False,
    "way": "shared",
    "checkpointing": False,
    "max_completions_per_forward": None,
    "keeps_weights": True,
    "processes": 2,
}
