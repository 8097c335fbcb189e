"""Files of JSON lines."""

import json
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from .files import write_atomically


def read_jsonl(path: str | Path) -> list[dict]:
    """Rows of a file, one from each line."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_jsonl(path: Path, rows: Sequence[dict]) -> None:
    """Write rows, by the main process: the whole file or nothing."""
    if PartialState().is_main_process:
        write_atomically(path, as_jsonl(rows))


def as_jsonl(rows: Sequence[dict]) -> str:
    """Text with one line for each row."""
    return "".join(json.dumps(row) + "\n" for row in rows)
