"""
What files and settings that come from somebody else cannot do: run code.

- Checkpoints and models are loaded as tensors and plain values ([`weights_only`]): a pickle that names anything else
  is refused, and the message names the file.
- Code that comes with a model is run only where `trust_remote_code` says so ([`explain_remote_code`]).
"""

import contextlib
import difflib
import functools
import json
import numbers
import os
import pickle
import re
import reprlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from importlib import import_module
from inspect import isclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# Files


class UnsafeFileError(ValueError):
    """A file of a checkpoint or a model that holds more than tensors and plain values."""


# What DeepSpeed 0.19 pickles beside tensors: states of its optimisers. They hold values and run nothing.
_DEEPSPEED_STATES = (
    "deepspeed.runtime.zero.config:ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler:LossScaler",
    "deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler",
    "deepspeed.utils.tensor_fragment:fragment_address",
)


def _allowed() -> list[type]:
    if "deepspeed" not in sys.modules:
        return []
    return [getattr(import_module(module), name) for module, _, name in (n.partition(":") for n in _DEEPSPEED_STATES)]


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """
    Within, `torch.load` loads tensors and plain values alone, whatever its caller asks for: DeepSpeed 0.19 asks for
    whole objects, whose unpickling runs any code that a checkpoint names. Any file, wherever it is: links, DeepSpeed's
    `latest` and the Trainer's state can each lead out of a checkpoint.

    Raises:
        UnsafeFileError: a file holds something else. It names the file, and what to do.
    """
    import torch

    load = torch.load

    def load_weights_only(f, *args, **kwargs):
        if len(args) > 1 or kwargs.get("pickle_module") is not None:
            args = args[:1]
            kwargs.pop("pickle_module", None)
        try:
            with torch.serialization.safe_globals(_allowed()):
                return load(f, *args, **{**kwargs, "weights_only": True})
        except pickle.UnpicklingError as error:
            raise UnsafeFileError(f"{f} {_what_is_wrong(error)}") from None

    torch.load = load_weights_only
    try:
        yield
    finally:
        torch.load = load


def _what_is_wrong(error: Exception) -> str:
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named is not None:
        return (
            f"holds more than tensors and plain values: it names {named[1].rstrip('.,')!r}, and loading that could "
            "run code that somebody has put there. Nothing of it was run. Go on from another checkpoint or model "
            "whose origin you know; weights as `.safetensors` cannot hold code."
        )
    reason = " ".join(str(error).rpartition("WeightsUnpickler error: ")[2].split("Check the documentation")[0].split())
    return (
        f"cannot be loaded as tensors and plain values: {reason[:200].rstrip('. ')}. It is damaged, or holds "
        "something else, of which nothing was run. Go on from another checkpoint or model."
    )


@contextlib.contextmanager
def explain_remote_code(setting: str = "trust_remote_code") -> Iterator[None]:
    """
    Within, transformers' refusal of a model that brings its own code says what to set.

    Args:
        setting (`str`): the field, which is also the flag.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if "trust_remote_code" not in str(error) or f"--{setting}" in str(error):
            raise
        first = str(error).strip().splitlines()[0].rstrip(". ")
        raise ValueError(
            f"{first}. Code that comes with a model is not run by itself. Read it, and if you trust it, set "
            f"`{setting}=True` (on the command line `--{setting} true`)."
        ) from error


# Settings


def refuse_code_in_deepspeed(config: Any) -> None:
    """
    Refuse a DeepSpeed config, a dict or a JSON file, that names modules to import (`lower_precision_safe_modules`).

    Raises:
        ValueError: it does, and they are not torch's.
    """
    if isinstance(config, str) and not config.lstrip().startswith("{") and os.path.isfile(config):
        with contextlib.suppress(ValueError, OSError):  # DeepSpeed says so itself
            config = Path(config).read_text()
    config = _as_dict(config)
    autocast = config.get("torch_autocast")
    modules = autocast.get("lower_precision_safe_modules") if isinstance(autocast, Mapping) else None
    for module in modules if isinstance(modules, list) else []:
        if not str(module).startswith("torch.nn."):
            raise ValueError(
                f"deepspeed: `lower_precision_safe_modules` names {module!r}, which DeepSpeed would import. Name "
                "modules of torch.nn alone."
            )


def _as_dict(value: Any) -> dict:
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    return dict(value) if isinstance(value, Mapping) else {}


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
                    f"{entry.name}={reprlib.repr(value)} is {_kind(value)}, and it has to be {shown_hint(hint)}. "
                    f"Set `{entry.name}` to such a value, or leave it out."
                )
            known = [
                member.value for part in _parts(hint) if isclass(part) and issubclass(part, Enum) for member in part
            ]
            if isinstance(value, str) and known and value not in known:
                raise ValueError(
                    f"{entry.name}={value!r:.80} is not known. Set it to one of {', '.join(map(str, known))}."
                )
            _check_json(entry.name, value, hint)


def _check_json(name: str, value: Any, hint: Any) -> None:
    if isinstance(value, str) and dict in _parts(hint) and value.lstrip().startswith("{"):
        try:
            json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}={value!r:.80} is not JSON ({error}). Mend it.") from None


def _check_wider(name: str, value: Any, hint: Any) -> None:
    """What transformers would fail on without naming the setting."""
    _check_json(name, value, hint)
    if isinstance(value, list | tuple) and any(one is None for one in value):
        raise TypeError(f"{name}={reprlib.repr(value)} holds None, which is no value. Leave it out.")


def _parts(hint: Any) -> list[Any]:
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [get_origin(part) or part for part in parts]


def _kind(value: Any) -> str:
    if _exceeds_floats(value):
        return "too large a number"
    return "None" if value is None else f"of type {type(value).__name__}"


def _exceeds_floats(value: Any) -> bool:
    return isinstance(value, int) and abs(value) > sys.float_info.max


def maybe_meant(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: what it may be meant for, if there is something like it."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; {name!r} may be meant for {close[0]!r}." if close else "."


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
