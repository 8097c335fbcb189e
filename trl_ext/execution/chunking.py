"""The model call in parts: a few completions at a time, and still one forward and one backward for whoever calls."""

import contextlib
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from .._trl import FusedCausalLMOutput
from .forward import IGNORE_INDEX, MODEL_KEYS, PER_TOKEN_FIELDS
from .install import add_layer
from .support import length_dependent_positions

BY_ROW = (*MODEL_KEYS, "labels")
RETURNED = (*PER_TOKEN_FIELDS, "label_mask")


def chunk_sizes(prompt_index: list[int], most: int) -> list[int]:
    """
    How many rows of a prompt-major batch to run at a time.

    A prompt's rows stay together where no more than `most` of them are, so that they can share the prompt.

    Args:
        prompt_index (`list[int]`): which prompt each of the N rows belongs to.
        most (`int`): most rows at a time, at least 1.

    Returns:
        `list[int]`: sizes of the parts, in order; they add up to N.
    """
    sizes = [0]
    for _, rows in groupby(prompt_index):
        left = len(list(rows))
        if sizes[-1] and sizes[-1] + left > most:
            sizes.append(0)
        while left > most:
            sizes[-1:] = [most, 0]
            left -= most
        sizes[-1] += left
    return sizes


def add_chunking(model: PreTrainedModel, multiple_of: int = 1) -> None:
    """
    Teach a model with TRL's fused LM head to run a batch in parts, so that the memory of its activations grows with
    the largest part and not with the batch.

    One extra argument of `forward` is understood afterwards: `chunk_sizes` (`list[int]`), how many of the N rows to
    run at a time. The per-token outputs are those of the whole batch, up to rounding; with dropout, whose noise is
    drawn for each part, they are not. Where gradients are on, a part keeps of its backbone nothing but what went in
    (tokens, positions, masks: with prefix sharing `(R, 1, T, T)`) and the hidden states that came out, and is run
    again when the backward pass comes to it: a second forward, in exchange for the activations of one part at a time.
    The LM head is not run again. All of it happens inside one call of the model, so DDP and DeepSpeed see one forward
    and one backward.

    Sizes of 0 at the end run the last row once more and drop the result. Where weights are spread over processes,
    those with fewer parts keep step with the others in this way.

    Columns at the end that are padding in all rows of a part are not computed (padding on the left is). What adds up
    over the whole batch is not returned (`loss`, `aux_loss`).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model to patch, unwrapped. Prefix sharing, added before or after, works within each part.
        multiple_of (`int`, *optional*, defaults to 1):
            Cut columns off only down to a multiple of this.
    """
    longest_to_trim = length_dependent_positions(model.config.get_text_config())

    def layer(module, call, *args, chunk_sizes=None, **kwargs):
        if chunk_sizes is None:
            return call(*args, **kwargs)
        num_rows, num_columns = kwargs["labels"].shape
        trim = longest_to_trim is None or num_columns <= longest_to_trim
        chunks = _cut(kwargs, chunk_sizes, multiple_of if trim else num_columns)
        settings = {name: value for name, value in kwargs.items() if name not in BY_ROW}
        outputs = []
        with _recomputing(module.base_model) if torch.is_grad_enabled() else contextlib.nullcontext():
            for chunk in chunks:
                output = call(**chunk, **settings)
                outputs.append({name: output[name] for name in RETURNED if output.get(name) is not None})
        return FusedCausalLMOutput(
            **{
                name: torch.cat([pad(o[name], (0, num_columns - 1 - o[name].size(1))) for o in outputs])[:num_rows]
                for name in outputs[0]
            }
        )

    add_layer(model, "chunking", layer)


@contextlib.contextmanager
def _recomputing(backbone: nn.Module) -> Iterator[None]:
    """
    Calls of the backbone inside the block keep only their inputs and outputs for the backward pass.

    The LM head stays out of it: TRL's kernel has to find the parameter itself in its backward pass, to collect it
    under ZeRO-3, and what is kept for running again is a copy.
    """
    of_instance = vars(backbone).get("forward")
    forward = backbone.forward

    # Under ZeRO-3 a weight has its values only while it is used. Those that are not trained are kept as what they are,
    # and look empty when `checkpoint` compares the two runs
    determinism_check = "none" if is_deepspeed_zero3_enabled() else "default"

    def run(args: tuple, kwargs: dict[str, Any]):
        if callable(kwargs.get("attention_mask")):
            kwargs = {**kwargs, "attention_mask": kwargs["attention_mask"]()}
        output = forward(*args, **kwargs)
        output.last_hidden_state = _RunAgainNow.apply(output.last_hidden_state)
        return output

    def forward_twice(*args, **kwargs):
        # as positional arguments, since only in these does `checkpoint` look for devices whose random state to keep.
        # With `early_stop` the second run would end halfway, and leave weights collected under ZeRO-3 where they are.
        return checkpoint(
            run, args, kwargs, use_reentrant=False, determinism_check=determinism_check, early_stop=False
        )

    # a mask is as large as a part is long, squared: it is made for each run, and not kept from one to the other
    forward_twice.makes_masks = True
    backbone.forward = forward_twice
    try:
        yield
    finally:
        del backbone.forward
        if of_instance is not None:
            backbone.forward = of_instance


class _RunAgainNow(torch.autograd.Function):
    """
    The identity. Its backward pass, the first of the backbone's, asks for something that was not kept, so that the
    second run is over before the backward pass of the last layer begins: at its end, ZeRO-3 gives away the weights
    that it had collected for that layer's backward pass.
    """

    @staticmethod
    def forward(ctx, hidden_states: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden_states.new_empty(0))
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        _ = ctx.saved_tensors
        return gradient


def _cut(kwargs: dict[str, Any], sizes: list[int], multiple_of: int) -> list[dict[str, torch.Tensor]]:
    """The arguments that have rows, part by part, each without the columns at its end that are only padding."""
    by_row = {name: kwargs[name] for name in BY_ROW if kwargs.get(name) is not None}
    others = sorted(name for name, value in kwargs.items() if torch.is_tensor(value) and name not in by_row)
    if others or "input_ids" not in by_row:
        raise NotImplementedError(
            f"The model is called with {others or sorted(by_row)}, which cannot be run in parts: only token ids and "
            "their masks, positions and labels can. Leave `max_completions_per_forward` out."
        )
    num_rows, num_columns = by_row["labels"].shape
    used = by_row.get("attention_mask", by_row["labels"] != IGNORE_INDEX).bool()
    ends = (used * torch.arange(1, num_columns + 1, device=used.device)).amax(dim=1).tolist()  # one transfer
    chunks, start = [], 0
    for size in sizes:
        rows = slice(start, start + size) if size else slice(num_rows - 1, num_rows)
        end = -(-max(ends[rows]) // multiple_of) * multiple_of
        chunks.append({name: tensor[rows, :end] for name, tensor in by_row.items()})
        start += size
    return chunks
