"""
Rows: which formats are accepted, what is wrong with a row, tokenisation, and what was cut or dropped and why.

Whatever comes in, one prompt with K completions comes out, tokenised. A preference pair is K = 2.

Accepted rows, plain text or conversational, in TRL's words:

- preference: `chosen`, `rejected`, optionally `prompt` (else the shared beginning of both is the prompt), `reference`
  (a target for the regulariser, of the same form as the answers), `score_chosen` and `score_rejected`;
- ranked: `prompt` (optional in the same way), `completions` (a list), `scores` (numbers, one per completion; K may
  differ between rows), optionally `reference`.

Conversations that repeat the prompt in front of every answer are understood too, with the prompt as messages or as the
text of the first user message. `tools` and `chat_template_kwargs` are passed to the chat template, as TRL does.

A sampled answer that was ended by its length alone gets no end token. A preference row says so by a true
`chosen_is_cut`, `rejected_is_cut` or `reference_is_cut`, a ranked row by "length" at the answer's place in `ends`.

A prepared row has `prompt_ids`, `completion_ids` (list of lists), `scores` (one per candidate), `has_scores` (False
where the scores only say that `chosen` is better than `rejected`) and `reference_index` (which of `completion_ids` is
the regulariser's target). A target that differs from all candidates is appended to
`completion_ids`, one that equals a candidate is not stored, and so not computed, twice.
"""

import contextlib
import hashlib
import inspect
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from . import __version__
from ._trl import _tokenize, common_prefix_length, global_then_local_main_first
from .column_names import check_columns
from .columns import as_given, check_features, without_files, without_nulls
from .tokens import num_repeated_start_tokens, text_ids, tokenizer_of

logger = logging.getLogger(__name__)

# enters the fingerprint of prepared data: `datasets` hashes the functions of a module by name, and would go on using
# what another version of them has cached
_SOURCES = b"".join(Path(__file__).with_name(file).read_bytes() for file in ("columns.py", "data.py", "tokens.py"))
PREPARED_BY = (
    f"trl_ext {__version__} {hashlib.sha256(_SOURCES).hexdigest()[:16]}, "
    f"trl {version('trl')}, transformers {version('transformers')}"
)

PREPARED_FEATURES = Features(
    {
        "prompt_ids": List(Value("int64")),
        "completion_ids": List(List(Value("int64"))),
        "scores": List(Value("float64")),
        "has_scores": Value("bool"),
        "reference_index": Value("int64"),
    }
)
# what a row has to say about its own preparation; read for the report, then removed
_NOTE_FEATURES = Features(
    {
        "_problem": Value("string"),
        "_detail": Value("string"),
        "_num_truncated": Value("int64"),
        "_boundary_moved": Value("bool"),
        "_start_repeated": Value("bool"),
        "_reference_missing": Value("bool"),
    }
)

# what can be wrong with a row -> what to do about it
REMEDIES = {
    "missing": "Fill it in, or leave the row out.",
    "not text": "Convert it to a string, or to a list of {'role': ..., 'content': ...} messages.",
    "mixed": "Give prompt and completions the same form: all strings, or all lists of messages.",
    "empty": "Leave out rows whose answer is empty.",
    "not an answer": "Let each completion be the assistant's turn, or let all of them repeat the whole prompt.",
    "ambiguous": "Add a `prompt` column, and leave the prompt out of the answers.",
    "identical": "Leave out pairs without a preference.",
    "length": "Give one score per completion.",
    "ends": "Give one entry per completion, or remove the column.",
    "too few": "Leave out prompts with fewer completions.",
    "text score": "Convert the column to numbers.",
    "not a number": "Scores must be finite numbers; leave out completions that could not be scored.",
    "out of order": "Let `chosen` be the one with the higher score.",
    "no target": "Add a `reference`, the task's own answer, or leave the row out.",
    "too long": "Raise `max_length` (None: no limit), or shorten the prompt.",
    "outside the window": "Lower `max_new_tokens`, or shorten the prompt.",
    "not renderable": "Check the row against the chat template.",
}


# of `apply_chat_template`: which template is applied to what, and how
RESERVED_TEMPLATE_KWARGS = {
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
    *("processing_class", "input", "prompt", "completions", "eos_token"),
} - {"documents", "kwargs", "tools"}
LARGEST_SCORE = float(np.finfo(np.float32).max)


