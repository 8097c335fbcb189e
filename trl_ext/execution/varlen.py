"""
The plan as segments for variable-length attention kernels, so that no `(T, T)` mask is ever made.

A segment is a run of slots that the same later slots may see: a prompt, or what one completion has for itself. Its
keys are its own and those of the segments it continues, gathered in the order of their positions. Variable-length
kernels (FlashAttention's, and PyTorch's own) align a causal mask at the bottom right, so that the last query sees the
last key: with keys gathered like this, that is exactly what a token of the tree may see. A sliding window counts from
there too.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.utils.generic import is_flash_attention_requested

from .layout import Layout
from .transfer import to_device

# what PyTorch's own kernel runs on
VARLEN_DEVICES = ("cuda",)
VARLEN_DTYPES = (torch.float16, torch.bfloat16)
LARGEST_HEAD_DIM = 256


def can_use_segments(model: PreTrainedModel, backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """
    Whether attention can go by segments instead of by masks: with FlashAttention always; with SDPA where PyTorch's
    kernel can take its place, in half precision on a GPU and without dropout.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model, unwrapped.
        backend (`str`): its attention implementation.
        device (`torch.device`), dtype (`torch.dtype`): of its queries.
    """
    if is_flash_attention_requested(requested_attention_implementation=backend):
        return True
    if backend != "sdpa" or device.type not in VARLEN_DEVICES or dtype not in VARLEN_DTYPES:
        return False
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        type(model)._supports_attention_backend
        and not (model.training and any(getattr(config, name, 0.0) for name in ("attention_dropout", "attn_pdrop")))
        and not hasattr(config, "v_head_dim")  # multi-head latent attention: values of another size than keys
        and head_dim % 8 == 0
        and head_dim <= LARGEST_HEAD_DIM
    )


@dataclass(frozen=True)
class Segments:
    """
    A layout as S segments of queries, each with the keys it looks at.

    Attributes:
        cu_seqlens_q (`torch.Tensor` of shape `(S + 1,)`, int32): where each segment begins among the `R * T` slots.
        cu_seqlens_k (`torch.Tensor` of shape `(S + 1,)`, int32): where its keys begin in `key_index`.
        key_index (`torch.Tensor`, int64): flat slots of the keys, segment after segment.
        max_seqlen_q, max_seqlen_k (`int`): the longest segment, and the most keys of one.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    key_index: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    @classmethod
    def of(cls, layout: Layout, device: torch.device) -> "Segments":
        """Cut a layout into segments, on the host, and move them to `device`."""
        keys, query_lengths, key_lengths = [], [], []
        for row in range(layout.num_rows):
            end, depth, first = layout.subtree_end[row], layout.depth[row], row * layout.row_length
            begins = np.flatnonzero((end[1:] != end[:-1]) | (depth[1:] != depth[:-1] + 1)) + 1
            path: list[tuple[int, int]] = []  # the segments that the present one continues
            for start, stop in zip([0, *begins.tolist()], [*begins.tolist(), layout.row_length], strict=True):
                while path and end[path[-1][0]] <= start:
                    path.pop()
                path.append((start, stop))
                keys += [np.arange(first + a, first + b) for a, b in path]
                query_lengths.append(stop - start)
                key_lengths.append(sum(b - a for a, b in path))

        def offsets(lengths: list[int]) -> torch.Tensor:
            return to_device(np.cumsum([0, *lengths]).astype(np.int32), device)

        return cls(
            cu_seqlens_q=offsets(query_lengths),
            cu_seqlens_k=offsets(key_lengths),
            key_index=to_device(np.concatenate(keys), device),
            max_seqlen_q=max(query_lengths),
            max_seqlen_k=max(key_lengths),
        )


class TreeMask(BlockMask):
    """
    Stands where models expect an attention mask, and carries segments to the attention functions that
    [`take_tree_masks`] has taught to read it. Models hand a `BlockMask` on as it is, also to layers that are run
    again; as one it has no blocks.

    Args:
        segments ([`Segments`]): which slots see which.
        window (`int`, *optional*): of a sliding-window layer, see [`~trl_ext.execution.masks.visibility`].
        num_slots (`int`): `R * T`.
    """

    def __init__(self, segments: Segments, window: int | None, num_slots: int):
        self.segments, self.window, self.num_slots = segments, window, num_slots

    ndim = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (1, 1, self.num_slots, self.num_slots)

    def __repr__(self) -> str:
        return f"TreeMask({self.num_slots} slots, window={self.window})"

    __str__ = __repr__


