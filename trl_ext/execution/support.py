"""Which models can share prefixes, found out by inspecting them."""

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_flash_attention_utils import flash_attn_supports_top_left_mask
from transformers.utils.generic import is_flash_attention_requested

if TYPE_CHECKING:
    from peft import PeftConfig

# implementations that take a mask; those of FlashAttention take segments instead, see `varlen.py`
BACKENDS = ("sdpa", "eager", "flex_attention")


# `config.model_type`s whose shared and padded log-probabilities and gradients are compared by
# `tests/equivalence/test_architectures.py`.
VERIFIED = frozenset(
    (
        "apertus arcee codegen cohere cohere2 deepseek_v3 ernie4_5 exaone4 falcon gemma gemma2 gemma3_text glm glm4 "
        "glm4_moe gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite granitemoe helium hunyuan_v1_dense llama minimax_m2 "
        "ministral mistral mixtral nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3 qwen2 qwen2_moe qwen3 "
        "qwen3_moe seed_oss smollm3 stablelm starcoder2"
    ).split()
)


# those that number a row's tokens by its attention mask where no positions are given; all others use the columns
POSITIONS_FROM_MASK = frozenset(("opt",))


# adapters that treat every token alike, whatever else is in its row
WEIGHT_ADAPTERS = frozenset(
    (
        "ADALORA BOFT C3A DELORA FOURIERFT GRALORA HRA IA3 LN_TUNING LOHA LOKR LORA MISS OFT OSF RANDLORA ROAD SHIRA "
        "TRAINABLE_TOKENS VBLORA VERA WAVEFT"
    ).split()
)


@dataclass(frozen=True)
class Support:
    """
    How a model can share prefixes.

    Attributes:
        reason (`str`, *optional*):
            Why it cannot, and what to do about it; `None` if it can.
        backend (`str`):
            Attention implementation the masks or segments are made for.
        windows (`dict[str, int | None]`):
            Sliding window of each kind of attention layer, `None` for full attention, by the names of
            `config.layer_types`.
        max_columns (`int`, *optional*):
            Longest batch that may be shared, for rotary embeddings that change with the length of the batch.
        verified (`bool`):
            Whether the architecture is one of [`VERIFIED`].
        positions_are_tokens (`bool`):
            Whether a row of hidden states has one position for each token given, also where prefixes are not shared.
        positions_from_mask (`bool`):
            Whether the model, given no positions, counts the tokens of a row and not the columns.
        outputs_router_logits (`bool`):
            Whether the config asks for a balancing loss over all tokens.
    """

    reason: str | None = None
    backend: str = "sdpa"
    windows: dict[str, int | None] | None = None
    max_columns: int | None = None
    verified: bool = False
    positions_are_tokens: bool = True
    positions_from_mask: bool = False
    outputs_router_logits: bool = False

    def is_too_long(self, num_columns: int) -> bool:
        """Whether a batch has too many columns to be shared."""
        return self.max_columns is not None and num_columns > self.max_columns


