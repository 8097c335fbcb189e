"""The model call in a layout of our own: rearranged on the way in, put back on the way out."""

import functools
import inspect
import warnings
import weakref
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel

from .cost import CostModel
from .layout import Layout, plan_layout
from .masks import FLEX_BLOCK_SIZE, attention_mask
from .support import Support, inspect_model

IGNORE_INDEX = -100
MODES = ("auto", True, False)
# what a batch may contain to be rearranged; images, caches or token types would have to be rearranged too
KNOWN_INPUTS = {"input_ids", "attention_mask", "position_ids"}
SETTINGS = {
    "use_cache",
    "output_router_logits",
    "num_items_in_batch",
    "hidden_mask",
    "reference_hidden",
    "return_dict",
}
PER_TOKEN_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@dataclass
class SharingStatistics:
    """
    What sharing has done so far.

    Attributes:
        batches_shared, batches_padded (`int`):
            Batches seen so far that were rearranged, and that were left as they were.
        positions_padded (`int`):
            Positions N * L of these batches, padding included.
        positions_computed (`int`):
            Positions that went through the model instead.
    """

    batches_shared: int = 0
    batches_padded: int = 0
    positions_padded: int = 0
    positions_computed: int = 0


@dataclass
class _Plan:
    """A batch's layout (`None`: as it is) and the tensors that follow from it, made once for all models."""

    layout: Layout | None
    scored: torch.Tensor  # (N, L - 1), bool: positions of the output that are asked for
    predictors: torch.Tensor  # (M,): where, among all computed positions, each scored token is predicted
    source: torch.Tensor | None = None  # (R, T)
    masks: dict[tuple, Any] = field(default_factory=dict)

    def attention_masks(self, support: Support, dtype: torch.dtype) -> Any:
        """The mask of a model's layers, or one for each kind of layer."""

        def mask(window):
            if window is not None and window > self.layout.depth.max():
                window = None
            key = (window, support.backend, dtype if support.backend == "eager" else None)
            if key not in self.masks:
                self.masks[key] = attention_mask(
                    self.layout, window, backend=support.backend, dtype=dtype, device=self.scored.device
                )
            return self.masks[key]

        masks = {kind: mask(window) for kind, window in support.windows.items()}
        different = {id(mask): mask for mask in masks.values()}
        return masks if len(different) > 1 else next(iter(different.values()))


