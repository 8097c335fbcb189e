"""
Rows to prepared rows: tokenised once, checked, with a report of what was cut or dropped and why.

A prepared row has `prompt_ids`, `completion_ids` (list of lists), `scores` (one per candidate), `has_scores` (False
where the scores only say that `chosen` is better than `rejected`) and `target_index` (which of `completion_ids` is
the regulariser's target). A target that differs from all candidates is appended to `completion_ids`. One that equals
a candidate is not stored, and so not computed, twice.
"""

import contextlib
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .._trl import global_then_local_main_first
from .column_names import check_columns
from .columns import as_given, check_features, without_files
from .messages import template_kwargs
from .row_error import RowError, refusal
from .rows import RowOptions, parse_row
from .tokens import num_repeated_start_tokens, tokenize_candidates, tokenizer_of, without_end

logger = logging.getLogger(__name__)

# enters the fingerprint of prepared data: `datasets` hashes the functions of a module by name, and would go on using
# what another version of them has cached
_SOURCES = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))


PREPARED_BY = (
    f"trl_ext {hashlib.sha256(_SOURCES).hexdigest()[:16]}, "
    f"trl {version('trl')}, transformers {version('transformers')}"
)


PREPARED_FEATURES = Features(
    {
        "prompt_ids": List(Value("int64")),
        "completion_ids": List(List(Value("int64"))),
        "scores": List(Value("float64")),
        "has_scores": Value("bool"),
        "target_index": Value("int64"),
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
    Check, tokenise and truncate one row. `features` are those of its dataset, see [`~trl_ext.data.columns.as_given`].

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
    target_index = max(range(len(scores)), key=scores.__getitem__)
    if reference is not None:
        reference_ids = completion_ids.pop()
        if reference_ids in completion_ids:
            target_index = completion_ids.index(reference_ids)
        else:
            target_index = len(completion_ids)
            completion_ids.append(reference_ids)
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "scores": scores,
        "has_scores": has_scores,
        "target_index": target_index,
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
    "target_index": 0,
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
            "The main process was still tokenising when this one, which waited for it, timed out. Raise `ddp_timeout` "
            "(seconds), or tokenise with more processes (`dataset_num_proc`)."
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
        raise ValueError(f"The {name} dataset must have rows, got none. Check its file and split.")
    if is_prepared(columns):
        return dataset, None
    check_columns(columns, name)
    dataset = without_files(dataset, name)
    scores_of_pairs = ("score_chosen", "score_rejected") if options.score_values or options.score_columns else ()
    check_features(dataset.features, name, ("scores",) if "completions" in columns else scores_of_pairs)
    columns = dataset.column_names or columns
    if options.score_values and "completions" not in columns and "score_chosen" not in columns:
        raise ValueError(
            f"The {name} dataset must have scores, whose size this loss needs, got the columns {sorted(columns)}. Add "
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
