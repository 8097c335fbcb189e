"""The cost of a layout, to choose between layouts."""

from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from .layout import Layout

# An attention FLOP takes as long as this many FLOPs of the linear layers. Measured on a CPU (float32, SDPA with a
# mask; benchmarks/fit_cost_model.py): 1.25 and 1.55 in two runs for a model of 30 M parameters, 1.82 for one of 166 M.
# Not measured on GPUs.
ATTENTION_SLOWDOWN = 1.7
# Of a masked attention's time, what a causal one without mask takes; measured with the above: 0.53 to 0.59.
CAUSAL_PART = 0.55
# A batch must save this part of its cost to be rearranged, so that what the model leaves out cannot turn a gain into a
# loss.
LEAST_GAIN = 0.03


@dataclass(frozen=True)
class CostModel:
    """
    Time of running R rows of T slots through a model's layers, in units of one token's linear layers:

        R * T * (1 + T / tau),       tau = linear FLOPs per token / (ATTENTION_SLOWDOWN * attention FLOPs per pair)

    A masked attention looks at all T slots of its row, whether it may see them or not. FlexAttention skips blocks that
    may not be seen, and FlashAttention is given no others; there, tokens alone are counted. The LM head is left out:
    it scores the same positions in every layout.

    Attributes:
        attention_per_pair (`float`): 1 / tau.
    """

    attention_per_pair: float

    def __call__(self, num_rows: int, row_length: int) -> float:
        return num_rows * row_length * (1 + self.attention_per_pair * row_length)

    def pays(self, layout: Layout, num_rows: int, num_columns: int, has_padding: bool) -> bool:
        """Whether a layout is expected to be faster than the padded batch `(N, L)`."""
        # without padding the padded batch runs causal attention without a mask, which skips half of the pairs
        masked_part = 1.0 if has_padding else CAUSAL_PART
        padded = num_rows * num_columns * (1 + masked_part * self.attention_per_pair * num_columns)
        return self(layout.num_rows, layout.row_length) < (1 - LEAST_GAIN) * padded

    @classmethod
    def of(cls, model: PreTrainedModel) -> "CostModel":
        """Read the shape of a model (unwrapped) off its weights and config."""
        config = model.config
        if config._attn_implementation == "flex_attention" or is_flash_attention_requested(config):
            return cls(0.0)

        def number(name: str) -> int | None:
            try:
                value = getattr(config, name, None)
            except RuntimeError:  # a config that has one value for each layer and refuses to name one
                return None
            return value if isinstance(value, int) and value > 0 else None

        heads = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
        not_layers = {id(p) for module in heads for p in module.parameters()}
        weights = experts = 0
        for name, parameter in model.named_parameters():
            if id(parameter) not in not_layers:
                count = getattr(parameter, "ds_numel", parameter.numel())  # the whole tensor under ZeRO-3
                weights, experts = (weights, experts + count) if ".experts." in name else (weights + count, experts)
        num_experts = number("num_local_experts") or number("num_experts") or number("n_routed_experts")
        active = number("num_experts_per_tok")
        weights += experts * active / num_experts if num_experts and active else experts
        hidden_size = number("hidden_size") or heads[0].embedding_dim
        num_heads, head_dim = number("num_attention_heads"), number("head_dim")
        width = num_heads * head_dim if num_heads and head_dim else hidden_size
        num_layers = number("num_hidden_layers") or 1
        return cls(ATTENTION_SLOWDOWN * 4 * num_layers * width / (2 * max(weights, 1)))