class PrefixSharing:
    """
    Makes models with TRL's fused LM head compute every distinct token of a batch once.

    [`~PrefixSharing.install`] wraps the `forward` of a model. A call with `labels` and `fused_lm_head=True` then runs
    the backbone over a layout (see `layout.py`) instead of the padded batch, hands the LM head only the positions that
    are scored, and puts the per-token outputs back where the padded batch has them. Whoever calls sees the same
    numbers in the same places. Every other call goes through unchanged.

    One object serves all models of a trainer: the plan and the masks of a batch are made once and used by the policy
    and the reference alike.

    With dropout the two ways draw different noise, and completions of a prompt share the noise in it.

    Args:
        mode (`str` or `bool`, *optional*, defaults to `"auto"`):
            `"auto"`: rearrange a batch when the cost model expects it to be faster; models that cannot share are left
            alone, with one warning that says why. `True`: always; what cannot is an error.
        self_check (`bool`, *optional*, defaults to `False`):
            Run the first batch both ways, with gradients, and stop if they disagree. Architectures that are not in
            `support.VERIFIED` are checked in any case.

    Attributes:
        statistics ([`SharingStatistics`]): what was saved so far.
    """

    def __init__(self, mode: str | bool = "auto", self_check: bool = False):
        if mode not in ("auto", True):
            raise ValueError(f"prefix_sharing={mode!r} is not known here. Set it to 'auto' or True.")
        self.mode = mode
        self.self_check = self_check
        self.statistics = SharingStatistics()
        self._installed: list[tuple[PreTrainedModel, Any, Any]] = []
        self._active = True
        self._said: set[str] = set()
        self._last: tuple | None = None

    def install(self, model: PreTrainedModel) -> bool:
        """
        Wrap a model's `forward`.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                Model that went through TRL's `add_fused_lm_head`, unwrapped.

        Returns:
            `bool`: whether the model can share prefixes. If not, it was left alone and a warning said why.

        Raises:
            ValueError: `mode` is True and the model cannot share prefixes.
        """
        support = inspect_model(model)
        if support.reason is not None:
            self._cannot(support.reason)
            return False
        if is_peft_model(model):
            model = model.get_base_model()
        inner = model.forward
        state = _ModelState(
            support, CostModel.of(model), config=model.config, must_check=self.self_check or not support.verified
        )

        @functools.wraps(type(model).forward)
        def forward(module, *args, fused_lm_head=False, labels=None, **kwargs):
            if not (fused_lm_head and labels is not None and self._active and state.usable):
                passed_on = {"labels": labels} if labels is not None else {}
                passed_on |= {"fused_lm_head": True} if fused_lm_head else {}
                return inner(*args, **passed_on, **kwargs)
            if args:
                names = list(inspect.signature(type(module).forward).parameters)[1:]
                kwargs.update(zip(names, args, strict=False))
            return self._forward(module, inner, state, labels, kwargs)

        model.forward = MethodType(forward, model)
        self._installed.append((model, model.forward, inner))
        return True

    def remove(self) -> None:
        """Undo every [`~PrefixSharing.install`]."""
        self._active = False
        for model, ours, inner in self._installed:
            if model.forward == ours:  # else someone wrapped it since; ours passes everything on from now on
                model.forward = inner
        self._installed.clear()

    def _cannot(self, reason: str) -> None:
        """This model or batch cannot be rearranged: an error if it has to be, else said once."""
        if self.mode is True:
            raise ValueError(cannot_be_honoured(reason))
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"Prompts are not shared between their completions: {reason}.", stacklevel=4)

    def _forward(self, module, inner, state: "_ModelState", labels: torch.Tensor, kwargs: dict[str, Any]):
        def as_it_is():
            return inner(**kwargs, labels=labels, fused_lm_head=True)

        given = {name for name, value in kwargs.items() if value is not None}
        unknown = given - KNOWN_INPUTS - SETTINGS
        if unknown or "input_ids" not in given:
            self._cannot(f"the batch holds {sorted(unknown) or 'no input_ids'}, which cannot be rearranged")
            return as_it_is()
        if torch.compiler.is_compiling():
            self._cannot("the model is being compiled as a whole (torch_compile), and layouts differ between batches")
            return as_it_is()
        if state.support.max_columns is not None and labels.size(1) > state.support.max_columns:
            self._cannot(
                f"the model's rotary embedding depends on the length of the batch beyond {state.support.max_columns} "
                "tokens"
            )
            return as_it_is()
        plan = self._plan(kwargs, labels, state)
        if plan is None:
            return as_it_is()
        if plan.layout is not None and state.must_check:
            state.must_check = False
            difference = _compare(module, inner, state, plan, labels, kwargs)
            if difference is not None:
                if self.self_check or self.mode is True:
                    raise RuntimeError(
                        f"The first batch gives other numbers with shared prompts than padded: {difference}. Set "
                        f"prefix_sharing=False for {type(module).__name__}, and please report this."
                    )
                state.usable = False
                self._cannot(
                    f"{type(module).__name__} is not among the architectures tested and gave other numbers on its "
                    f"first batch ({difference})"
                )
                return as_it_is()
        return _run(module, inner, state.support, plan, labels, kwargs)

    def _plan(self, kwargs: dict[str, Any], labels: torch.Tensor, state: "_ModelState") -> _Plan | None:
        """The batch's plan, made anew only if the tensors are not those of the call before."""
        tensors = [kwargs["input_ids"], labels, kwargs.get("attention_mask"), kwargs.get("position_ids")]
        keep_unscored = bool(kwargs.get("output_router_logits", getattr(state.config, "output_router_logits", False)))
        multiple_of = FLEX_BLOCK_SIZE if state.support.backend == "flex_attention" else 1
        key = [(None, 0) if t is None else (t, t._version) for t in tensors]
        if self._last is not None:
            last_key, settings, plan = self._last
            same = all(
                (ref() if ref else None) is t and v == w for (ref, v), (t, w) in zip(last_key, key, strict=True)
            )
            if same and settings[1:] == (multiple_of,) and settings[0] >= keep_unscored:
                return plan
        plan = self._make_plan(tensors, keep_unscored, multiple_of, state.cost)
        refs = [(weakref.ref(t) if t is not None else None, version) for t, version in key]
        self._last = (refs, (keep_unscored, multiple_of), plan)
        return plan

    def _make_plan(self, tensors: list, keep_unscored: bool, multiple_of: int, cost: CostModel) -> _Plan | None:
        input_ids, labels, mask, position_ids = tensors
        if position_ids is not None and position_ids.dim() != 2:
            self._cannot("the batch has position_ids of more than one kind")
            return None
        if mask is not None and mask.dim() != 2:
            self._cannot("the batch brings an attention mask of its own")
            return None
        scored = labels != IGNORE_INDEX
        stacked = [input_ids, torch.ones_like(input_ids) if mask is None else mask.long(), scored.long()]
        if position_ids is not None:
            stacked.append(position_ids.expand_as(input_ids))
        on_host = torch.stack(stacked).cpu().numpy()  # one transfer
        if not on_host[2, :, 1:].any():
            return None
        try:
            layout = plan_layout(
                on_host[0],
                on_host[1],
                on_host[2].astype(bool),
                on_host[3] if position_ids is not None else None,
                keep_unscored=keep_unscored,
                multiple_of=multiple_of,
                cost=cost,
            )
        except ValueError as error:
            self._cannot(f"{error}")
            return None
        if self.mode == "auto" and not cost.pays(layout, *input_ids.shape, not on_host[1].all()):
            layout = None
        statistics = self.statistics
        statistics.positions_padded += input_ids.numel()
        if layout is None:
            statistics.batches_padded += 1
            statistics.positions_computed += input_ids.numel()
        else:
            statistics.batches_shared += 1
            statistics.positions_computed += layout.source.size

        scored_on_host = on_host[2, :, 1:].astype(bool)
        slots = np.arange(input_ids.numel()).reshape(input_ids.shape) if layout is None else layout.slots
        device = input_ids.device
        plan = _Plan(
            layout=layout,
            scored=scored[:, 1:],
            predictors=torch.from_numpy(slots[:, :-1][scored_on_host]).to(device),
        )
        if layout is not None:
            plan.source = torch.from_numpy(layout.source).to(device)
        return plan