class RowError(ValueError):
    """
    A row that cannot be used.

    Attributes:
        problem (`str`): a key of `REMEDIES`.
        column (`str`): the column at fault.
    """

    def __init__(self, problem: str, column: str, what: str):
        self.problem, self.column = problem, column
        super().__init__(f"column {column!r} {what}")


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


@dataclass
class PreparationReport:
    """What became of a dataset: how many rows came in, how many went out, and what happened on the way."""

    name: str
    num_rows: int
    num_prompts: int
    num_completions: int
    num_truncated: int
    max_length: int | None
    num_without_order: int
    num_boundary_moved: int
    num_reference_missing: int
    num_start_repeated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{self.name} data: {self.num_rows} rows -> {self.num_prompts} prompts, {self.num_completions} completions"
        ]
        if self.num_truncated:
            share = self.num_truncated / self.num_completions
            lines.append(f"cut at max_length={self.max_length}: {self.num_truncated} completions ({share:.1%})")
        for problem, count in sorted(self.dropped.items()):
            lines.append(f"dropped, {problem}: {count} rows")
        if self.num_without_order:
            lines.append(f"no two different scores, so nothing to rank: {self.num_without_order} prompts")
        if self.num_reference_missing:
            lines.append(f"no `reference`, so the best candidate stands in: {self.num_reference_missing} prompts")
        if self.num_boundary_moved:
            lines.append(
                f"prompt tokenised differently alone than with its completions: {self.num_boundary_moved} prompts; "
                "the completion starts where they diverge"
            )
        if self.num_start_repeated:
            lines.append(
                "prompt begins with the start token that the tokenizer adds as well: "
                f"{self.num_start_repeated} prompts; it is kept once"
            )
        return "\n  ".join(lines)

    @property
    def worth_a_warning(self) -> bool:
        """Whether something was cut, dropped or changed."""
        return len(str(self).splitlines()) > 1


def is_prepared(columns: list[str]) -> bool:
    """Whether a dataset with these columns has been through [`prepare_dataset`] already."""
    return set(PREPARED_FEATURES) <= set(columns)


def refuse_outside_window(num_tokens: int, max_new_tokens: int, window: int | None) -> None:
    """Raise a [`RowError`] if a prompt with its answer can exceed the model's window; all are numbers of tokens."""
    if window is not None and num_tokens + max_new_tokens > window:
        raise RowError(
            "outside the window",
            "prompt",
            f"has {num_tokens} tokens and with max_new_tokens={max_new_tokens} exceeds the model's window of {window}",
        )


def _check_text(value: Any, column: str, *, is_completion: bool) -> None:
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


def extract_shared_prompt(completions: list) -> tuple[Any, list]:
    """
    Split off the longest common beginning (of characters or of messages) as the prompt.

    For two completions this is `trl.extract_prompt`; here it takes any number. A space before the split goes with the
    completions.

    Returns:
        `tuple`: the prompt, and the completions without it.
    """
    shortest = min(len(completion) for completion in completions)
    split = max(shortest - 1, 0)  # every completion keeps something
    for position in range(split):
        if any(completion[position] != completions[0][position] for completion in completions):
            split = position
            break
    if split and completions[0][split - 1] == " ":
        split -= 1
    return completions[0][:split], [completion[split:] for completion in completions]


def _check_scores(scores: Any, column: str, num_completions: int) -> list[float]:
    if not isinstance(scores, list):
        raise RowError("not a number", column, f"is {type(scores).__name__}, not a list of numbers")
    if len(scores) != num_completions:
        raise RowError("length", column, f"has {len(scores)} entries for {num_completions} completions")
    return [_check_number(score, column) for score in scores]


def _check_number(score: Any, column: str) -> float:
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
    scores = [_check_number(score, column) for score, column in zip(scores, columns, strict=True)]
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
        scores, has_scores = _check_scores(row.get("scores"), "scores", len(candidates)), True
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
        _check_text(text, column, is_completion=True)
    if "completions" not in row and candidates[0] == candidates[1]:
        raise RowError("identical", "rejected", "is the same as 'chosen'")

    form = str if isinstance(texts[0], str) else list
    for text, column in zip(texts, columns, strict=True):
        if not isinstance(text, form):
            raise RowError("mixed", column, f"is {type(text).__name__} while {columns[0]!r} is {form.__name__}")
    prompt = row.get("prompt")
    if "prompt" in row:
        _check_text(prompt, "prompt", is_completion=False)
    split = _split_text if form is str else _split_messages
    prompt, candidates, reference = split(prompt, candidates, reference, columns)
    texts = [*candidates, *([] if reference is None else [reference])]
    for text, column in zip(texts, columns, strict=True):
        _check_text(text, column, is_completion=True)  # again: there may be nothing behind the prompt
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


