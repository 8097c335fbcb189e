"""Token ids of an answer to its text, cut at stop strings."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .._trl import common_prefix_length
from ..data.messages import template_kwargs
from ..data.tokens import tokenize_candidates
from .config import SamplingConfig
from .engine import Generated


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of tokens, without special tokens."""
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def decode_behind(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
    """
    The text of tokens as it goes on behind a prompt, without special tokens.

    Tokenizers of the SentencePiece kind leave out one space at the beginning of what they decode: "Answer:" and
    "▁Sure", decoded each by itself, are "Answer:Sure".
    """
    for tail in (list(prompt_ids[-8:]), list(prompt_ids)):
        before = decode(tokenizer, tail)
        if before:  # and not only special tokens
            text = decode(tokenizer, [*tail, *token_ids])
            # not so where bytes at the seam make no character: then they do not begin with a space either
            return text.removeprefix(before) if text.startswith(before) else decode(tokenizer, token_ids)
    return decode(tokenizer, token_ids)


def _decoding(tokenizer, row: dict[str, Any], prompt_ids: list[int], answer: list[int]) -> Callable[[list[int]], str]:
    """
    How to decode an answer and its beginnings, so that training gets the tokens back that were sampled: as it goes on
    behind the prompt, or by itself, where a chat template brings the space along.
    """
    is_text = isinstance(row["prompt"], str)
    behind, alone = functools.partial(decode_behind, tokenizer, prompt_ids), functools.partial(decode, tokenizer)
    if behind(answer) == alone(answer):  # as with all byte-level tokenizers
        return alone

    def num_tokens_back(decoding) -> int:
        text = decoding(answer)
        completion = text if is_text else [{"role": "assistant", "content": text}]
        try:
            ids, (rest,), _ = tokenize_candidates(tokenizer, row["prompt"], [completion], **template_kwargs(row))
        except Exception:  # a chat template raises what it likes; the answer is no less sampled
            return 0
        return common_prefix_length([*prompt_ids, *answer], [*ids, *rest])

    # where both give the same, as with a template that trims: the whole text, and the message without the space
    return max((behind, alone) if is_text else (alone, behind), key=num_tokens_back)


def _first_cut(text: str, strings: Sequence[str]) -> int | None:
    """Where the first of `strings` begins in `text`."""
    found = [position for string in strings if (position := text.find(string)) >= 0]
    return min(found, default=None)


def _finish(generated: Generated, row, prompt_ids: list[int], tokenizer, config: SamplingConfig) -> dict[str, Any]:
    """
    Text, its log-likelihood and number of tokens, how it ended ("stop", "role_marker" or "length"), and the tokens
    that were sampled: to the end token, or to the token that completes what the text is cut at.
    """
    answer = generated.token_ids[:-1] if generated.finished else generated.token_ids
    decoded = _decoding(tokenizer, row, prompt_ids, answer)
    text, num_tokens, token_ids = decoded(answer), len(generated.token_ids), generated.token_ids
    stop, marker = (_first_cut(text, strings or ()) for strings in (config.stop_strings, config.role_markers))
    end = "stop" if generated.finished else "length"
    cut = min((position for position in (stop, marker) if position is not None), default=None)
    if cut is not None:
        end = "stop" if cut == stop else "role_marker"
        text, num_tokens = text[:cut], len(answer)
        # a token that is only partly in the text does not count
        while num_tokens and len(decoded(answer[:num_tokens])) > cut:
            num_tokens -= 1
        strings = (*(config.stop_strings or ()), *(config.role_markers or ()))
        completes = (n for n in range(num_tokens, len(answer)) if _first_cut(decoded(answer[:n]), strings) is not None)
        token_ids = answer[: next(completes, len(answer))]
    logp = sum(generated.logps[:num_tokens])
    return {"text": text, "logp": logp, "num_tokens": num_tokens, "end": end, "token_ids": token_ids}
