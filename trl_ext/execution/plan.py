"""A layout for one batch with the tensors and masks that follow from it."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .cost import CostModel
from .flex import refuse_unfused_flex
from .layout import Layout, plan_layout
from .masks import FLEX_BLOCK_SIZE, FLEX_LONGEST_ROW, attention_mask
from .support import Support
from .varlen import Segments, TreeMask, take_tree_masks

# On CUDA, rows that need a mask are rounded up to this: cuDNN builds a plan for each new length (25 to 100 ms), and
# the gradients of its masked kernel can be NaN where T mod 128 is 64 (github.com/pytorch/pytorch/issues/196678)
CUDA_MULTIPLE = 128


@dataclass(kw_only=True)
class Plan:
    """
    A batch's layout and the tensors that follow from it, the same for all models that see the batch.

    Attributes:
        layout ([`Layout`], *optional*): `None` leaves the batch as it is.
        source (`torch.Tensor` of shape `(R, T)`, int64, *optional*): the layout's `source` on the batch's device.
        segments ([`Segments`], *optional*): where attention goes by segments and not by masks.
        position_ids (`torch.Tensor` of shape `(N, L)`, int64, *optional*): see [`positions_of`].
    """

    layout: Layout | None
    source: torch.Tensor | None = None
    segments: Segments | None = None
    position_ids: torch.Tensor | None = None
    # weakly, so that a mask goes with the last pass that needs it, and not with the next batch
    masks: weakref.WeakValueDictionary = field(default_factory=weakref.WeakValueDictionary)

    def attention_masks(self, support: Support, dtype: torch.dtype) -> Any:
        """The mask of a model's layers, or one for each kind of layer; `dtype` is that of their queries."""

        def mask(window):
            if window is not None and window > self.layout.depth.max():
                window = None
            if self.segments is not None:
                return tree_masks.setdefault(window, TreeMask(self.segments, window, self.layout.source.size))
            key = (window, support.backend, dtype)
            made = self.masks.get(key)
            if made is None:
                made = self.masks[key] = attention_mask(
                    self.layout, window, backend=support.backend, dtype=dtype, device=self.source.device
                )
            return made

        tree_masks: dict[int | None, TreeMask] = {}

        masks = {kind: mask(window) for kind, window in support.windows.items()}
        different = {id(mask): mask for mask in masks.values()}
        return masks if len(different) > 1 else next(iter(different.values()))

    def rearranged(self, kwargs: dict[str, Any], masks: Any) -> dict[str, Any]:
        """The arguments of a backbone in the layout, with `masks` as its attention mask."""
        input_ids, position_ids = kwargs["input_ids"], self.position_ids
        if position_ids is None:
            position_ids = torch.arange(input_ids.size(1), device=input_ids.device)
        source = self.source.clamp(min=0)
        return kwargs | {
            "input_ids": input_ids.flatten()[source],
            "position_ids": position_ids.expand_as(input_ids).flatten()[source],
            "attention_mask": masks,
        }


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

    def __str__(self) -> str:
        batches = self.batches_shared + self.batches_padded
        part = self.positions_computed / max(self.positions_padded, 1)
        return (
            f"Prefix sharing rearranged {self.batches_shared} of {batches} batches and computed {part:.0%} of the "
            "positions of the padded ones."
        )

    def add(self, positions: int, layout: Layout | None) -> None:
        """Count a batch."""
        if layout is None:
            self.batches_padded += 1
        else:
            self.batches_shared += 1
        self.positions_padded += positions
        self.positions_computed += positions if layout is None else layout.source.size


def query_dtype(module: torch.nn.Module, device: torch.device) -> torch.dtype:
    """The dtype of a model's queries: autocast's where it is on, else that of its weights."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return module.dtype


def positions_of(
    support: Support, mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> torch.Tensor | None:
    """
    The positions `(N, L)` at which a model computes the tokens of a batch. `None`: the columns.

    Args:
        support ([`Support`]): of the model.
        mask, position_ids (`torch.Tensor` of shape `(N, L)`, *optional*): what the model is called with.
    """
    if position_ids is None and mask is not None and support.positions_from_mask:
        return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return position_ids


def choose_layout(
    ids: np.ndarray,
    mask: np.ndarray,
    scored: np.ndarray,
    positions: np.ndarray | None,
    *,
    keep_unscored: bool,
    cost: CostModel,
    backend: str,
    by_segment: bool,
    device: torch.device,
    is_forced: Callable[[Layout], bool],
) -> Layout | None:
    """
    The layout of a batch `(N, L)`. `None` leaves the batch as it is: no token is scored, or the layout is not forced
    and not expected to be faster.

    Args:
        ids, mask, scored, positions, keep_unscored: see [`plan_layout`].
        cost ([`CostModel`]): of the model.
        backend (`str`), by_segment (`bool`), device (`torch.device`): how and where attention is computed.
        is_forced (`Callable`): whether a layout is taken whatever it costs.

    Raises:
        ValueError: see [`plan_layout`].
    """
    if by_segment:  # attention by segments costs what its tokens do, wherever they are
        cost = CostModel(0.0)
    layout = plan_layout(
        ids,
        mask,
        scored,
        positions,
        keep_unscored=keep_unscored,
        multiple_of=_multiple_of(backend, by_segment, device),
        longest_row=FLEX_LONGEST_ROW if backend == "flex_attention" else None,
        cost=None if by_segment else cost,
    )
    if layout is None or is_forced(layout) or cost.pays(layout, *ids.shape, not mask.all()):
        return layout
    return None


def prepare_attention(backend: str, device: torch.device, plan: Plan | None) -> None:
    """
    Make an attention implementation ready for a plan, or for padded rows.

    cuDNN's SDPA is switched off where a mask would reach it: its gradients can be NaN, those of padded rows as well,
    see `CUDA_MULTIPLE`. Which kernel runs is chosen in the forward, and no other switch reaches layers that are run
    again.
    """
    if plan is not None and plan.segments is not None:
        take_tree_masks(backend)
    elif backend == "flex_attention":
        refuse_unfused_flex()
    elif backend == "sdpa" and device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def _multiple_of(backend: str, by_segment: bool, device: torch.device) -> int:
    """The number that row lengths are rounded up to, so that compiled kernels see few different shapes."""
    if by_segment:
        return 1
    if backend == "flex_attention":
        return FLEX_BLOCK_SIZE
    return CUDA_MULTIPLE if device.type == "cuda" else 1
