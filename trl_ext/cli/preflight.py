"""
What a recipe looks at before it imports torch and TRL, which takes many seconds: options, config file, paths, columns.

The options are known without their dataclasses (see `cli/options.py`). What these check themselves comes later.
"""

import argparse
import csv
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ..data.column_names import check_columns
from ..runtime.model_folders import refuse_without_tokenizer
from ..runtime.settings import list_items
from .arguments import (
    DATA_WITHOUT_MODEL,
    INSTEAD_OF,
    explained,
    read_config,
    refuse_unknown_options,
    typed_options,
    with_config_apart,
)
from .options import Option, options_of

LOOKED_AT = 4 << 20  # bytes of a data file
TYPES = {"Any": Any, "Literal": Literal}


def check_before_imports(dataclass_types: Sequence[str], args: Sequence[str]) -> None:
    """
    Find mistakes in a recipe's command line that can be found without its dataclasses.

    Args:
        dataclass_types (`Sequence[str]`): dotted names of the recipe's dataclasses.
        args (`Sequence[str]`): the command line.

    Raises:
        FileNotFoundError, ValueError, TypeError: as [`parse_recipe_args`] raises, and for paths and columns.
    """
    args = with_config_apart(args)
    options = options_of(*dataclass_types)
    hints = {name: _hint(option) for name, option in options.items()}
    refuse_unknown_options(hints, args)
    values: dict[str, Any] = {}
    if "--config" in args:
        index = args.index("--config")
        values = read_config(args[index + 1], hints)
        del args[index : index + 2]
    for name, others in INSTEAD_OF.items():
        if name in typed_options(args):
            values = {key: value for key, value in values.items() if key not in others}
    values |= _typed_values(args, hints, options)
    _check_model_and_data(values, any(path.endswith("SampleAndRankConfig") for path in dataclass_types))
    _check_paths(values)
    _check_columns(values, dataclass_types)


def _hint(option: Option) -> Any:
    """An option's type, as far as it is known without importing; `None` may be any option's value in a file."""
    try:
        hint = eval(option.type, TYPES)
        return hint if isinstance(option.default, bool) else hint | None
    except (NameError, TypeError):
        return Any


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def _typed_values(args: Sequence[str], hints: dict[str, Any], options: dict[str, Option]) -> dict[str, Any]:
    """Values on the command line."""
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, hint in hints.items():
        names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parts = {part for part in get_args(hint) or (hint,) if part is not type(None)}
        how: dict[str, Any] = {"dest": name}
        if parts == {bool}:
            how |= {"type": _bool} if type(None) in get_args(hint) else {"type": _bool, "nargs": "?", "const": True}
            parser.add_argument(*(one.replace("--", "--no_", 1) for one in names), action="store_false", dest=name)
        elif list_items(hint):
            several = parts == {next(iter(parts))} and list_items(hint)[0] in (int, float)
            how |= {"nargs": "+" if len(parts) == 1 else "*", "type": list_items(hint)[0] if several else str}
        elif parts in ({int}, {float}):
            how["type"] = next(iter(parts))
        elif not parts <= {str, dict} and not any(get_origin(part) is dict for part in parts):
            how["nargs"] = "*"
        if options[name].choices is not None and parts == {str}:
            how["choices"] = options[name].choices
        parser.add_argument(*names, **how)
    try:
        values, left = parser.parse_known_args(list(args))
    except ValueError as error:
        message = explained(str(error), hints)
        raise ValueError(message) from None
    if left:
        raise ValueError(f"The command line must hold options, got the word {left[0]!r:.80}. Options begin with `--`.")
    return vars(values)


def _bool(text: str) -> bool:
    if text.lower() not in ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"):
        raise ValueError
    return text.lower() in ("yes", "true", "t", "y", "1")


def _check_model_and_data(values: dict[str, Any], needs_both: bool) -> None:
    model, data = values.get("model_name_or_path"), values.get("dataset_name") or values.get("datasets")
    if needs_both and not (model or data):
        raise ValueError("`--model_name_or_path` and `--dataset_name` must be set, got neither.")
    if data and not model:
        raise ValueError(DATA_WITHOUT_MODEL)
    if model and not data:
        raise ValueError(
            "`--dataset_name` must be set where a model is given. Set it to a Hub name, a local file or a folder. "
            "With neither a model nor data, the recipe runs its playground."
        )


