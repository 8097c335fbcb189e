"""The plan as an attention mask, for each backend of transformers."""

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask

from .layout import Layout
from .transfer import to_device

# side of a FlexAttention block; row lengths are rounded up to it
FLEX_BLOCK_SIZE = 128
# Most slots of a row under FlexAttention, whose blocks are listed T / 128 by T / 128: at 306,000 slots making the list
# takes seconds, and from 46,341 on products of two lengths no longer fit into 32 bits.
FLEX_LONGEST_ROW = 16_384


def visibility(layout: Layout, window: int | None, device: torch.device) -> torch.Tensor:
    """
    Which slot sees which: bool `(R, 1, T, T)`, query by key. Slot q sees k <= q < `subtree_end[k]`.

    Args:
        layout ([`Layout`]): the plan.
        window (`int`, *optional*): of a sliding-window layer. A token sees the `window` tokens before it in its own
            sequence, itself included, however far apart they are in the row.
        device (`torch.device`): where to build it.
    """
    subtree_end = to_device(layout.subtree_end, device)
    slot = torch.arange(layout.row_length, device=device)
    visible = (slot[:, None] >= slot) & (slot[:, None] < subtree_end[:, None, :])
    if window is not None:
        depth = to_device(layout.depth, device)
        visible &= (depth[:, :, None] - depth[:, None, :]) < window
    return visible.unsqueeze(1)


def attention_mask(
    layout: Layout, window: int | None, *, backend: str, dtype: torch.dtype, device: torch.device
) -> "torch.Tensor | BlockMask":
    """
    The mask in the form a backend of transformers takes as it is.

    Args:
        layout ([`Layout`]): the plan.
        window (`int`, *optional*): see [`visibility`].
        backend (`str`): `"sdpa"` or `"eager"` (0, or half the lowest number of `dtype`, to be added to the scores),
            or `"flex_attention"` (block mask; T must be a multiple of `FLEX_BLOCK_SIZE`).
        dtype (`torch.dtype`): of the queries; or `torch.bool`, for SDPA, a quarter of the size where it is kept.
        device (`torch.device`): of the model's inputs.
    """
    if backend == "flex_attention":
        return block_mask(layout, window, device)
    # SDPA takes a bool mask as well, but makes this of it in every layer, and each keeps its own for the backward pass
    visible = visibility(layout, window, device)
    if dtype == torch.bool:
        return visible
    # half of the lowest number: added to a negative score, the lowest itself would become minus infinity, and a tile
    # of these alone NaN
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min / 2)


def block_mask(layout: Layout, window: int | None, device: torch.device) -> BlockMask:
    """
    The mask for FlexAttention. Which blocks are empty, full or mixed follows from the plan on the host, so that no
    `(T, T)` mask is ever made and nothing has to be compiled to make this one.
    """
    size = FLEX_BLOCK_SIZE
    num_blocks = layout.row_length // size
    by_block = (layout.num_rows, num_blocks, size)
    end, depth = layout.subtree_end.reshape(by_block), layout.depth.reshape(by_block)
    first_slot = np.arange(num_blocks) * size
    query, key = first_slot[:, None], first_slot[None, :]
    # (R, query block, key block)
    some = (query + size > key) & (end.max(axis=2)[:, None, :] > query)
    whole = (query >= key + size) & (end.min(axis=2)[:, None, :] >= query + size)
    if window is not None:
        some &= depth.min(axis=2)[:, :, None] - depth.max(axis=2)[:, None, :] < window
        whole &= depth.max(axis=2)[:, :, None] - depth.min(axis=2)[:, None, :] < window
    subtree_end = to_device(layout.subtree_end, device)
    depths = to_device(layout.depth, device)

    def causal_in_tree(row, _head, q, k):
        return (q >= k) & (q < subtree_end[row, k])

    def windowed_causal_in_tree(row, head, q, k):
        return causal_in_tree(row, head, q, k) & (depths[row, q] - depths[row, k] < window)

    return BlockMask.from_kv_blocks(
        *_block_list(some & ~whole, device),
        *_block_list(whole, device),
        BLOCK_SIZE=size,
        mask_mod=causal_in_tree if window is None else windowed_causal_in_tree,
        seq_lengths=(layout.row_length, layout.row_length),
    )


def _block_list(blocks: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`(R, Q, K)` bool to the number `(R, 1, Q)` and the indices `(R, 1, Q, K)` of the marked key blocks, int32."""
    indices = np.argsort(~blocks, axis=2, kind="stable").astype(np.int32)
    return to_device(blocks.sum(axis=2).astype(np.int32), device)[:, None], to_device(indices, device)[:, None]
