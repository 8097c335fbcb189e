"""
The options of a recipe, known without importing its dataclasses: that takes many seconds, with TRL and torch.

`options.json` holds what the imported classes say, with the versions and files that they come from. Where the
installed ones differ, as with another TRL, another process imports the classes, and the user's cache keeps the result.
"""

import ast
import contextlib
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..runtime.files import write_atomically

PACKAGE = Path(__file__).parents[1]
SHIPPED = Path(__file__).with_name("options.json")
MARK = "options: "  # before what another process has found


@dataclass(frozen=True)
class Option:
    """
    A field of a dataclass, as an option of the command line.

    Attributes:
        name (`str`): of the field.
        type (`str`): its annotation, without `None`; `str` for an enumeration, see `choices`.
        help (`str`): what the field's metadata or else the docstring of its class says; empty if neither does.
        default (`Any`): `MISSING` if it has to be given, of an enumeration the value of its member.
        choices (`list`, *optional*): what it can be set to.
    """

    name: str
    type: str
    help: str
    default: Any = field(default_factory=lambda: MISSING)
    choices: list[Any] | None = None


@dataclass(frozen=True, eq=False)
class OptionClass:
    """
    A dataclass as it is written, without what it inherits.

    Attributes:
        name (`str`): of the class.
        package (`str`): it comes from.
        own (`tuple[Option, ...]`): the options that it declares, in order.
        unused_fields (`dict[str, str]`, *optional*): names of inherited options that it refuses, and what to set
            instead; `None` if it says nothing about that.
    """

    name: str
    package: str
    own: tuple[Option, ...]
    unused_fields: dict[str, str] | None


# of each dotted name of a dataclass the class itself and all that it inherits, in the order in which Python searches
Classes = Mapping[str, Sequence[OptionClass]]


def recipe_dataclasses(file: Path) -> tuple[str, ...]:
    """
    The dotted names that a recipe's file has as `DATACLASSES`.

    Raises:
        ValueError: it has none, or not as texts.
    """
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(getattr(one, "id", None) == "DATACLASSES" for one in node.targets):
            try:
                return tuple(ast.literal_eval(node.value))
            except (TypeError, ValueError):
                break
    raise ValueError(
        f"{file} does not say which options it has. Set DATACLASSES to the dotted names of its dataclasses."
    )