def _split_text(prompt: Any, candidates: list[str], reference: str | None, columns: list[str]):
    """Prompt, candidates and reference of a plain-text row, whose prompt may be implicit."""
    if prompt is None:
        if len(candidates) == 1:
            raise RowError("ambiguous", columns[0], "is the only one, so that nothing tells where its prompt ends")
        prompt, candidates = extract_shared_prompt(candidates)
        if reference is not None:
            if not _begins_with(reference, prompt):
                # it may lack the prompt, or share less of the answer than the candidates do: we cannot tell
                raise RowError("ambiguous", "reference", f"does not begin with {prompt!r:.60}, as all candidates do")
            reference = reference[len(prompt) :]
    elif not isinstance(prompt, str):
        raise RowError("mixed", "prompt", f"is {type(prompt).__name__} while {columns[0]!r} is str")
    return prompt, candidates, reference


def _split_messages(prompt: Any, candidates: list[list], reference: list | None, columns: list[str]):
    """
    Prompt, candidates and reference of a conversational row.

    The prompt may be implicit, and may be repeated in front of every candidate.
    """
    if isinstance(prompt, str):
        # the text of the first user message, which all conversations repeat
        if not all(_first_user_text(messages) == prompt for messages in candidates):
            raise RowError("mixed", "prompt", f"is str while {columns[0]!r} is list")
        prompt = None
    if prompt is None:
        prompt, candidates = extract_shared_prompt(candidates)
        if not prompt:
            raise RowError("missing", "prompt", "is missing, and the completions share no first message")
    else:
        if all(_begins_with(messages, prompt) for messages in candidates):
            candidates = [messages[len(prompt) :] for messages in candidates]
    if reference is not None and _begins_with(reference, prompt):
        reference = reference[len(prompt) :]
    for messages, column in zip([*candidates, *([reference] if reference else [])], columns, strict=False):
        if messages and messages[0]["role"] in ("user", "system"):
            raise RowError(
                "not an answer",
                column,
                f"begins with a message of the {messages[0]['role']} and does not go on from the prompt",
            )
    return prompt, candidates, reference


def _first_user_text(messages: list[Mapping]) -> str | None:
    content = next((message.get("content") for message in messages if message["role"] == "user"), None)
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    return content


def _begins_with(text: str | list, beginning: str | list) -> bool:
    return bool(beginning) and without_nulls(text[: len(beginning)]) == without_nulls(beginning)


def template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    """
    What a row has to say to the chat template: `tools`, which may be JSON, and `chat_template_kwargs`.

    Raises:
        RowError: they are no such thing, or would say how the template is applied, or which one.
    """
    tools, kwargs = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise RowError("not renderable", "tools", f"holds {tools!r:.40}, which is not JSON ({error})") from None
    if not isinstance(tools, list | None):
        raise RowError("not renderable", "tools", f"is {type(tools).__name__}, not a list of tools")
    if kwargs is not None and (not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs)):
        raise RowError("not renderable", "chat_template_kwargs", f"is {type(kwargs).__name__}, not names with values")
    # `None` is what a table fills in
    kwargs = {k: v for k, v in (kwargs or {}).items() if v is not None or k not in RESERVED_TEMPLATE_KWARGS}
    reserved = sorted(RESERVED_TEMPLATE_KWARGS & set(kwargs))
    if reserved:
        raise RowError(
            "not renderable", "chat_template_kwargs",
            f"has {', '.join(reserved)}, which is not for a row to say but for the tokenizer and the trainer",
        )  # fmt: skip
    return {"tools": tools, **kwargs}


