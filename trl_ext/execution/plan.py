"""A layout for one batch with the tensors and masks that follow from it."""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from .layout import Layout
from .masks import FLEX_BLOCK_SIZE, attention_mask
from .support import Support
from .varlen import Segments, TreeMask

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
    """

    layout: Layout | None
    source: torch.Tensor | None = None
    segments: Segments | None = None
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


def multiple_of(backend: str, by_segment: bool, device: torch.device) -> int:
    """The number that row lengths are rounded up to, so that compiled kernels see few different shapes."""
    if by_segment:
        return 1
    if backend == "flex_attention":
        return FLEX_BLOCK_SIZE
    return CUDA_MULTIPLE if device.type == "cuda" else 1