@functools.cache
def load_classes(*paths: str) -> Classes:
    """
    The classes that dotted names such as `"trl.ModelConfig"` stand for, from the first of these that is up to date:
    `options.json`, the user's cache, the classes themselves (imported by another process, which takes many seconds).

    Raises:
        ImportError: the classes cannot be imported.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "trl_ext")
    cached = cache / f"options-{hashlib.sha256(' '.join(paths).encode()).hexdigest()[:16]}.json"
    for file in (SHIPPED, cached) if cached.is_absolute() else (SHIPPED,):
        try:
            table = json.loads(file.read_text(encoding="utf-8"))
            if set(paths) <= set(table["paths"]) and _is_current(table):
                return classes_in(table)
        except (OSError, ValueError, LookupError, TypeError):  # of the cache: not there, or damaged
            continue
    done = subprocess.run(
        [sys.executable, "-P", "-m", __name__, *paths], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason is given"])[-1]
        raise ImportError(f"The options of {', '.join(paths)} cannot be read: {reason}")
    table = json.loads(done.stdout.partition(MARK)[2].splitlines()[0])  # libraries may print before and after
    if cached.is_absolute():  # without a home folder there is none
        with contextlib.suppress(OSError):  # it is read again next time
            write_atomically(cached, json.dumps(table))
    return classes_in(table)


def classes_in(table: dict[str, Any]) -> Classes:
    """The classes by the dotted names in a table that [`table_of`] has made."""
    classes = {
        key: OptionClass(
            one["name"], one["package"], tuple(Option(**option) for option in one["own"]), one.get("unused_fields")
        )
        for key, one in table["classes"].items()
    }
    return {path: [classes[key] for key in keys] for path, keys in table["paths"].items()}


def options_of(*paths: str) -> dict[str, Option]:
    """Options of dataclasses by name, in the order of `dataclasses.fields`."""
    classes = load_classes(*paths)
    return {name: option for path in paths for name, option in inherited_options(classes[path]).items()}


def inherited_options(classes: Sequence[OptionClass]) -> dict[str, Option]:
    """Options of one dataclass by name, from the class and all that it inherits."""
    return {option.name: option for one in classes[::-1] for option in one.own}


def unused_fields(classes: Sequence[OptionClass]) -> dict[str, str]:
    """The `unused_fields` of a class: names of inherited options that it refuses, and what to set instead."""
    return next((one.unused_fields for one in classes if one.unused_fields is not None), {})


def _is_current(table: dict[str, Any]) -> bool:
    """Whether a table was made with the versions that are installed and with the files as they are."""
    return all(
        _version(name) == made_with and "dev" not in (made_with or "")  # a development version changes as it is
        for name, made_with in table["versions"].items()
    ) and all(_digest(PACKAGE / file) == digest for file, digest in table["files"].items())


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


# The classes themselves


def table_of(paths: Sequence[str]) -> dict[str, Any]:
    """
    Import dataclasses and say what they declare, as values of JSON.

    Args:
        paths (`Sequence[str]`): dotted names.

    Returns:
        `dict`: `versions` by package and hashes of `files` that the classes come from, relative to this package;
        `classes` by dotted name; the names of each class of `paths` and of all that it inherits.
    """
    from .parse import imported

    versions: dict[str, str] = {}
    files = {str(Path(__file__).relative_to(PACKAGE)): _digest(Path(__file__))}
    classes: dict[str, Any] = {}
    inherited: dict[str, list[str]] = {}
    for path, named in zip(paths, imported(paths), strict=True):
        declaring = [one for one in named.__mro__ if {"__dataclass_fields__", "unused_fields"} & set(vars(one))]
        inherited[path] = [f"{one.__module__}.{one.__qualname__}" for one in declaring]
        for key, one in zip(inherited[path], declaring, strict=True):
            package = one.__module__.partition(".")[0]
            if package != PACKAGE.name and _version(package):
                versions[package] = version(package)
            else:
                file = Path(sys.modules[one.__module__].__file__)
                files[str(file.relative_to(PACKAGE) if file.is_relative_to(PACKAGE) else file)] = _digest(file)
            classes[key] = {"name": one.__name__, "package": package, "own": _own_options(one)}
            if "unused_fields" in vars(one):
                classes[key]["unused_fields"] = one.unused_fields
    # as the file has it, in which a tuple is a list
    return json.loads(
        json.dumps({"versions": versions, "files": files, "paths": inherited, "classes": classes}, default=str)
    )


def _own_options(cls: type) -> list[dict[str, Any]]:
    import dataclasses
    import inspect
    from enum import Enum
    from typing import get_type_hints

    from transformers import HfArgumentParser

    if "__dataclass_fields__" not in vars(cls):
        return []
    hints, docstring = get_type_hints(cls), inspect.cleandoc(cls.__doc__ or "")
    choices = {action.dest: action.choices for action in HfArgumentParser(cls)._actions[::-1]}
    fields, found = {one.name: one for one in dataclasses.fields(cls) if one.init}, []
    for entry in (fields[name] for name in inspect.get_annotations(cls) if name in fields):
        option = {
            "name": entry.name,
            "type": _shown_type(hints[entry.name]),
            "help": entry.metadata.get("help", _described(docstring, entry.name)),
        }
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if default is not MISSING:
            option["default"] = default.value if isinstance(default, Enum) else default
        if choices[entry.name]:
            option["choices"] = list(choices[entry.name])
        found.append(option)
    return found


def _shown_type(hint: Any) -> str:
    from enum import Enum
    from types import NoneType, UnionType
    from typing import Union, get_args, get_origin

    if get_origin(hint) in (Union, UnionType):
        return " | ".join(dict.fromkeys(_shown_type(one) for one in get_args(hint) if one is not NoneType))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "str"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else re.sub(r"\b\w+\.", "", str(hint))


def _described(docstring: str, name: str) -> str:
    """The first paragraph that a docstring's list of parameters has for one of them, in one line."""
    entry = re.search(rf"(?m)^( *){name} ?\([^\n]*?\):(.*(?:\n\1 +\S.*)*)", docstring)
    return " ".join(entry[2].split()) if entry else ""


if __name__ == "__main__":
    print(MARK + json.dumps(table_of(sys.argv[1:])))
