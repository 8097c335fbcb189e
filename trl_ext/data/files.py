"""Local files of rows: read by `datasets` as their ending says, with messages that name the file and the line."""

import contextlib
import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
from datasets import load_dataset
from datasets.load import infer_module_for_data_files_list
from datasets.packaged_modules import _EXTENSION_TO_MODULE
from datasets.packaged_modules.csv.csv import Csv, CsvConfig

from .columns import TEXT_COLUMNS

# modules of `datasets` whose files hold rows, and their endings: what a name with such an ending is meant as
ROW_FORMATS = ("json", "csv", "parquet", "arrow", "text")
ROW_ENDINGS = tuple(ending for ending, (module, _) in _EXTENSION_TO_MODULE.items() if module in ROW_FORMATS)
COMPRESSED_ENDINGS = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")


def _text_cell(cell: str) -> str | None:
    return cell or None


@dataclass
class TextCsvConfig(CsvConfig):
    """
    As the `csv` module of `datasets` reads, except that only an empty cell is missing: the words None, NA and null are
    text, and columns of prompts and answers hold text whatever it looks like, numbers included.
    """

    keep_default_na: bool = False
    na_values: list = field(default_factory=lambda: [""])
    converters: dict = field(default_factory=lambda: dict.fromkeys((*TEXT_COLUMNS, "tools"), _text_cell))

    def create_config_id(self, config_kwargs: dict, custom_features: Any = None) -> str:
        """A name of its own in the cache, as the rows differ from those that `datasets` has read by itself."""
        return super().create_config_id({**config_kwargs, "keep_default_na": False}, custom_features)


@contextlib.contextmanager
def csv_as_text() -> Iterator[None]:
    """Within, `datasets` reads CSV and TSV files, wherever they are, with [`TextCsvConfig`]."""
    before, Csv.BUILDER_CONFIG_CLASS = Csv.BUILDER_CONFIG_CLASS, TextCsvConfig
    try:
        yield
    finally:
        Csv.BUILDER_CONFIG_CLASS = before


def names_a_file(path: Path) -> bool:
    """Whether the ending of a path is that of a file of rows, compressed or not."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in COMPRESSED_ENDINGS:
        endings.pop()
    return bool(endings) and endings[-1] in ROW_ENDINGS


def load_file(path: Path, streaming: bool) -> dict[str, Any]:
    """
    Load a file by its ending (compressed files too) as one split, `"train"`.

    Raises:
        ValueError: the ending is unknown, or the file is empty or damaged; names the file, and a broken line of JSON.
    """
    module, kwargs = infer_module_for_data_files_list([str(path)])
    if module is None:
        raise ValueError(
            f"The ending of a data file must be one of {', '.join(ROW_ENDINGS)} (or such a file compressed), got "
            f"{path.name!r}. Rename the file, or convert it."
        )
    data_files = {"train": glob.escape(str(path))}
    try:
        _refuse_blank(path)
        with csv_as_text():
            dataset = load_dataset(module, data_files=data_files, streaming=streaming, **kwargs)
        if module == "json" and not streaming:
            dataset["train"].data.validate(
                full=True
            )  # bytes that are not UTF-8 fail where they are read, far from here
    except Exception as error:  # of pyarrow's, pandas' and its own kinds; the first of them knows why
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        fault = fault_of(path)
        if fault is None and "corresponds to no data" in str(cause):
            fault = (
                f"A data file must hold rows, got {path}, which has none with a value. Add rows, or name another file."
            )
        if fault is None:
            fault = f"{path} cannot be read as a table of rows: {in_one_line(cause)}. Fix the file."
        raise ValueError(fault) from error
    if {".jsonl", ".ndjson"} & set(map(str.lower, path.suffixes)) and not streaming:
        _refuse_other_number_of_rows(path, len(dataset["train"]))
    return dataset


def fault_of(path: Path) -> str | None:
    """The first empty file, or broken line of JSON, of a file or a folder, in one line; `None` if there is none."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_file() or not names_a_file(file):
            continue
        try:
            _refuse_blank(file)
            if infer_module_for_data_files_list([str(file)])[0] == "json":
                _refuse_broken_json(file)
        except ValueError as error:
            return str(error)
        except Exception:  # of each compression's kind: not readable at all, which `datasets` says
            continue
    return None


def in_one_line(error: BaseException) -> str:
    """The first 200 characters of an error's message, or its kind."""
    return (" ".join(str(error).split())[:200] or type(error).__name__).rstrip(". ")


def _opened(path: Path) -> Any:
    return fsspec.open(str(path), "rb", compression="infer")


def _refuse_blank(path: Path) -> None:
    with _opened(path) as opened:
        if not any(chunk.strip() for chunk in iter(lambda: opened.read(1 << 20), b"")):
            raise ValueError(
                f"A data file must hold rows, got {path}, which is empty. Add rows, or name another file."
            )


def _refuse_broken_json(path: Path) -> None:
    """
    Raises:
        ValueError: naming the first line that is not JSON.
    """
    with _opened(path) as opened:
        content = opened.read()
    lines = content.splitlines()
    first = next(line for line in lines if line.strip())
    if not {".jsonl", ".ndjson"} & set(map(str.lower, path.suffixes)) and not _is_json(first):  # one value, over lines
        try:
            json.loads(content)
        except json.JSONDecodeError as error:
            raise ValueError(_broken(path, error.lineno, lines[error.lineno - 1], error)) from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} must hold JSON, got {in_one_line(error)}. Fix the file.") from None
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(_broken(path, number, line, error)) from None
        if not isinstance(value, dict) and len(lines) > 1:
            raise ValueError(_broken(path, number, line, None))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _broken(path: Path, number: int, line: bytes, error: Exception | None) -> str:
    shown = line.decode("utf-8", errors="replace").strip()
    shown = repr(shown if len(shown) <= 60 else shown[:60] + "...")
    why = "" if error is None else f" ({getattr(error, 'msg', None) or in_one_line(error)})"
    return f"Line {number} of {path} must be a JSON object, got {shown}{why}. Fix the line, or remove it."


def _refuse_other_number_of_rows(path: Path, num_rows: int) -> None:
    with _opened(path) as opened:
        num_lines = sum(bool(line.strip()) for line in opened)
    if num_lines != num_rows:  # a line that Arrow cannot hold may be taken for a table of its own
        _refuse_broken_json(path)
        raise ValueError(
            f"{path} must hold one JSON object on each line, got {num_rows} rows in {num_lines} lines. Give each "
            "column values of one type."
        )