def tokenize_candidates(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    prompt: str | list,
    completions: list,
    *,
    eos_token: str | None = None,
    **chat_template_kwargs,
) -> tuple[list[int], list[list[int]], bool]:
    """
    Tokenise a prompt with its completions.

    Prompt and completion are tokenised together, and the completions start where the first of them leaves the
    tokenised prompt: the shortest common prefix over all of them. With two completions these are exactly the ids of
    TRL's `DPOTrainer`.

    Returns:
        `tuple`: prompt ids, one list of ids per completion, and whether the prompt lost tokens at its end because
        alone it is tokenised differently.
    """
    if isinstance(prompt, list):
        prompt_ids = _tokenize(processing_class, prompt, add_generation_prompt=True, **chat_template_kwargs)[
            "input_ids"
        ]
        full_ids = [_tokenize(processing_class, prompt + c, **chat_template_kwargs)["input_ids"] for c in completions]
    else:
        if eos_token is not None:
            completions = [c if c.endswith(eos_token) else c + eos_token for c in completions]
        prompt_ids = text_ids(processing_class, prompt)
        full_ids = [text_ids(processing_class, prompt + c) for c in completions]
    prompt_length = min(common_prefix_length(prompt_ids, ids) for ids in full_ids)
    return prompt_ids[:prompt_length], [ids[prompt_length:] for ids in full_ids], prompt_length < len(prompt_ids)


