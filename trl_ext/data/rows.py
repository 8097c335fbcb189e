"""Rows as users have them: the accepted formats, and reading one row into a prompt with K completions.

Whatever comes in, one prompt with K completions comes out. A preference pair is K = 2.

Accepted rows, plain text or conversational, in TRL's words:

- preference: `chosen`, `rejected`, optionally `prompt` (else the shared beginning of both is the prompt), `reference`
  (a target for the regulariser, of the same form as the answers), `score_chosen` and `score_rejected`;
- ranked: `prompt` (optional in the same way), `completions` (a list), `scores` (numbers, one per completion; K may
  differ between rows), optionally `reference`.

Conversations that repeat the prompt in front of every answer are understood too, with the prompt as messages or as the
text of the first user message. `tools` and `chat_template_kwargs` are passed to the chat template, as TRL does.

A sampled answer that was ended by its length alone gets no end token. A preference row says so by a true
`chosen_is_cut`, `rejected_is_cut` or `reference_is_cut`, a ranked row by "length" at the answer's place in `ends`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .messages import _split_messages, _split_text
from .row_error import RowError

LARGEST_SCORE = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class RowOptions:
    """
    What a trainer wants of its rows.

    Args:
        min_completions (`int`, defaults to 2):
            Fewest candidates a prompt may have.
        score_values (`bool`, defaults to `False`):
            Whether the size of the scores matters, not only their order. A preference row then needs `score_chosen`
            and `score_rejected`; otherwise `chosen` simply counts as better.
        score_columns (`bool`, defaults to `False`):
            Whether a preference row that has both `score_chosen` and `score_rejected` is scored by them. Where they
            are equal, `chosen` is no better than `rejected`.
        reference (`bool`, defaults to `False`):
            Whether a `reference` column is used. If not, it is ignored and never computed.
        expect_reference (`bool`, defaults to `False`):
            Whether rows should have a `reference`. Those without are counted, also where the whole column is missing,
            and the best candidate stands in only if it is better than another, or is the only one and scores above 0.
        best_only (`bool`, defaults to `False`):
            Whether only the best candidate of each row (of equals the first) is kept, so that no other is computed. Of
            the others is still checked what can be without tokenising them: that they are text or messages of the
            row's form that say something, have a score, and are not the same as `chosen`.
        max_length (`int`, *optional*):
            Most tokens of prompt + completion; completions are cut at the end.
        eos_token (`str`, *optional*):
            Appended to plain-text completions that do not end with it, as TRL does. Conversational rows get theirs
            from the chat template.
    """

    min_completions: int = 2
    score_values: bool = False
    score_columns: bool = False
    reference: bool = False
    expect_reference: bool = False
    best_only: bool = False
    max_length: int | None = None
    eos_token: str | None = None


def check_text(value: Any, column: str, *, is_completion: bool) -> None:
    """Refuse anything but a string or a list of messages; a completion must also say something."""
    if value is None:
        raise RowError("missing", column, "is missing (None)")
    if isinstance(value, str):
        if is_completion and not value.strip():
            raise RowError("empty", column, "is empty")
        return
    if not isinstance(value, list):
        shown = f"{value!r:.40}"
        raise RowError("not text", column, f"is {type(value).__name__} ({shown}), neither text nor a list of messages")
    if not value:
        raise RowError("empty", column, "is an empty list of messages")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RowError("not text", column, f"holds {message!r:.60}, which is not a message with a role")
        content = message.get("content")
        if content is not None and not isinstance(content, str | list):
            raise RowError("not text", column, f"has a message whose content is {type(content).__name__}, not text")
    if is_completion:
        if value[-1]["role"] in ("user", "system"):
            raise RowError("not an answer", column, f"ends with a message of the {value[-1]['role']}")
        if not any(_says_something(message) for message in value):
            raise RowError("empty", column, "is empty")


def _says_something(message: Mapping) -> bool:
    content = message.get("content")
    if isinstance(content, list):  # content given in parts
        return any(not isinstance(part, Mapping) or (part.get("text") or "").strip() for part in content)
    return bool((content or "").strip() or message.get("tool_calls"))


def check_scores(scores: Any, column: str, num_completions: int) -> list[float]:
    if not isinstance(scores, list):
        raise RowError("not a number", column, f"is {type(scores).__name__}, not a list of numbers")
    if len(scores) != num_completions:
        raise RowError("length", column, f"has {len(scores)} entries for {num_completions} completions")
    return [check_number(score, column) for score in scores]


def check_number(score: Any, column: str) -> float:
    """The number as a batch holds it, in single precision, so that what is equal there is seen to be equal here."""
    if isinstance(score, str):
        raise RowError("text score", column, f"must hold finite numbers, got the text {score!r:.40}")
    if not isinstance(score, int | float) or not -math.inf < score < math.inf:
        raise RowError("not a number", column, f"holds {score!r:.40}, which is not a finite number")
    if abs(score) > LARGEST_SCORE:
        raise RowError("not a number", column, f"holds {score!r:.40}, which is too large for single precision")
    return float(np.float32(score))


def _pair_scores(row: Mapping[str, Any], options: RowOptions) -> tuple[list[float], bool]:
    """Scores of a preference row's two answers, and whether they are its own."""
    columns = ("score_chosen", "score_rejected")
    scores = [row.get(column) for column in columns]
    if not (options.score_values or options.score_columns) or (not options.score_values and None in scores):
        return [1.0, 0.0], False
    for score, column in zip(scores, columns, strict=True):
        if score is None:
            raise RowError("missing", column, "is missing, and this loss needs the size of the scores")
    scores = [check_number(score, column) for score, column in zip(scores, columns, strict=True)]
    if scores[0] < scores[1] or (options.score_values and scores[0] == scores[1]):
        raise RowError("out of order", "score_chosen", f"({scores[0]}) is not above the rejected {scores[1]}")
    return scores, True