def take_tree_masks(attn_implementation: str) -> None:
    """
    Teach an attention implementation of transformers to take a [`TreeMask`]. Calls with other masks reach it as
    before.

    Args:
        attn_implementation (`str`): `"sdpa"`, or one of FlashAttention's, kernels of the Hub among them.
    """
    attend = ALL_ATTENTION_FUNCTIONS[attn_implementation]
    if getattr(attend, "takes_tree_masks", False):
        return
    is_flash = is_flash_attention_requested(requested_attention_implementation=attn_implementation)
    through = functools.partial(_through_flash_attention, attend) if is_flash else _through_varlen_attention

    @functools.wraps(attend)
    def attention(module, query, key, value, attention_mask, **kwargs):
        if isinstance(attention_mask, TreeMask):
            return through(module, query, key, value, attention_mask, **kwargs)
        return attend(module, query, key, value, attention_mask, **kwargs)

    attention.takes_tree_masks = True
    AttentionInterface.register(attn_implementation, attention)


def _through_flash_attention(attend, module, query, key, value, mask: TreeMask, **kwargs):
    """transformers' own call of its FlashAttention kernel, which takes segments by these names."""
    segments = mask.segments
    key, value = (_as_one_row(states)[:, :, segments.key_index] for states in (key, value))
    kwargs |= {
        "sliding_window": mask.window,
        "cu_seq_lens_q": segments.cu_seqlens_q,
        "cu_seq_lens_k": segments.cu_seqlens_k,
        "max_length_q": segments.max_seqlen_q,
        "max_length_k": segments.max_seqlen_k,
    }
    kwargs.pop("position_ids", None)
    output, _ = attend(module, _as_one_row(query), key, value, None, **kwargs)
    return output.reshape(query.size(0), query.size(2), *output.shape[2:]), None


def _through_varlen_attention(module, query, key, value, mask: TreeMask, scaling=None, **_kwargs):
    """PyTorch's variable-length kernel on a GPU, the same sums in plain PyTorch elsewhere."""
    segments = mask.segments
    flat = [_as_one_row(states)[0].transpose(0, 1) for states in (query, key, value)]
    attend = _varlen_kernel if query.is_cuda else attention_by_segment
    output = attend(*flat, segments, scale=scaling, window=mask.window)
    return output.reshape(query.size(0), query.size(2), *output.shape[1:]), None


def _as_one_row(states: torch.Tensor) -> torch.Tensor:
    """`(R, heads, T, head_dim)` to `(1, heads, R * T, head_dim)`; no copy where there is one row."""
    if states.size(0) == 1:
        return states
    return states.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def _varlen_kernel(query, key, value, segments: Segments, *, scale: float | None, window: int | None):
    dtype = value.dtype if value.dtype in VARLEN_DTYPES else torch.get_autocast_dtype("cuda")
    output = varlen_attn(
        query.to(dtype),
        key[segments.key_index].to(dtype),
        value[segments.key_index].to(dtype),
        segments.cu_seqlens_q,
        segments.cu_seqlens_k,
        segments.max_seqlen_q,
        segments.max_seqlen_k,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.size(1) != key.size(1),
    )
    return output


def attention_by_segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    *,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """
    What the kernels compute, one segment after the other, in plain PyTorch.

    Args:
        query (`torch.Tensor` of shape `(R * T, heads, head_dim)`): of all slots.
        key, value (`torch.Tensor` of shape `(R * T, key_value_heads, head_dim)`): of all slots.
        segments ([`Segments`]): which slots see which.
        scale (`float`, *optional*): factor of the scores. Defaults to `head_dim ** -0.5`.
        window (`int`, *optional*): most keys a query sees, its own included.

    Returns:
        `torch.Tensor` of shape `(R * T, heads, head_dim of the values)`.
    """
    query_starts, key_starts = segments.cu_seqlens_q.tolist(), segments.cu_seqlens_k.tolist()
    outputs = []
    for segment in range(len(query_starts) - 1):
        queries = query[query_starts[segment] : query_starts[segment + 1]].transpose(0, 1)
        slots = segments.key_index[key_starts[segment] : key_starts[segment + 1]]
        keys, values = key[slots].transpose(0, 1), value[slots].transpose(0, 1)
        num_queries, num_keys = queries.size(1), keys.size(1)
        last_key = torch.arange(num_keys - num_queries, num_keys, device=query.device)[:, None]
        behind = last_key - torch.arange(num_keys, device=query.device)
        visible = behind >= 0
        if window is not None:
            visible &= behind < window
        attended = torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=visible, scale=scale, enable_gqa=query.size(1) != key.size(1)
        )
        outputs.append(attended.transpose(0, 1))
    return torch.cat(outputs)