def without_end(completion_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    Tokens of an answer without the special tokens at its end (of the end token's or the chat template's), and without
    white space between and behind these.
    """
    # those of the template alone need not be among the tokenizer's named ones
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    end = len(completion_ids)
    for index in range(len(completion_ids) - 1, -1, -1):
        if completion_ids[index] in special:
            end = index
        elif tokenizer.decode(completion_ids[index]).strip():
            break
    return completion_ids[:end]


def _are_cut(row: Mapping[str, Any], num_candidates: int) -> list[bool]:
    """Whether each candidate was sampled and ended by its length alone, so that its end token was never sampled."""
    if "completions" not in row:
        return [bool(row.get(f"{side}_is_cut")) for side in ("chosen", "rejected")]
    ends = row.get("ends")
    if ends is None:
        return [False] * num_candidates
    if not isinstance(ends, list) or len(ends) != num_candidates:
        given = f"{len(ends)} entries" if isinstance(ends, list) else type(ends).__name__
        raise RowError("ends", "ends", f"has {given} for {num_candidates} completions")
    return [end == "length" for end in ends]


def prepare_row(
    row: Mapping[str, Any], processing_class, options: RowOptions, features: Features | None = None
) -> dict[str, Any]:
    """
    Check, tokenise and truncate one row. `features` are those of its dataset, see [`~trl_ext.columns.as_given`].

    Returns:
        `dict` with the columns of `PREPARED_FEATURES` and the notes for the report.

    Raises:
        RowError: the row cannot be used.
    """
    row = as_given(row, features)
    prompt, candidates, scores, has_scores, reference = parse_row(row, options)
    names = ["chosen", "rejected"] if "completions" not in row else [f"completions[{i}]" for i in range(len(scores))]
    are_cut = _are_cut(row, len(scores))
    if options.best_only:
        best = max(range(len(scores)), key=scores.__getitem__)
        candidates, scores, names, are_cut = [candidates[best]], [scores[best]], [names[best]], [are_cut[best]]
    targets = candidates if reference is None else [*candidates, reference]
    kwargs = template_kwargs(row)
    try:
        prompt_ids, completion_ids, boundary_moved = tokenize_candidates(
            processing_class, prompt, targets, eos_token=options.eos_token, **kwargs
        )
    except Exception as error:  # a chat template raises what it likes
        raise RowError("not renderable", "prompt", f"could not be tokenised: {error}") from error

    are_cut += [] if reference is None else [bool(row.get("reference_is_cut"))]
    for index, is_cut in enumerate(are_cut):
        if is_cut:
            completion_ids[index] = without_end(completion_ids[index], tokenizer_of(processing_class))

    num_truncated = 0
    if options.max_length is not None:
        room = options.max_length - len(prompt_ids)
        if room <= 0:
            raise RowError(
                "too long", "prompt", f"has {len(prompt_ids)} tokens and fills max_length={options.max_length}"
            )
        num_truncated = sum(len(ids) > room for ids in completion_ids)
        completion_ids = [ids[:room] for ids in completion_ids]
    for index, ids in enumerate(completion_ids):
        if not ids:
            raise RowError("empty", [*names, "reference"][index], "has no tokens left after tokenisation")
    if names[-1] == "rejected" and completion_ids[0] == completion_ids[1]:
        cut = " once cut at max_length" if num_truncated else ""
        raise RowError("identical", "rejected", f"has the same tokens as 'chosen'{cut}")

    # y_ref: the row's own target, computed only once if it equals a candidate; else the best candidate
    reference_index = max(range(len(scores)), key=scores.__getitem__)
    if reference is not None:
        reference_ids = completion_ids.pop()
        if reference_ids in completion_ids:
            reference_index = completion_ids.index(reference_ids)
        else:
            reference_index = len(completion_ids)
            completion_ids.append(reference_ids)
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "scores": scores,
        "has_scores": has_scores,
        "reference_index": reference_index,
        "_problem": None,
        "_detail": None,
        "_num_truncated": num_truncated,
        "_boundary_moved": boundary_moved,
        "_start_repeated": num_repeated_start_tokens(processing_class, prompt) > 0,
        "_reference_missing": options.reference
        and ("reference" in row or options.expect_reference)
        and reference is None,
    }


_NOTHING = {
    "prompt_ids": [],
    "completion_ids": [],
    "scores": [],
    "has_scores": True,
    "reference_index": 0,
    "_num_truncated": 0,
    "_boundary_moved": False,
    "_start_repeated": False,
    "_reference_missing": False,
}


def _prepare_row_or_note(row, processing_class, options, features, prepared_by) -> dict[str, Any]:
    try:
        return prepare_row(row, processing_class, options, features)
    except RowError as error:
        return {**_NOTHING, "_problem": error.problem, "_detail": str(error)}


class _StreamedRows:
    """
    Prepares the rows of a stream as they are read, and says what it does to them.

    Dropped rows are named one by one. Cuts are counted, and said when their number reaches 1, 10, 100, ... Each
    process and each worker of a data loader speaks for the rows it reads.
    """

    def __init__(self, processing_class, options: RowOptions, name: str, drop: bool, features: Features | None = None):
        self.processing_class, self.options, self.name, self.drop = processing_class, options, name, drop
        self.features = features
        self.num_truncated = self.num_boundary_moved = self.num_reference_missing = self.num_start_repeated = 0

    def __call__(self, row, index) -> dict[str, Any]:
        try:
            prepared = prepare_row(row, self.processing_class, self.options, self.features)
        except RowError as error:
            if not self.drop:
                raise ValueError(refusal(self.name, None, {error.problem: [(index, str(error))]})) from None
            logger.warning(f"{self.name} data: row {index} dropped, {error}")
            return {**_NOTHING, "_problem": error.problem, "_detail": str(error)}
        for attribute, note, what in (
            ("num_truncated", "_num_truncated", f"completions cut at max_length={self.options.max_length}"),
            ("num_boundary_moved", "_boundary_moved", "prompts tokenised differently alone than with completions"),
            (
                "num_start_repeated",
                "_start_repeated",
                "prompts begin with the start token, kept once",
            ),
            ("num_reference_missing", "_reference_missing", "rows without `reference`: the best candidate stands in"),
        ):
            before, after = getattr(self, attribute), getattr(self, attribute) + int(prepared[note])
            setattr(self, attribute, after)
            if len(str(after)) > len(str(before)) or (before == 0 < after):
                logger.warning(f"{self.name} data: so far {after} {what}")
        return prepared


def _is_usable(row) -> bool:
    return row["_problem"] is None


def refusal(name: str, num_rows: int | None, problems: dict[str, list[tuple[int, str]]]) -> str:
    """The message about rows that cannot be used: for each problem their numbers and details."""
    count = sum(len(rows) for rows in problems.values())
    of_all = f"{count} of {num_rows} rows" if num_rows is not None else "a row"
    lines = [f"The {name} dataset has {of_all} that cannot be used:"]
    for problem, rows in problems.items():
        index, detail = rows[0]
        others = ", ".join(str(other) for other, _ in rows[1:10]) + (", ..." if len(rows) > 10 else "")
        more = f" ({len(rows) - 1} more like it: {others})" if len(rows) > 1 else ""
        lines.append(f"  row {index}: {detail}{more}. {REMEDIES[problem]}")
    lines.append('Mend the data, or set on_invalid_row="drop" to leave such rows out; they are counted and reported.')
    return "\n".join(lines)


@contextlib.contextmanager
def _main_process_first():
    """`global_then_local_main_first`, with a message for those that have waited for too long."""
    is_my_turn = False
    try:
        with global_then_local_main_first():
            is_my_turn = True
            yield
    except RuntimeError as error:
        if is_my_turn or "Timed out" not in str(error):
            raise
        raise RuntimeError(
            "The main process was still tokenising when the time-out of this one, which waited for it, was over. "
            "Raise `ddp_timeout` (seconds), or tokenise with more processes by `dataset_num_proc`."
        ) from error


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    options: RowOptions,
    *,
    name: str,
    num_proc: int | None = None,
    on_invalid_row: str = "error",
    keep_columns: bool = False,
) -> tuple[Dataset | IterableDataset, PreparationReport | None]:
    """
    Check, tokenise and truncate a dataset. A dataset that is prepared already is returned as it is.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows in an accepted format. A stream is prepared row by row as it is read, and refused or reported on then.
        processing_class:
            Tokenizer, or processor with one.
        options ([`RowOptions`]):
            What the trainer wants.
        name (`str`):
            How messages call the dataset, such as `"train"`.
        num_proc (`int`, *optional*):
            Processes to tokenise with; not for streams.
        on_invalid_row (`str`, defaults to `"error"`):
            `"error"`: any row that cannot be used stops everything, with a list. `"drop"`: such rows are left out and
            counted.
        keep_columns (`bool`, defaults to `False`):
            Whether the other columns are kept.

    Returns:
        `tuple`: the prepared dataset, and the report (`None` for a stream and for a dataset that was prepared before).

    Raises:
        ValueError: missing columns or unusable rows, naming row, column and remedy; or nothing is left.
        NotImplementedError: rows with images.
    """
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if not columns or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError(f"The {name} dataset has no rows. Give it some.")
    if is_prepared(columns):
        return dataset, None
    check_columns(columns, name)
    dataset = without_files(dataset, name)
    scores_of_pairs = ("score_chosen", "score_rejected") if options.score_values or options.score_columns else ()
    check_features(dataset.features, name, ("scores",) if "completions" in columns else scores_of_pairs)
    columns = dataset.column_names or columns
    if options.score_values and "completions" not in columns and "score_chosen" not in columns:
        raise ValueError(
            f"The {name} dataset has the columns {sorted(columns)}: this loss needs the size of the scores. Add "
            "`score_chosen` and `score_rejected`, or use `completions` with `scores`."
        )
    map_kwargs = {"remove_columns": None if keep_columns else columns}
    features = Features({**PREPARED_FEATURES, **_NOTE_FEATURES})
    if keep_columns and dataset.features is not None:
        features = Features({**dataset.features, **features})
    if not keep_columns or dataset.features is not None:
        map_kwargs["features"] = features

    if isinstance(dataset, IterableDataset):
        prepare = _StreamedRows(
            processing_class, options, name, drop=on_invalid_row == "drop", features=dataset.features
        )
        dataset = dataset.map(prepare, with_indices=True, **map_kwargs)
        return dataset.filter(_is_usable).remove_columns(list(_NOTE_FEATURES)), None

    with _main_process_first():
        noted = dataset.with_format(None).map(
            _prepare_row_or_note,
            fn_kwargs={
                "processing_class": processing_class,
                "options": options,
                "features": dataset.features,
                "prepared_by": PREPARED_BY,
            },
            num_proc=num_proc,
            desc=f"Tokenizing {name} dataset",
            **map_kwargs,
        )
    problems: dict[str, list[tuple[int, str]]] = {}
    for index, (problem, detail) in enumerate(zip(noted["_problem"], noted["_detail"], strict=True)):
        if problem is not None:
            problems.setdefault(problem, []).append((index, detail))
    if problems and on_invalid_row == "error":
        raise ValueError(refusal(name, len(noted), problems))
    prepared = noted
    if problems:
        unusable = {index for rows in problems.values() for index, _ in rows}
        prepared = noted.select([index for index in range(len(noted)) if index not in unusable])
    if len(prepared) == 0:
        raise ValueError(refusal(name, len(noted), problems))
    report = PreparationReport(
        name=name,
        num_rows=len(noted),
        num_prompts=len(prepared),
        num_completions=sum(len(ids) for ids in prepared["completion_ids"]),
        num_truncated=sum(prepared["_num_truncated"]),
        max_length=options.max_length,
        num_without_order=0 if options.best_only else sum(len(set(scores)) == 1 for scores in prepared["scores"]),
        num_boundary_moved=sum(prepared["_boundary_moved"]),
        num_reference_missing=sum(prepared["_reference_missing"]),
        num_start_repeated=sum(prepared["_start_repeated"]),
        dropped={problem: len(rows) for problem, rows in problems.items()},
    )
    if PartialState().is_main_process:
        logger.log(logging.WARNING if report.worth_a_warning else logging.INFO, str(report))
    return prepared.remove_columns(list(_NOTE_FEATURES)), report
