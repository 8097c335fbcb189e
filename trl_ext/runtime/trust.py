"""
Files that come from somebody else, which must not run code.

- Checkpoints and models are loaded as tensors and plain values ([`weights_only`]): a pickle that names anything else
  is refused, and the message names the file.
- Code that comes with a model is run only where `trust_remote_code` says so ([`explain_remote_code`]).
"""

import contextlib
import pickle
import re
import sys
from collections.abc import Iterator
from importlib import import_module


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
            "run code that somebody has put there. Nothing of it was run. Use a checkpoint or model whose origin you "
            "know. Weights as `.safetensors` cannot hold code."
        )
    reason = " ".join(str(error).rpartition("WeightsUnpickler error: ")[2].split("Check the documentation")[0].split())
    return (
        f"cannot be loaded as tensors and plain values: {reason[:200].rstrip('. ')}. It is damaged, or holds "
        "something else, of which nothing was run. Use another checkpoint or model."
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
            f"{first}. Code that comes with a model is not run unless you say so. Read it, and if you trust it, set "
            f"`{setting}=True` (on the command line `--{setting} true`)."
        ) from error