def inspect_model(model: PreTrainedModel) -> Support:
    """
    Find out whether a model computes the same for a token whatever else is in its row, given positions and a mask.

    Args:
        model ([`~transformers.PreTrainedModel`]): causal language model, unwrapped, with or without PEFT adapters.
    """
    for adapter in getattr(model, "peft_config", {}).values():
        reason = adapter_reason(adapter)
        if reason is not None:
            return Support(reason, positions_are_tokens=False)
    model = base_model_of(model)
    config = model.config
    name = f"{type(model).__name__} (model_type {config.model_type!r})"
    if getattr(config, "is_encoder_decoder", False):
        return Support(f"{name} is an encoder-decoder", positions_are_tokens=False)
    if config.get_text_config() is not config:
        return Support(
            f"{name} also takes images or sound, which change positions and masks", positions_are_tokens=False
        )
    stateful = _stateful_layers(model)
    if stateful:
        return Support(f"{name} has layers that read a row from left to right whatever the mask says ({stateful})")
    backbone = model.base_model
    forward = inspect.unwrap(type(backbone).forward)
    if backbone is model:
        return Support(f"{name} has no backbone that can be called without its LM head", positions_are_tokens=False)
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return Support(f"{name} is split over several devices (`device_map`)", positions_are_tokens=False)
    if getattr(config, "use_bidirectional_attention", False):
        return Support(f"{name} lets tokens see what follows them (`use_bidirectional_attention`)")
    if "position_ids" not in inspect.signature(forward).parameters:
        return Support(f"{name} does not take `position_ids`")
    if getattr(config, "alibi", False):
        return Support(f"{name} derives positions from the attention mask (ALiBi)")
    verified = config.model_type in VERIFIED
    if not type(model)._supports_attention_backend and not verified:
        return Support(f"{name} does not go through transformers' attention interface, so masks may not reach it")
    backend = config._attn_implementation
    is_flash = is_flash_attention_requested(config)
    if is_flash and (not type(model)._supports_attention_backend or flash_attn_supports_top_left_mask()):
        return Support(
            f"{name} calls FlashAttention in a way that takes no segments; load it with attn_implementation='sdpa'"
        )
    if backend not in BACKENDS and not is_flash:
        return Support(
            f"attention implementation {backend!r} takes no mask; load the model with attn_implementation='sdpa', "
            "'flex_attention' or 'flash_attention_2'"
        )
    try:
        source = inspect.getsource(forward)
    except OSError:  # a class defined interactively
        return Support(f"the source of {type(backbone).__name__}.forward cannot be read")
    if "create_causal_mask" not in source and "create_sliding_window_causal_mask" not in source and not verified:
        return Support(f"{name} makes its attention mask in a way of its own")
    windows = _windows(config, source)
    if isinstance(windows, str):
        return Support(f"{name} {windows}")
    return Support(
        backend=backend,
        windows=windows,
        max_columns=length_dependent_positions(config),
        verified=verified,
        positions_from_mask=config.model_type in POSITIONS_FROM_MASK,
        outputs_router_logits=bool(getattr(config, "output_router_logits", False)),
    )


def base_model_of(model: nn.Module) -> nn.Module:
    """The model of transformers inside a PEFT model; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adapter_reason(adapter: "PeftConfig") -> str | None:
    """Why a model with this adapter cannot share prefixes; `None` for LoRA and its kin, which only change weights."""
    kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
    if adapter.is_prompt_learning:
        return f"{kind} adapters add tokens of their own to each row"
    if getattr(adapter, "alora_invocation_tokens", None):
        return "activated LoRA (`alora_invocation_tokens`) looks for its tokens once in each row"
    if kind not in WEIGHT_ADAPTERS:
        return f"{kind} adapters do more than change weights, or are not known here"
    return None


def _stateful_layers(model: PreTrainedModel) -> str:
    """The recurrent, convolutional or linear-attention parts, as found in the modules and the config."""
    found = {
        type(module).__name__
        for module in model.modules()
        if any(isinstance(child, nn.RNNBase | nn.Conv1d | nn.Conv2d) for child in module.children())
    }
    found |= {
        kind
        for kind in getattr(model.config, "layer_types", None) or ()
        if any(word in kind for word in ("linear", "mamba", "recurrent", "conv"))
    }
    if not found and getattr(model, "_is_stateful", False):
        found = {"it keeps a state from token to token"}
    return ", ".join(sorted(found))


def _windows(config, source: str) -> dict[str, int | None] | str:
    """Window of each kind of layer, or why it cannot be told."""
    window = getattr(config, "sliding_window", None)
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    if not kinds:
        return {"attention": window if "create_sliding_window_causal_mask" in source else None}
    unknown = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
    if unknown:
        return f"has layers of a kind whose mask is not known here ({', '.join(unknown)})"
    windows = {kind: window if kind == "sliding_attention" else None for kind in kinds}
    if len(set(windows.values())) > 1 and "attention_mask, dict)" not in source:
        return f"has layers of several kinds ({', '.join(kinds)}) and takes only one mask"
    return windows


def length_dependent_positions(config) -> int | None:
    """Longest sequence for which the rotary embedding does not depend on the batch; `None` if it never does."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_kind = [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, dict)]
    if not any(p.get("rope_type") in ("dynamic", "longrope") for p in by_kind):
        return None
    original = [p.get("original_max_position_embeddings") for p in by_kind]
    original.append(getattr(config, "original_max_position_embeddings", None))
    return min((length for length in original if length), default=config.max_position_embeddings)