def _check_paths(values: dict[str, Any]) -> None:
    """Refuse local paths that are not there."""
    for name, kind in (("model_name_or_path", "folder"), ("dataset_name", "file or folder")):
        path = values.get(name)
        if isinstance(path, str) and _is_local(path) and not os.path.exists(os.path.expanduser(path)):
            raise FileNotFoundError(
                f"`{name}` must be a Hub name or a local {kind}, got {path!r}, which is not there. Correct the path."
            )
    model = os.path.expanduser(str(values.get("model_name_or_path") or ""))
    if os.path.isdir(model) and not any(
        os.path.isfile(os.path.join(model, file)) for file in ("config.json", "adapter_config.json")
    ):
        raise FileNotFoundError(
            f"`model_name_or_path` must be the folder of a model, got {model!r}, which has neither config.json nor "
            "adapter_config.json. Name the folder that `save_pretrained` has written."
        )
    if os.path.isdir(model) and not os.path.isfile(os.path.join(model, "adapter_config.json")):
        refuse_without_tokenizer(model)
    for name in ("rewards", "ranker", "judge"):
        value = values.get(name)
        for spec in value if isinstance(value, list) else [value]:
            file, _, function = str(spec).rpartition(":")
            if function and file.endswith(".py") and not os.path.isfile(os.path.expanduser(file)):
                raise FileNotFoundError(f"`{name}` must name a file that exists, got {spec!r}. Correct the path.")
    deepspeed = values.get("deepspeed")
    if isinstance(deepspeed, str) and deepspeed and not deepspeed.lstrip().startswith("{"):
        if not os.path.isfile(deepspeed):
            raise FileNotFoundError(f"`deepspeed` must be a JSON file, got {deepspeed!r:.80}, which is not there.")


def _is_local(path: str) -> bool:
    """Whether a name cannot be one of the Hub."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith((".json", ".jsonl", ".csv"))


def _check_columns(values: dict[str, Any], dataclass_types: Sequence[str]) -> None:
    path = Path(str(values.get("dataset_name") or "")).expanduser()
    columns = columns_of(path) if path.is_file() else None
    if columns is None:
        return
    names = " ".join(dataclass_types)
    prompts_alone = re.search("SampleAndRank|Comparison|RLOO", names) or values.get("num_rounds")
    if prompts_alone:
        if "prompt" not in columns and not {"chosen", "rejected"} <= columns:
            raise ValueError(
                f"The dataset must have a column `prompt` to sample answers for, got {sorted(columns)}. Rename or add "
                "one."
            )
        return
    if "SPIN" in names and not columns & {"chosen", "rejected", "completions"}:
        if "messages" not in columns and not {"prompt", "completion"} <= columns:
            raise ValueError(
                f"The dataset must have `prompt` and `completion` (the real answer), or `messages` that end with it, "
                f"got {sorted(columns)}. Rename or add the columns."
            )
        return
    if "prompt_ids" in columns or ("KTO" in names and {"completion", "label"} <= columns):
        return  # rows that are tokenised; single answers
    check_columns(sorted(columns), "train")


def columns_of(path: Path) -> set[str] | None:
    """
    Names of the columns in the first 4 MiB of a `.jsonl` or `.csv` file; `None` of any other, or if it is not told.

    Raises:
        ValueError: the file is empty, or a line is not JSON.
    """
    if path.suffix not in (".jsonl", ".csv"):
        return None
    with path.open("rb") as opened:
        content = opened.read(LOOKED_AT)
        is_whole = not opened.read(1)
    if not content.strip():
        raise ValueError(f"A data file must hold rows, got {path}, which is empty. Add rows, or name another file.")
    lines = content.splitlines()
    if path.suffix == ".csv":
        try:
            return set(next(csv.reader([lines[0].decode("utf-8-sig")])))
        except (ValueError, csv.Error, StopIteration):
            return None
    columns: set[str] = set()
    for number, line in enumerate(lines if is_whole else lines[:-1], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if not columns:  # one value over several lines
                return None
            why = f"{error!s:.100}"
            raise ValueError(f"Line {number} of {path} must be JSON, got {why}. Fix the line, or remove it.") from None
        if not isinstance(row, dict):
            return None
        columns |= set(row)
    return columns or None
