"""What a layout costs, to choose between layouts."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from .layout import Layout

# Measured on CPU (float32, SDPA): see benchmarks/fit_cost_model.py. An attention FLOP takes as long as this many FLOPs
# of the linear layers.
ATTENTION_SLOWDOWN = 3.0
# Tokens a rearranged batch must save before it is worth the bookkeeping.
REARRANGING_TOKENS = 8.0
# Of a masked attention's time, what a causal one without mask takes.
CAUSAL_PART = 0.5


@dataclass(frozen=True)
class CostModel:
    """
    Time of running R rows of T slots through a model's layers, in units of one token's linear layers:

        R * T * (1 + T / tau),       tau = linear FLOPs per token / (ATTENTION_SLOWDOWN * attention FLOPs per pair)

    A masked attention looks at all T slots of its row, whether it may see them or not. The LM head is left out: it
    scores the same positions in every layout.

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
        return self(layout.num_rows, layout.row_length) + REARRANGING_TOKENS < padded

    @classmethod
    def of(cls, model: PreTrainedModel) -> "CostModel":
        """Read the shape of a model (unwrapped) off its weights and config."""
        config = model.config
        embeddings = {
            id(p)
            for m in (model.get_input_embeddings(), model.get_output_embeddings())
            if m is not None
            for p in m.parameters()
        }
        weights = experts = 0
        for name, parameter in model.named_parameters():
            if id(parameter) in embeddings:
                continue
            count = getattr(parameter, "ds_numel", parameter.numel())  # the whole tensor under ZeRO-3
            if ".experts." in name:
                experts += count
            else:
                weights += count
        num_experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        if num_experts:
            weights += experts * config.num_experts_per_tok / num_experts
        num_heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        linear_flops = 2 * max(weights + experts * (not num_experts), 1)
        attention_flops = 4 * config.num_hidden_layers * num_heads * head_dim
        return cls(ATTENTION_SLOWDOWN * attention_flops / linear_flops)
