"""The command line and the config file of a recipe."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from ..runs.settings import changed_fields
from .arguments import (
    DATA_WITHOUT_MODEL,
    INSTEAD_OF,
    explained,
    read_config,
    refuse_unknown_options,
    typed_options,
    with_config_apart,
)


def imported(dataclass_types: Sequence[str | type]) -> tuple[type, ...]:
    """
    The classes that dotted names such as `"trl.ModelConfig"` stand for; classes stay what they are.

    A recipe names its dataclasses, so that its `--help` does not have to wait until they are imported.
    """

    def one(path: str) -> type:
        module, _, name = path.rpartition(".")
        return getattr(import_module(module), name)

    return tuple(one(entry) if isinstance(entry, str) else entry for entry in dataclass_types)


def parse_recipe_args(
    dataclass_types: Sequence[str | type], playground_config: str | Path, args: list[str] | None = None
) -> tuple[Any, ...]:
    """
    Parse a recipe's command line, with `--config file.yaml` for values kept in a file.

    Without a dataset, a model and a config file, the values of `playground_config` become the defaults, so that the
    recipe runs on the playground; anything given on the command line still wins. Unknown arguments, on the command
    line or in the file, are fatal.

    Args:
        dataclass_types (`Sequence[str | type]`): as for [`~trl.TrlParser`], or dotted names of them:
            [`~trl.ScriptArguments`], the trainer's config, [`~trl.ModelConfig`] and [`~trl.DatasetMixtureConfig`], in
            this order, and any further ones.
        playground_config (`str` or `Path`): YAML file of the playground's values.
        args (`list[str]`, *optional*): arguments, by default those of the command line.

    Returns:
        `tuple`: one object per dataclass.

    Raises:
        FileNotFoundError, ValueError, TypeError: see [`read_config`]; unknown arguments, data without a model, or a
            flag that would do nothing.
    """
    dataclass_types = imported(dataclass_types)
    args = with_config_apart(sys.argv[1:] if args is None else args)
    refuse_unknown_options(option_hints(dataclass_types), args)
    model, data, config = _model_data_and_config(args, dataclass_types)
    if not (model or data):
        if config is None:
            args = ["--config", str(playground_config), *args]
        elif Path(config).resolve() != Path(playground_config).resolve():
            raise ValueError(
                "The config file must name a model and data, got neither. Set `model_name_or_path` and "
                "`dataset_name`, or run the playground without `--config`."
            )
        parsed = parse_args(dataclass_types, args)
        script_args, training_args, _, dataset_args, *_ = parsed
        meaningless = [name for part in (script_args, dataset_args) for name in changed_fields(part)]
        meaningless += ["eval_strategy"] if training_args.eval_strategy != "no" else []
        if meaningless:
            raise ValueError(
                f"{', '.join(meaningless)} must not be set on the playground, which makes its own data and evaluates "
                "at the end. Remove the options, or set `--model_name_or_path` and `--dataset_name`."
            )
        return parsed
    if not model:
        raise ValueError(DATA_WITHOUT_MODEL)
    parsed = parse_args(dataclass_types, args)
    if parsed[0].ignore_bias_buffers:
        raise ValueError("`--ignore_bias_buffers` is a debugging switch of TRL's scripts that is not offered here.")
    return parsed


def parse_args(
    dataclass_types: Sequence[str | type], args: Sequence[str], values: dict[str, Any] | None = None
) -> tuple[Any, ...]:
    """
    One object per dataclass, given as such or by its dotted name. The command line wins over the config file.

    Args:
        dataclass_types (`Sequence[str | type]`): classes, or dotted names of them.
        args (`Sequence[str]`): command line that [`with_config_apart`] has been over.
        values (`dict`, *optional*): in place of what the file behind `--config` holds.

    Raises:
        FileNotFoundError, ValueError, TypeError: see [`read_config`]; or unknown arguments on the command line.
    """
    from trl import TrlParser

    dataclass_types, args = imported(dataclass_types), list(args)
    hints = option_hints(dataclass_types)
    refuse_unknown_options(hints, args)
    if "--config" in args:
        index = args.index("--config")
        file = args[index + 1]
        del args[index : index + 2]
        values = read_config(file, hints) if values is None else values
    values = dict(values or {})
    for name, others in INSTEAD_OF.items():
        if name in typed_options(args):
            values = {key: value for key, value in values.items() if key not in others}
    os.environ.update({key: str(value) for key, value in values.pop("env", {}).items()})

    class Parser(TrlParser):
        def error(self, message: str):
            raise ValueError(explained(message, hints))

    parser = Parser(dataclass_types)
    parser.set_defaults_with_config(**values)
    return parser.parse_args_into_dataclasses(args)


def option_hints(dataclass_types: Sequence[type]) -> dict[str, Any]:
    """Types of the options of dataclasses, by name."""
    hints = {one: get_type_hints(one) for one in dataclass_types}
    return {
        entry.name: of_one[entry.name]
        for one, of_one in hints.items()
        for entry in dataclasses.fields(one)
        if entry.init
    }


def _model_data_and_config(args: Sequence[str], dataclass_types: Sequence[type]) -> tuple[Any, Any, str | None]:
    """What the command line or its config file names as model and data, and the config file."""
    parser = argparse.ArgumentParser(add_help=False)
    for name in ("model_name_or_path", "dataset_name"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name)
    given, _ = parser.parse_known_args(args)
    config = args[args.index("--config") + 1] if "--config" in args else None
    values = {} if config is None else read_config(config, option_hints(dataclass_types))
    data = given.dataset_name or values.get("dataset_name") or values.get("datasets")
    return given.model_name_or_path or values.get("model_name_or_path"), data, config


def given_options(args: Sequence[str], config_file: str | Path | None = None) -> set[str]:
    """
    Names of the options that are set, whatever to: on the command line, or in the file behind its `--config`, or else
    in `config_file`.
    """
    import yaml

    args = with_config_apart(args)
    file = args[args.index("--config") + 1] if "--config" in args else config_file
    given = typed_options(args)
    return given if file is None else given | set(yaml.safe_load(Path(file).read_text(encoding="utf-8")))


def refuse_all_but(used: Sequence[str], *parts: Any) -> None:
    """
    Refuse arguments that would do nothing.

    Args:
        used (`Sequence[str]`): names of those that do something.
        parts: parsed dataclasses.

    Raises:
        ValueError: others are set.
    """
    idle = [name for part in parts for name in changed_fields(part) if name not in used]
    if idle:
        raise ValueError(f"{', '.join(idle)} must not be set here: nothing reads them. Remove the options.")
