"""The model call in a layout of our own: rearranged on the way in, put back on the way out."""

import dataclasses
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from .cost import CostModel
from .forward import IGNORE_INDEX, MODEL_KEYS, PER_TOKEN_FIELDS
from .install import add_layer, remove_layer
from .plan import Plan, SharingStatistics, choose_layout, positions_of, prepare_attention, query_dtype
from .self_check import can_check, closest_pair, compare, stop_if_different
from .support import Support, base_model_of, inspect_model
from .transfer import on_host, to_device
from .varlen import Segments, can_use_segments

# what a batch may contain to be rearranged; images, caches or token types would have to be rearranged too
KNOWN_INPUTS = set(MODEL_KEYS)
SETTINGS = {
    "use_cache",
    "output_router_logits",
    "num_items_in_batch",
    "hidden_mask",
    "reference_hidden",
    "return_dict",
}


@dataclass(kw_only=True)
class _Plan(Plan):
    """A batch's layout (`None`: as it is) and the tensors that follow from it, made once for all models."""

    scored: torch.Tensor  # (N, L - 1), bool: positions of the output that are asked for
    scored_index: torch.Tensor  # (M,): the same as flat indices
    predictors: torch.Tensor  # (M,): where, among all computed positions, each scored token is predicted


class PrefixSharing:
    """
    Makes models with TRL's fused LM head compute every distinct token of a batch once.

    [`~PrefixSharing.install`] wraps the `forward` of a model. A call with `labels` and `fused_lm_head=True` then runs
    the backbone over a layout (see `layout.py`) instead of the padded batch, hands the LM head only the positions that
    are scored, and puts the per-token outputs back where the padded batch has them. Whoever calls sees the same
    numbers in the same places. Every other call goes through unchanged.

    One object serves all models of a trainer: a reference that gets the tensors the policy got uses the same plan and
    the same masks.

    With dropout the two ways draw different noise, and completions of a prompt share the noise in it.

    Args:
        mode (`str` or `bool`, *optional*, defaults to `"auto"`):
            `"auto"`: rearrange a batch when the cost model expects it to be faster; models that cannot share are left
            alone, with one warning that says why. `True`: always; what cannot is an error.
        self_check (`bool`, *optional*, defaults to `False`):
            Run two sequences of the first batch that shares anything both ways, with gradients, and stop if they
            disagree. With `mode=True`, architectures that are not in `support.VERIFIED` are checked in any case; with
            `"auto"` they are left alone.

    Attributes:
        statistics ([`SharingStatistics`]): what was saved so far.
        shares (`bool`): whether at least one of the models installed can share prefixes.
    """

    def __init__(self, mode: str | bool = "auto", self_check: bool = False):
        if mode not in ("auto", True):
            raise ValueError(f"prefix_sharing={mode!r} is not known here. Set it to 'auto' or True.")
        self.mode = mode
        self.self_check = self_check
        self.statistics = SharingStatistics()
        self.shares = False
        self._installed: list[tuple[weakref.ref, Callable]] = []
        self._said: set[str] = set()
        self._last: tuple | None = None

    def install(self, model: PreTrainedModel) -> None:
        """
        Wrap a model's `forward`. A model that cannot share prefixes still gets only the scored positions into its LM
        head, unless its rows hold more than its tokens.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                Model that went through TRL's `add_fused_lm_head`, unwrapped.

        Raises:
            ValueError: `mode` is True and the model cannot share prefixes.
        """
        support = inspect_model(model)
        if support.reason is None and not support.verified and self.mode == "auto":
            support = dataclasses.replace(
                support,
                reason=f"{type(model).__name__} is not among the architectures tested; prefix_sharing=True uses it all"
                " the same and compares the first batch with a padded one",
            )
        if support.reason is not None:
            self.cannot(support.reason)
            if not support.positions_are_tokens:
                return
        model = base_model_of(model)
        shares = support.reason is None
        must_check = shares and (self.self_check or not support.verified)
        state = _ModelState(support, CostModel.of(model), must_check)
        self.shares |= shares

        def layer(module, call, *args, fused_lm_head=False, labels=None, **kwargs):
            if not (fused_lm_head and labels is not None):
                passed_on = {"labels": labels} if labels is not None else {}
                passed_on |= {"fused_lm_head": True} if fused_lm_head else {}
                return call(*args, **passed_on, **kwargs)
            if args:
                names = list(inspect.signature(type(module).forward).parameters)[1:]
                kwargs.update(zip(names, args, strict=False))
            return self._forward(module, call, state, labels, kwargs)

        add_layer(model, "sharing", layer)
        self._installed.append((weakref.ref(model), layer))

    def remove(self) -> None:
        """Undo every [`~PrefixSharing.install`]."""
        for reference, layer in self._installed:
            if (model := reference()) is not None:
                remove_layer(model, "sharing", layer)
        self._installed.clear()
        self._last = None

    def cannot(self, reason: str) -> None:
        """Something cannot be rearranged: an error if it has to be, else said once, by the main process."""
        if self.mode is True:
            raise ValueError(cannot_be_honoured(reason))
        if reason not in self._said:
            self._said.add(reason)
            warn_not_shared(reason)

    def _forward(self, module, inner, state: "_ModelState", labels: torch.Tensor, kwargs: dict[str, Any]):
        if module.config._attn_implementation != state.support.backend and state.support.reason is None:
            state.support, state.cost = inspect_model(module), CostModel.of(module)
            if state.support.reason is not None:
                self.cannot(state.support.reason)
        given = {name for name, value in kwargs.items() if value is not None}
        unknown = given - KNOWN_INPUTS - SETTINGS
        plan = None
        if unknown or "input_ids" not in given:
            self.cannot(f"the model is called with {sorted(unknown)}, which cannot be rearranged")
        elif torch.compiler.is_compiling():
            self.cannot("the model is compiled as a whole (torch_compile), and layouts differ from batch to batch")
        else:
            if state.support.is_too_long(labels.size(1)):
                self.cannot(
                    "the model's rotary embedding depends on the length of the batch beyond "
                    f"{state.support.max_columns} tokens"
                )
            plan = self._plan(module, kwargs, labels, state)
        prepare_attention(state.support.backend, labels.device, plan)
        if state.must_check:
            stop_if_different(self._self_check(module, inner, state, plan, labels, kwargs), module)
        if plan is None:
            return inner(**kwargs, labels=labels, fused_lm_head=True)
        return _run(module, inner, state.support, plan, labels, kwargs)

    def _self_check(self, module, inner, state: "_ModelState", plan: _Plan | None, labels, kwargs) -> str | None:
        """
        Compare two sequences of a batch both ways; what differs, or `None`. Two keep the memory this takes small. A
        batch whose sequences share nothing has nothing to check, and the check waits for another.

        Under ZeRO-3 weights are collected by all processes together, so all check as soon as one can; the others run a
        sequence of theirs padded twice.
        """
        kwargs = {name: value for name, value in kwargs.items() if name not in ("hidden_mask", "reference_hidden")}
        pair = None if plan is None or plan.layout is None else closest_pair(plan.layout.slots)
        rows = [0] if pair is None else pair
        if kwargs.get("input_ids") is not None:
            size = len(kwargs["input_ids"])  # one row of positions may stand for all
            given = {name: kwargs[name] for name in KNOWN_INPUTS if kwargs.get(name) is not None}
            kwargs |= {name: value.expand(size, *value.shape[1:])[rows] for name, value in given.items()}
            labels = labels[rows]
        shares = False
        if pair is not None:
            tensors = [kwargs["input_ids"], labels, kwargs.get("attention_mask"), kwargs.get("position_ids")]
            plan = PrefixSharing(True)._make_plan(tensors, _PlanSettings.of(module, state, kwargs, labels), state)
            shares = plan is not None and plan.layout is not None and plan.layout.shares
        if not can_check(module, shares):
            return None
        state.must_check = False

        def padded():
            return inner(**kwargs, labels=labels, fused_lm_head=True).log_probs

        def shared():
            return _run(module, inner, state.support, plan, labels, kwargs).log_probs

        slots = to_device(plan.layout.slots, labels.device).flatten() if shares else None
        return compare(module, padded, shared if shares else padded, slots=slots, outputs="log-probabilities")

    def _plan(self, module, kwargs: dict[str, Any], labels: torch.Tensor, state: "_ModelState") -> _Plan | None:
        """The batch's plan, made anew only if the tensors are not those of the call before."""
        tensors = [kwargs["input_ids"], labels, kwargs.get("attention_mask"), kwargs.get("position_ids")]
        settings = _PlanSettings.of(module, state, kwargs, labels)
        if any(tensor is not None and tensor.is_inference() for tensor in tensors):  # these count no versions
            return self._make_plan(tensors, settings, state)
        versions = [None if tensor is None else tensor._version for tensor in tensors]
        if self._last is not None:
            references, last_versions, last_settings, plan = self._last
            same = all((ref and ref()) is tensor for ref, tensor in zip(references, tensors, strict=True))
            if same and last_versions == versions and last_settings == settings:
                return plan
        self._last = None  # frees the masks of the batch before
        plan = self._make_plan(tensors, settings, state)
        references = [None if tensor is None else weakref.ref(tensor) for tensor in tensors]
        self._last = (references, versions, settings, plan)
        return plan

    def _make_plan(self, tensors: list, settings: "_PlanSettings", state: "_ModelState") -> _Plan | None:
        input_ids, labels, mask, position_ids = tensors
        if (position_ids is not None and position_ids.dim() != 2) or (mask is not None and mask.dim() != 2):
            self.cannot("the batch brings positions or an attention mask of more than two dimensions")
            return None
        position_ids = positions_of(state.support, mask, position_ids)
        scored = labels != IGNORE_INDEX
        stacked = [input_ids, torch.ones_like(input_ids) if mask is None else mask, scored]
        if position_ids is not None:
            stacked.append(position_ids.expand_as(input_ids))
        ids, used, scored_on_host, *positions = on_host(stacked)
        scored_on_host = scored_on_host.astype(bool)
        if not scored_on_host[:, 1:].any():
            return None
        layout = None
        if settings.rearrange:
            try:
                layout = choose_layout(
                    ids,
                    used,
                    scored_on_host,
                    positions[0] if positions else None,
                    keep_unscored=settings.keep_unscored,
                    cost=state.cost,
                    backend=settings.backend,
                    by_segment=settings.by_segment,
                    device=input_ids.device,
                    is_forced=lambda layout: self.mode is True or (state.must_check and layout.shares),
                )
            except ValueError as error:
                self.cannot(str(error))
                return None
        self.statistics.add(input_ids.numel(), layout)
        device = input_ids.device
        slots = np.arange(input_ids.numel()).reshape(input_ids.shape) if layout is None else layout.slots
        return _Plan(
            layout=layout,
            scored=scored[:, 1:],
            scored_index=to_device(np.flatnonzero(scored_on_host[:, 1:]), device),
            predictors=to_device(slots[:, :-1][scored_on_host[:, 1:]], device),
            source=None if layout is None else to_device(layout.source, device),
            segments=Segments.of(layout, device) if layout is not None and settings.by_segment else None,
            position_ids=position_ids,
        )


