"""Command lines and config files, without the dataclasses of a recipe: torch and TRL are not imported."""

import os
import re
import reprlib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from ..runtime.settings import WIDER_THAN_DECLARED, did_you_mean, has_type, list_items, shown_hint

DATA_WITHOUT_MODEL = (
    "`--model_name_or_path` must be set where data is given. Set it to a Hub name or a folder. With neither a model "
    "nor data, the recipe runs its playground."
)

# option of the command line -> what it replaces in a config file, beside itself
INSTEAD_OF = {"dataset_name": ("datasets",), "rewards": ("ranker",), "ranker": ("rewards", "reward_weights")}


def with_config_apart(args: Sequence[str]) -> list[str]:
    """Arguments with `--config FILE` in two words, the only form that TrlParser knows."""
    args = list(args)
    for index, arg in enumerate(args):
        if arg.startswith("--config="):
            args[index : index + 1] = ["--config", arg.removeprefix("--config=")]
    if args and args[-1] == "--config":
        raise ValueError("`--config` must be a YAML file, got nothing. Write its path after it.")
    if args.count("--config") > 1:
        raise ValueError("`--config` must be given once. Put everything into one file.")
    return args


def typed_options(args: Iterable[str]) -> set[str]:
    """Names of the options on a command line."""
    given = {word[2:].partition("=")[0].replace("-", "_") for word in args if word.startswith("--")}
    return given | {name.removeprefix("no_") for name in given if name.startswith("no_")}


def refuse_unknown_options(known: Collection[str], args: Sequence[str]) -> None:
    """
    Refuse words of a command line that look like options and are none. A shortened name, which argparse would take for
    the whole one, is among them: it would not count where it matters which options were given.

    Raises:
        ValueError: the first of them, and what it may be meant for.
    """
    known = {*known, "config"}
    for word in args:
        name = word[2:].partition("=")[0].replace("-", "_")
        if word.startswith("--") and name not in known and name.removeprefix("no_") not in known:
            shown = word.partition("=")[0][:80]
            raise ValueError(f"Unknown option `{shown}`. {did_you_mean(name, known, '--')}")


def explained(message: str, hints: dict[str, Any]) -> str:
    """An error of argparse in one sentence: the option, what it must be, and what it is."""
    found = re.match(r"argument (--[\w-]+)[^:]*: (.*)", message, re.DOTALL)
    if found is None:
        return message
    option, what = found[1], " ".join(found[2].split())
    hint = hints.get(option[2:].replace("-", "_"), str)
    parts = get_args(hint) or (hint,)
    kind = "true or false" if bool in parts else shown_hint(hint)
    got = re.match(r"invalid choice: (.*) \(choose from (.*)\)$", what)
    if got is not None:
        return f"`{option}` must be one of {got[2]}, got {got[1]}."
    if what.startswith("expected"):
        return f"`{option}` must be {kind}, got nothing. Write `{option} {'true' if bool in parts else 'VALUE'}`."
    got = re.match(r"invalid .* value: (.*)", what) or re.match(r"Truthy value expected: got (.*) but expected", what)
    return f"`{option}` must be {kind}, got {got[1]}." if got is not None else f"`{option}`: {what}"


def read_config(file: str | Path, hints: dict[str, Any]) -> dict[str, Any]:
    """
    Read the values of a config file, each of which must be a field of its type; `env` holds environment variables.

    Args:
        file (`str` or `Path`): YAML.
        hints (`dict`): types of the options that may stand in it, by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, or holds no fields or unknown ones.
        TypeError: a value is not of its field's type.
    """
    import yaml

    if not os.path.isfile(file):
        raise FileNotFoundError(
            f"`--config` must be a YAML file, got {str(file)!r}, which is not there. Correct the path."
        )
    try:
        content = Path(file).read_text(encoding="utf-8")
        values = yaml.safe_load(content)
        scalars = [token for token in yaml.scan(content) if isinstance(token, yaml.ScalarToken)]
    except Exception as error:  # a value that is no value of its tag is raised in many ways
        what = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"The config file {file} cannot be read as YAML: {what}. Correct it.") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"The config file {file} must hold one `name: value` per line, got {reprlib.repr(values)}.")
    for scalar in scalars:  # text with half a character fails where it is first written, far from here
        if any("\ud800" <= character <= "\udfff" for character in scalar.value):
            raise ValueError(
                f"Line {scalar.start_mark.line + 1} of the config file {file} must hold whole characters, got "
                f"{ascii(scalar.value)[:100]} with half of one (a surrogate). Correct it."
            )
    unknown = next((key for key in values if key not in hints and key != "env"), None)
    if unknown is not None:
        raise ValueError(
            f"Unknown option {reprlib.repr(unknown)} in the config file {file}. {did_you_mean(unknown, hints)}"
        )
    if "env" in values and not _is_environment(values["env"]):
        raise TypeError(
            f"`env` in the config file {file} must be values by names of environment variables, got "
            f"{reprlib.repr(values['env'])}."
        )
    for key, value in values.items():
        if key in (*WIDER_THAN_DECLARED, "env"):
            continue
        # text is converted as on the command line is; one value stands for a list of one
        one_of_list = any(has_type(value, one) for one in list_items(hints[key]))
        if not isinstance(value, str) and key != "prefix_sharing" and not has_type(value, hints[key]) | one_of_list:
            raise TypeError(
                f"`{key}` in the config file {file} must be {shown_hint(hints[key])}, got {reprlib.repr(value)}. "
                "Correct it (put text that looks like something else in quotes), or remove it."
            )
    return values


def _is_environment(variables: Any) -> bool:
    """Whether these can be set as environment variables."""
    return isinstance(variables, dict) and all(
        isinstance(name, str) and name and "=" not in name and "\0" not in name + str(value)
        for name, value in variables.items()
    )
