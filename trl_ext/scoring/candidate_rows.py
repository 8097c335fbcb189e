"""Rows of candidates: the checks before they are scored."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..data.row_error import REMEDIES as ROW_REMEDIES
from ..data.row_error import RowError
from ..data.rows import check_number, check_text

# what can be wrong with a candidate row, beyond what can be wrong with other rows
REMEDIES = {
    **ROW_REMEDIES,
    "not a list": "Give it one entry per completion, or remove it.",
    "other games": "Remove `games`, or score the row with its judge again.",
}


def _check_row(row: Mapping[str, Any]) -> None:
    for column in ("prompt", "completions"):
        if row.get(column) is None:
            raise RowError("missing", column, f"is missing; the columns are {sorted(row)}")
    prompt, completions = row["prompt"], row["completions"]
    if not isinstance(completions, list):
        raise RowError("not text", "completions", f"is {type(completions).__name__}, not a list")
    check_text(prompt, "prompt", is_completion=False)
    for index, completion in enumerate(completions):
        column = f"completions[{index}]"
        try:
            check_text(completion, column, is_completion=True)
        except RowError as error:
            if error.problem != "empty":  # counted and left out later
                raise
        if not isinstance(completion, type(prompt)):
            form = type(prompt).__name__
            raise RowError("mixed", column, f"is {type(completion).__name__} while 'prompt' is {form}")
    for column in ("completion_ids", "token_ids", "logps", "num_tokens", "ends", "sources"):
        values = row.get(column)
        if values is not None and (not isinstance(values, list) or len(values) != len(completions)):
            given = f"{len(values)} entries" if isinstance(values, list) else type(values).__name__
            raise RowError("not a list", column, f"has {given} for {len(completions)} completions")
    for logp in row.get("logps") or []:
        if logp is not None:
            check_number(logp, "logps")


def _check_rows(rows: Sequence[Mapping[str, Any]], check: Callable) -> None:
    if not rows:
        raise ValueError("There must be rows of candidates, got none. Check the split they come from.")
    for index, row in enumerate(rows):
        try:
            check(row)
        except RowError as error:
            raise ValueError(f"Row {index}: {error}. {REMEDIES[error.problem]}") from None
