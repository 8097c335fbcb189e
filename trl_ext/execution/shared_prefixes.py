"""
Prefix sharing for any causal language model of transformers. Needs torch and transformers alone: no TRL, no trainer.

Sequences of a batch that begin alike (a prompt with several completions) are computed once up to where they part.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .cost import CostModel
from .layout import Layout
from .logits import logit_transform
from .plan import Plan, SharingStatistics, choose_layout, positions_of, prepare_attention, query_dtype
from .self_check import can_check, closest_pair, compare, stop_if_different
from .support import base_model_of, inspect_model
from .transfer import on_host, to_device
from .varlen import Segments, can_use_segments

# arguments of a backbone that are rearranged, that may be present, and that make the call go through as it is
REARRANGED = {"input_ids", "attention_mask", "position_ids"}
LEFT_ALONE = {"return_dict", "output_hidden_states", "output_router_logits"}
# positions whose logits are in memory at a time
POSITIONS_AT_A_TIME = 2048


@contextlib.contextmanager
def shared_prefixes(model: PreTrainedModel, *, always: bool = False) -> Iterator["SharedPrefixes"]:
    """
    Inside the block, every call of `model` with `input_ids` computes the tokens that sequences share once.

    The call and its outputs stay those of the padded batch `(N, L)`: hidden states, logits (also with
    `logits_to_keep`) and gradients, in its own coordinates and up to rounding. Hidden states of padding are zero.
    Calls that cannot be rearranged run padded: with a cache, with `inputs_embeds`, or with `output_attentions`.

    Args:
        model ([`~transformers.PreTrainedModel`] or a PEFT model): causal language model, unwrapped.
        always (`bool`, *optional*, defaults to `False`): rearrange every batch. `False` rearranges those for which
            a cost model expects a gain, of architectures that are tested. `True` compares the first batch of others
            with a padded one.

    Yields:
        [`SharedPrefixes`], which counts what was saved.

    Raises:
        ValueError: the model cannot share prefixes, with the reason.

    Example:
    ```python
    from transformers import AutoModelForCausalLM
    from trl_ext import per_token_logps, shared_prefixes

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct")
    with shared_prefixes(model) as sharing:  # input_ids, attention_mask, completion_mask: (N, L)
        logps = per_token_logps(model, input_ids, attention_mask, completion_mask)
        (-logps.sum() / completion_mask.sum()).backward()
    print(sharing.statistics)
    ```
    """
    reason = reason_against(model, always=always, option="always=True")
    if reason is not None:
        raise ValueError(f"`model` must be able to share prefixes: {reason}.")
    sharing = SharedPrefixes(model, always=always)
    sharing.install()
    try:
        yield sharing
    finally:
        sharing.remove()


def reason_against(model: PreTrainedModel, *, always: bool, option: str) -> str | None:
    """
    Why a model cannot share prefixes; `None` if it can. Architectures that are not tested need `always`, which the
    caller's user sets by `option`.
    """
    support = inspect_model(model)
    if support.reason is None and not support.verified and not always:
        return f"{type(model).__name__} is not among the architectures tested; {option} uses it all the same"
    return support.reason


class SharedPrefixes:
    """
    Hooks on a model's backbone that rearrange its calls, see [`shared_prefixes`].

    Attributes:
        statistics ([`SharingStatistics`]): what was saved so far.
    """

    def __init__(self, model: PreTrainedModel, *, always: bool, self_check: bool = False):
        self.support = inspect_model(model)
        self.must_check = self_check or not self.support.verified
        self.model = base_model_of(model)
        self.cost = CostModel.of(self.model)
        self.always = always
        self.statistics = SharingStatistics()
        self._plan: Plan | None = None
        self._hooks: list[Any] = []

    def install(self) -> None:
        """Add the hooks."""
        backbone = self.model.base_model
        self._hooks = [
            backbone.register_forward_pre_hook(self.rearrange, with_kwargs=True),
            backbone.register_forward_hook(self.put_back),
        ]

    def remove(self) -> None:
        """Undo [`~SharedPrefixes.install`]."""
        while self._hooks:
            self._hooks.pop().remove()

    def rearrange(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments of the backbone in the layout; a forward pre-hook."""
        names = list(inspect.signature(type(backbone).forward).parameters)[1:]
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        plan = self._plan_of(kwargs)
        prepare_attention(self.support.backend, self.model.device, plan)
        if self.must_check:
            stop_if_different(self._self_check(backbone, kwargs, plan), self.model)
        self._plan = plan
        return (), kwargs if plan is None else self._in_layout(plan, kwargs)

    def put_back(self, _backbone: nn.Module, _args: tuple, output: Any) -> Any:
        """The outputs of the backbone where the padded batch has them; a forward hook."""
        plan, self._plan = self._plan, None
        if plan is None:
            return output
        index, batch_of = _in_batch(plan)
        if isinstance(output, tuple):
            return (batch_of(output[0]), *output[1:])
        output.last_hidden_state = batch_of(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(map(batch_of, output.hidden_states))
        if getattr(output, "router_logits", None) is not None:
            output.router_logits = tuple(logits.flatten(0, -2)[index.flatten()] for logits in output.router_logits)
        return output

    def _in_layout(self, plan: Plan, kwargs: dict[str, Any]) -> dict[str, Any]:
        masks = plan.attention_masks(self.support, query_dtype(self.model, plan.source.device))
        return plan.rearranged(kwargs, masks) | {"use_cache": False}

    def _self_check(self, backbone: nn.Module, kwargs: dict[str, Any], plan: Plan | None) -> str | None:
        """Compare hidden states of two sequences both ways, as [`PrefixSharing`] does; what differs, or `None`."""
        pair = None if plan is None else closest_pair(plan.layout.slots)
        rows = [0] if pair is None else pair
        if kwargs.get("input_ids") is not None:
            tensors = {name: kwargs[name] for name in REARRANGED if kwargs.get(name) is not None}
            kwargs = kwargs | {name: tensor.expand_as(kwargs["input_ids"])[rows] for name, tensor in tensors.items()}
        plan = None if pair is None else SharedPrefixes(self.model, always=True)._plan_of(kwargs)
        shares = plan is not None and plan.layout.shares
        if not can_check(self.model, shares):
            return None
        self.must_check = False
        kwargs = kwargs | {"use_cache": False}

        def padded() -> torch.Tensor:
            states = backbone.forward(**kwargs).last_hidden_state
            return states * (to_device(plan.layout.slots >= 0, states.device).unsqueeze(-1) if shares else 1)

        def shared() -> torch.Tensor:
            return _in_batch(plan)[1](backbone.forward(**self._in_layout(plan, kwargs)).last_hidden_state)

        slots = to_device(plan.layout.slots, plan.source.device).flatten() if shares else None
        return compare(self.model, padded, shared if shares else padded, slots=slots, outputs="hidden states")

    def _plan_of(self, kwargs: dict[str, Any]) -> Plan | None:
        given = {name for name, value in kwargs.items() if value is not None and value is not False}
        if "input_ids" not in given or given - REARRANGED - LEFT_ALONE or kwargs.get("return_dict") is False:
            return None
        input_ids, mask, position_ids = (kwargs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            return None
        position_ids = positions_of(self.support, mask, position_ids)
        stacked = [input_ids, torch.ones_like(input_ids) if mask is None else mask.long()]
        if position_ids is not None:
            stacked.append(position_ids.expand_as(input_ids))
        backend, device = self.support.backend, input_ids.device
        by_segment = can_use_segments(self.model, backend, device, query_dtype(self.model, device))
        layout = self._layout_of(*on_host(stacked), backend=backend, by_segment=by_segment, device=device)
        self.statistics.add(input_ids.numel(), layout)
        if layout is None:
            return None
        return Plan(
            layout=layout,
            source=to_device(layout.source, device),
            segments=Segments.of(layout, device) if by_segment else None,
            position_ids=position_ids,
        )

    def _layout_of(
        self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray | None = None, **where: Any
    ) -> Layout | None:
        if self.support.is_too_long(ids.shape[1]):
            return None
        predicted = np.zeros(mask.shape, dtype=bool)
        predicted[:, 1:] = (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
        try:
            return choose_layout(
                ids,
                mask,
                predicted,
                positions,
                keep_unscored=True,
                cost=self.cost,
                is_forced=lambda layout: self.always or (self.must_check and layout.shares),
                **where,
            )
        except ValueError:  # a mask with holes
            if self.always:
                raise
            return None


def _in_batch(plan: Plan) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Which slot has each token `(N, L)`, and what brings states `(R, T, H)` there, with zeros on padding."""
    slots = to_device(plan.layout.slots, plan.source.device)
    is_token, index = (slots >= 0).unsqueeze(-1), slots.clamp(min=0)
    return index, lambda states: states.flatten(0, 1)[index] * is_token


def per_token_logps(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_mask: torch.Tensor,
    *,
    position_ids: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """
    Log-probabilities of completion tokens, with gradients. Inside [`shared_prefixes`] each prompt is computed once.

    Only scored positions reach the LM head, 2,048 at a time, and their logits are computed again in the backward pass.

    Args:
        model ([`~transformers.PreTrainedModel`] or a PEFT model): causal language model, unwrapped.
        input_ids, attention_mask (`torch.Tensor` of shape `(N, L)`, int64): the padded batch.
        completion_mask (`torch.Tensor` of shape `(N, L)`): non-zero on the tokens to score. The first column predicts
            nothing and is not scored.
        position_ids (`torch.Tensor` of shape `(N, L)`, *optional*): the model's own, where left out.
        temperature (`float`, *optional*, defaults to 1.0): divides the logits.

    Returns:
        `torch.Tensor` of shape `(N, L - 1)`, float32, in nats: entry `t` is of token `t + 1`, 0 where nothing is
        scored.
    """
    base = base_model_of(model)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    hidden_states = base.base_model(**inputs, use_cache=False).last_hidden_state
    scored = completion_mask[:, 1:] != 0
    hidden_states, labels = hidden_states[:, :-1][scored], input_ids[:, 1:][scored]
    head = base.get_output_embeddings()
    scale, cap = logit_transform(base.config.get_text_config())

    def log_probs(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = head(states).float() * scale
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        logits = logits / temperature
        return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)

    parts = [
        checkpoint(log_probs, *part, use_reentrant=False)
        for part in zip(hidden_states.split(POSITIONS_AT_A_TIME), labels.split(POSITIONS_AT_A_TIME), strict=True)
    ]
    return hidden_states.new_zeros(scored.shape, dtype=torch.float32).masked_scatter(scored, torch.cat(parts))