def warn_not_shared(reason: str) -> None:
    """Say, by the main process alone, why prompts are not shared."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        warnings.warn(f"Prompts are not shared between their completions: {reason}.", stacklevel=3)


def cannot_be_honoured(reason: str) -> str:
    """Message for `prefix_sharing=True` where it is impossible."""
    return f"prefix_sharing=True cannot be honoured: {reason}. Set prefix_sharing='auto' or False to run padded."


@dataclass
class _ModelState:
    support: Support
    cost: CostModel
    must_check: bool


@dataclass(frozen=True)
class _PlanSettings:
    """What a plan depends on besides its batch."""

    rearrange: bool
    keep_unscored: bool
    by_segment: bool
    backend: str

    @classmethod
    def of(cls, module, state: _ModelState, kwargs: dict[str, Any], labels: torch.Tensor) -> "_PlanSettings":
        support, device = state.support, labels.device
        by_segment = can_use_segments(module, support.backend, device, query_dtype(module, device))
        return cls(
            rearrange=support.reason is None and not support.is_too_long(labels.size(1)),
            # the balancing loss of a mixture of experts is taken over all tokens
            keep_unscored=bool(kwargs.get("output_router_logits", support.outputs_router_logits)),
            by_segment=by_segment,
            backend=support.backend,
        )


def _run(module, inner, support: Support, plan: _Plan, labels: torch.Tensor, kwargs: dict[str, Any]):
    """The forward in the plan's layout; the outputs in the batch's own."""
    kwargs = dict(kwargs)
    scored = plan.scored
    shift_labels = labels[:, 1:].flatten()[plan.scored_index].unsqueeze(0)
    if kwargs.get("hidden_mask") is not None:
        kwargs["hidden_mask"] = kwargs["hidden_mask"].flatten()[plan.scored_index].unsqueeze(0)

    def rearrange(_module, args, backbone_kwargs):
        dtype = query_dtype(module, labels.device)
        makes_masks = getattr(backbone.forward, "makes_masks", False)
        if makes_masks and support.backend == "sdpa" and module.is_activation_checkpointing:
            dtype = torch.bool  # every part keeps its mask, where otherwise the layers of one would keep it
        masks = functools.partial(plan.attention_masks, support, dtype)
        return args, plan.rearranged(backbone_kwargs, masks if makes_masks else masks())

    def pick_scored(_module, _args, output):
        hidden_states = output.last_hidden_state
        output.last_hidden_state = hidden_states.flatten(0, 1)[plan.predictors].unsqueeze(0)
        if plan.layout is not None and getattr(output, "router_logits", None) is not None:
            # the balancing loss counts every token of every sequence
            slots = to_device(plan.layout.slots, hidden_states.device).clamp(min=0).flatten()
            output.router_logits = tuple(logits.flatten(0, -2)[slots] for logits in output.router_logits)
        return output

    backbone = module.base_model
    hooks = [backbone.register_forward_hook(pick_scored)]
    if plan.layout is not None:
        hooks.append(backbone.register_forward_pre_hook(rearrange, with_kwargs=True))
    try:
        outputs = inner(**kwargs, shift_labels=shift_labels, fused_lm_head=True)
    finally:
        for hook in hooks:
            hook.remove()
    for name in PER_TOKEN_FIELDS:
        values = outputs.get(name)
        if values is not None:
            outputs[name] = values.new_zeros(scored.shape).masked_scatter(scored, values)
    outputs["label_mask"] = scored
    return outputs