def cannot_be_honoured(reason: str) -> str:
    """Message for `prefix_sharing=True` where it is impossible."""
    return f"prefix_sharing=True cannot be honoured: {reason}. Set prefix_sharing='auto' or False to run padded."


@dataclass
class _ModelState:
    support: Support
    cost: CostModel
    config: Any = None
    must_check: bool = False
    usable: bool = True


def _run(module, inner, support: Support, plan: _Plan, labels: torch.Tensor, kwargs: dict[str, Any]):
    """The forward in the plan's layout; the outputs in the batch's own."""
    kwargs = dict(kwargs)
    scored = plan.scored
    shift_labels = labels[:, 1:][scored].unsqueeze(0)
    if kwargs.get("hidden_mask") is not None:
        kwargs["hidden_mask"] = kwargs["hidden_mask"][scored].unsqueeze(0)

    def rearrange(_module, args, backbone_kwargs):
        input_ids, position_ids = backbone_kwargs["input_ids"], backbone_kwargs.get("position_ids")
        if position_ids is None:
            position_ids = torch.arange(input_ids.size(1), device=input_ids.device)
        source = plan.source.clamp(min=0)
        backbone_kwargs = dict(backbone_kwargs)
        backbone_kwargs["input_ids"] = input_ids.flatten()[source]
        backbone_kwargs["position_ids"] = position_ids.expand_as(input_ids).flatten()[source]
        backbone_kwargs["attention_mask"] = plan.attention_masks(support, module.dtype)
        return args, backbone_kwargs

    def pick_scored(_module, _args, output):
        hidden_states = output.last_hidden_state
        output.last_hidden_state = hidden_states.flatten(0, 1)[plan.predictors].unsqueeze(0)
        if plan.layout is not None and getattr(output, "router_logits", None) is not None:
            # the balancing loss counts every token of every sequence
            slots = torch.from_numpy(plan.layout.slots).to(hidden_states.device).clamp(min=0).flatten()
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


def _compare(module, inner, state: _ModelState, plan: _Plan, labels: torch.Tensor, kwargs: dict[str, Any]):
    """
    Run a batch padded and in the plan's layout; `None` if they agree, else what differs.

    Compared are the log-probabilities and the gradient of a signed sum of them with respect to the embedded tokens,
    which passes through every layer. Runs in eval mode, where neither dropout nor gradient checkpointing is active.
    """
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    signs = torch.ones_like(plan.scored, dtype=torch.float32)
    signs[:, ::2] = -0.5  # so that an error in one direction does not cancel
    kwargs = {name: value for name, value in kwargs.items() if name not in ("hidden_mask", "reference_hidden")}
    results = []
    try:
        for shared in (False, True):
            embedded = []

            def start_graph(_module, _args, output, embedded=embedded):
                embedded.append(output.detach().requires_grad_())
                return embedded[0]

            hook = module.get_input_embeddings().register_forward_hook(start_graph)
            try:
                with torch.enable_grad():
                    if shared:
                        outputs = _run(module, inner, state.support, plan, labels, kwargs)
                    else:
                        outputs = inner(**kwargs, labels=labels, fused_lm_head=True)
                    (gradient,) = torch.autograd.grad((outputs.log_probs.float() * signs).sum(), embedded)
            finally:
                hook.remove()
            results.append((outputs.log_probs.detach().float(), gradient.float().flatten(0, 1)))
    finally:
        for m, training in modes:
            m.training = training
    (padded_logps, padded_gradient), (shared_logps, shared_gradient) = results
    slots = torch.from_numpy(plan.layout.slots).to(labels.device).flatten()
    used = slots >= 0
    expected = torch.zeros_like(shared_gradient).index_add(0, slots[used], padded_gradient[used])
    half_precision = module.dtype != torch.float32 or torch.is_autocast_enabled(labels.device.type)
    tolerance = 5e-2 if half_precision else 1e-4
    for name, a, b in (
        ("log-probabilities", padded_logps, shared_logps),
        ("gradients", expected, shared_gradient),
    ):
        error = ((a - b).norm() / a.norm().clamp(min=1e-30)).item()
        if not error <= tolerance:
            return (
                f"{name} differ by {error:.2g} of their norm, {tolerance:g} allowed; largest {(a - b).abs().max():.3g}"
            )
    return None
