"""The model call: a canonical batch in, per-token log-probabilities in the batch's coordinates out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .._trl import ChunkedDivergenceFunction, FusedCausalLMOutput
from .install import add_layer
from .logits import logit_transform

IGNORE_INDEX = -100
# keys of a canonical batch that the model itself understands
MODEL_KEYS = ("input_ids", "attention_mask", "position_ids")
# what TRL's fused LM head returns for each token
PER_TOKEN_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def completion_labels(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Labels `(N, L)` for TRL's fused LM head: the token ids of the completions, `IGNORE_INDEX` elsewhere."""
    return inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX)


def score_completions(model: nn.Module, inputs: dict[str, torch.Tensor], **model_kwargs: Any):
    """
    Run the model over a canonical batch (see [`CandidateCollator`]).

    Args:
        model (`torch.nn.Module`):
            Model that went through TRL's `add_fused_lm_head`, wrapped or not.
        inputs (`dict[str, torch.Tensor]`):
            The batch.
        model_kwargs:
            Passed on, for example `output_router_logits`.

    Returns:
        TRL's `FusedCausalLMOutput`: `log_probs` and the other per-token fields, each `(N, L - 1)`, already shifted
        and zero outside the completions. No logits are built.
    """
    labels = completion_labels(inputs)
    model_kwargs.update({key: inputs[key] for key in MODEL_KEYS if key in inputs})
    outputs = model(**model_kwargs, labels=labels, fused_lm_head=True, use_cache=False)
    # prompt-learning PEFT prepends virtual tokens to the outputs; the real tokens are the last ones
    length = labels.size(1) - 1
    for name in ("log_probs", "entropy", "mean_logits", "is_top1"):
        if outputs.get(name) is not None:
            outputs[name] = outputs[name][:, -length:]
    return outputs


@dataclass
class KLOutput(FusedCausalLMOutput):
    """
    TRL's `FusedCausalLMOutput` with what [`add_kl_head`] adds. A class of its own, because DDP takes outputs apart and
    puts them together again by their fields.

    Args:
        hidden_states (`torch.Tensor` of shape `(M, H)`, *optional*):
            The backbone's hidden states at the marked positions.
        kl (`torch.Tensor` of shape `(M,)`, *optional*):
            KL(model || reference) in nats at the marked positions.
    """

    hidden_states: torch.Tensor | None = None
    kl: torch.Tensor | None = None


def add_kl_head(model: PreTrainedModel, reference_head: Callable[[], nn.Module] | None = None) -> None:
    """
    Teach a model with TRL's fused LM head to compare its next-token distributions with another model's.

    Two extra arguments of `forward` are understood afterwards:

    - `hidden_mask` `(N, L - 1)`, bool (shaped like `shift_labels` where these are given): the output carries
      `hidden_states` `(M, H)`, the backbone's hidden states at the M marked positions.
    - `reference_hidden` `(M, H)` with it: the output carries `kl` `(M,)`, float32, instead: KL(model || reference) in
      nats at those positions, over the whole vocabulary, with gradient to the model only. It is computed by TRL's
      chunked kernel inside the model's forward, where ZeRO-3 and DDP expect the LM head to be used; no logits are
      built.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model to patch, unwrapped.
        reference_head (`Callable`, *optional*):
            Returns the reference's LM head. `None` for the reference itself.
    """
    transform = logit_transform(model.config.get_text_config())

    def layer(module, call, *args, hidden_mask=None, reference_hidden=None, **kwargs):
        if hidden_mask is None:
            return call(*args, **kwargs)
        captured = {}

        def keep_hidden_states(_module, _args, output):
            captured["hidden_states"] = output.last_hidden_state

        hook = module.base_model.register_forward_hook(keep_hidden_states)
        try:
            outputs = call(*args, **kwargs)
        finally:
            hook.remove()
        hidden_states = captured["hidden_states"]
        if kwargs.get("shift_labels") is None:
            hidden_states = hidden_states[:, :-1][:, -hidden_mask.size(1) :]
        hidden_states = hidden_states[hidden_mask]
        outputs = KLOutput(**outputs)
        if reference_hidden is None:
            outputs.hidden_states = hidden_states
            return outputs
        head, frozen_head = module.get_output_embeddings(), reference_head()
        outputs.kl, _entropy = ChunkedDivergenceFunction.apply(
            hidden_states,
            _whole(head.weight),
            _whole(head.bias),
            reference_hidden,
            _whole(frozen_head.weight),
            _whole(frozen_head.bias),
            1.0,  # beta: KL(student || teacher)
            1.0,  # temperature
            *transform,
            *transform,  # the reference is the same architecture
        )
        return outputs

    add_layer(model, "kl_head", layer)


def _whole(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """The full tensor behind a parameter that FSDP2 shards; anything else as it is."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
