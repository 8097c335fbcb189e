"""Values of settings against their declared types and against earlier ones, and hints for misspelt names."""

import difflib
import functools
import json
import numbers
import os
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from inspect import isclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# Types

# of which transformers (5.23) takes more than their types say: `fsdp=True`, `max_grad_norm=None`, `log_level=20`, ...
WIDER_THAN_DECLARED = (
    "debug", "fsdp", "hub_token", "log_level", "log_level_replica", "lr_scheduler_kwargs", "max_grad_norm",
    "optim_args", "optim_target_modules", "report_to", "resume_from_checkpoint", "warmup_steps",
)  # fmt: skip


def has_type(value: Any, hint: Any) -> bool:
    """Whether a value is of a type hint's kind, with TRL's latitude: integers for floats, names for enums."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(has_type(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if hint in (None, NoneType):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and not _exceeds_floats(value)
    if hint is str:
        return isinstance(value, str | os.PathLike)
    if hint is list or origin is list:
        return isinstance(value, list | tuple) and all(
            has_type(one, argument) for argument in arguments for one in value
        )
    if hint is dict or origin is dict:
        return isinstance(value, Mapping)
    if isclass(hint) and issubclass(hint, Enum):
        return isinstance(value, hint) or any(value == member.value for member in hint)
    return True


def list_items(hint: Any) -> list[Any]:
    """The hints of what a list of this type holds; none if it is no list."""
    if get_origin(hint) in (Union, UnionType):
        return [item for part in get_args(hint) for item in list_items(part)]
    return list(get_args(hint)) if get_origin(hint) is list else []


_type_hints = functools.cache(get_type_hints)


def check_field_types(config: Any, *, apart_from: Sequence[str] = ()) -> None:
    """
    Refuse values of a dataclass that are not of their field's type, but for [`WIDER_THAN_DECLARED`]. Objects of
    classes of their own are let through: whoever makes them knows what for.

    Raises:
        TypeError: names the field, its value and its type.
    """
    hints = _type_hints(type(config))
    for entry in fields(config):
        if not entry.init or entry.name in apart_from:
            continue
        value, hint = getattr(config, entry.name), hints[entry.name]
        if entry.name in WIDER_THAN_DECLARED:
            _check_wider(entry.name, value, hint)
            continue
        if isinstance(value, bool | int | float | str | bytes | list | tuple | dict | NoneType | complex | set):
            if value is None and (entry.default is None or list_items(hint)):
                continue  # for a list that is not given, the parser says `None`
            if not has_type(value, hint) and not any(has_type(value, one) for one in list_items(hint)):
                raise TypeError(
                    f"`{entry.name}` must be {shown_hint(hint)}, got {reprlib.repr(value)}, {_kind(value)}. Correct "
                    "it, or remove it."
                )
            known = [
                member.value for part in _parts(hint) if isclass(part) and issubclass(part, Enum) for member in part
            ]
            if isinstance(value, str) and known and value not in known:
                raise ValueError(f"`{entry.name}` must be one of {', '.join(map(str, known))}, got {value!r:.80}.")
            _check_json(entry.name, value, hint)


def _check_json(name: str, value: Any, hint: Any) -> None:
    if isinstance(value, str) and dict in _parts(hint) and value.lstrip().startswith("{"):
        try:
            json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`{name}` must be JSON, got {value!r:.80} ({error}). Correct it.") from None


def _check_wider(name: str, value: Any, hint: Any) -> None:
    """What transformers would fail on without naming the setting."""
    _check_json(name, value, hint)
    if isinstance(value, list | tuple) and any(one is None for one in value):
        raise TypeError(f"`{name}` must not hold None, got {reprlib.repr(value)}. Remove it.")


def _parts(hint: Any) -> list[Any]:
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [get_origin(part) or part for part in parts]


def _kind(value: Any) -> str:
    if _exceeds_floats(value):
        return "too large a number"
    return "None" if value is None else f"of type {type(value).__name__}"


def _exceeds_floats(value: Any) -> bool:
    return isinstance(value, int) and abs(value) > sys.float_info.max


def changes(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    default_of: Callable[[str], Any] = lambda name: None,
    apart_from: Iterable[str] = (),
) -> str:
    """
    Compare the settings that something was begun with and those of now.

    Args:
        before, now (`Mapping[str, Any]`): settings by name, in JSON's types.
        default_of (`Callable`, *optional*): the value that a setting counts with where it is absent: an option may
            have been added since.
        apart_from (`Iterable[str]`, *optional*): names that are not compared.

    Returns:
        `str`: such as `"seed was 1 and is 2"`; empty if nothing differs.
    """
    found = []
    for name in sorted({*before, *now} - set(apart_from)):
        old, new = (one[name] if name in one else default_of(name) for one in (before, now))
        if old != new:
            found.append(f"{name} was {old!r:.80} and is {new!r:.80}")
    return ", ".join(found)


LISTED = "`--help` lists the options."


def did_you_mean(name: str, known: Iterable[str], prefix: str = "", otherwise: str = LISTED) -> str:
    """A question about an unknown name: whether a known one like it was meant; `otherwise` if none is like it."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"Did you mean `{prefix}{close[0]}`?" if close else otherwise


def shown_hint(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(shown_hint(argument) for argument in get_args(hint))
    return (
        "None"
        if hint in (None, NoneType)
        else getattr(hint, "__name__", str(hint))
        if not get_args(hint)
        else str(hint)
    )