def parse_row(row: Mapping[str, Any], options: RowOptions) -> tuple[Any, list, list[float], bool, Any]:
    """
    Read a row of any accepted format.

    Returns:
        `tuple`: prompt, the K candidates, their K scores, whether these are the row's own, and the regulariser's own
        target or `None`.

    Raises:
        RowError: naming the column and what is wrong with it.
    """
    if "completions" in row:
        candidates = row["completions"]
        if not isinstance(candidates, list):
            raise RowError("not text", "completions", f"is {type(candidates).__name__}, not a list")
        columns = [f"completions[{index}]" for index in range(len(candidates))]
        scores, has_scores = check_scores(row.get("scores"), "scores", len(candidates)), True
    else:
        candidates = [row.get("chosen"), row.get("rejected")]
        columns = ["chosen", "rejected"]
        scores, has_scores = _pair_scores(row, options)
    if len(candidates) < options.min_completions:
        raise RowError(
            "too few", "completions", f"has {len(candidates)} entries where {options.min_completions} are needed"
        )

    reference = row.get("reference") if options.reference else None
    if options.expect_reference and reference is None and max(scores) == min(scores):
        if len(scores) > 1:
            raise RowError("no target", "reference", "is missing, and no candidate is better than another")
        if scores[0] <= 0:
            raise RowError("no target", "reference", f"is missing, and the only candidate scores {scores[0]}")
    texts = list(candidates) + ([reference] if reference is not None else [])
    columns = columns + ["reference"] * (reference is not None)
    for text, column in zip(texts, columns, strict=True):
        check_text(text, column, is_completion=True)
    if "completions" not in row and candidates[0] == candidates[1]:
        raise RowError("identical", "rejected", "is the same as 'chosen'")

    form = str if isinstance(texts[0], str) else list
    for text, column in zip(texts, columns, strict=True):
        if not isinstance(text, form):
            raise RowError("mixed", column, f"is {type(text).__name__} while {columns[0]!r} is {form.__name__}")
    prompt = row.get("prompt")
    if "prompt" in row:
        check_text(prompt, "prompt", is_completion=False)
    split = _split_text if form is str else _split_messages
    prompt, candidates, reference = split(prompt, candidates, reference, columns)
    texts = [*candidates, *([] if reference is None else [reference])]
    for text, column in zip(texts, columns, strict=True):
        check_text(text, column, is_completion=True)  # again: there may be nothing behind the prompt
    return prompt, candidates, scores, has_scores, reference


def prompt_of(row: Mapping[str, Any]) -> Any:
    """
    What a model is asked, as training on the row would see it: a prompt that is only implied by `chosen` and
    `rejected`, or that repeats the first message of these conversations as text, is read from them.

    Raises:
        RowError: they have none.
    """
    if isinstance(row.get("chosen"), str | list) and type(row.get("prompt")) is not type(row["chosen"]):
        return parse_row(row, RowOptions())[0]
    return row.get("prompt")
