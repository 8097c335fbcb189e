"""Reward functions: loading, calling, and checking what they return."""

import asyncio
import difflib
import functools
import hashlib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..data.columns import as_given
from ..runtime.fingerprints import file_digest

# columns with one value per candidate; all others belong to the prompt
CANDIDATE_COLUMNS = (
    "completions", "completion_ids", "token_ids", "logps", "num_tokens", "ends", "sources", "scores",
)  # fmt: skip


class ScoringError(ValueError):
    """
    A completion without a usable score.

    Attributes:
        scorer (`str`): name of the function, model or judge.
        row (`int`), completion (`int`): which completion, among the rows that were given.
        what (`str`): what is wrong with its score, and what to do.
        prompt (*optional*): the row's prompt, where it is known.
    """

    def __init__(self, scorer: str, row: int, completion: int, what: str):
        self.scorer, self.row, self.completion, self.what, self.prompt = scorer, row, completion, what, None
        super().__init__(scorer, row, completion, what)

    def __str__(self) -> str:
        prompt = "" if self.prompt is None else f" The prompt is {_shown(self.prompt)}."
        return f"{self.scorer}: row {self.row}, completion {self.completion}: {self.what}{prompt}"


class Scorer(Protocol):
    """
    Anything with a `name` that gives every completion of some candidate rows a number, or `None` where it does not
    apply. A row's numbers must follow from that row alone.

    Optional attributes: `counts`, a `Counter` of what it did; `spec` and `identity`, in JSON's types, what its numbers
    depend on; `code`, a hash over the code that makes them.
    """

    name: str

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[list[float | None]]: ...


def load_reward_function(spec: str) -> Callable:
    """
    Load a Python function by its name.

    Args:
        spec (`str`):
            `"package.module:function"`, looked up on the Python path and then in the current folder, or
            `"path/to/file.py:function"`. TRL's own are `"trl.rewards:think_format_reward"` and so on.

    Returns:
        `Callable`: the function, or any other callable object of that name.

    Raises:
        ValueError: `spec` has neither form.
        FileNotFoundError: there is no such file.
        ImportError: there is no such module, it cannot be imported, or it has no such name.
        TypeError: what is found cannot be called.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise ValueError(f"A function must be 'package.module:function' or 'path/to/file.py:function', got {spec!r}.")
    module = _import_file(where, spec) if where.endswith(".py") else _import_module(where, spec)
    try:
        function = functools.reduce(getattr, name.split("."), module)
    except AttributeError:
        close = difflib.get_close_matches(name, [known for known in vars(module) if not known.startswith("_")])
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ImportError(f"{spec!r}: {where} has no {name!r}.{hint} Correct the name after the colon.") from None
    if not callable(function):
        raise TypeError(f"{spec!r} must be a function, got {type(function).__name__}. Name a function.")
    if inspect.isclass(function):
        raise TypeError(f"{spec!r} must be a function, got a class. Make an object of it in {where}, and name that.")
    return function


def _import_file(where: str, spec: str):
    path = Path(where).expanduser().resolve()
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{spec!r}: the file {path} does not exist. Correct the path before the colon.")
    # a name of its own, so that two files of the same name do not become one module
    name = f"trl_ext_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ImportError(
            f"{spec!r}: importing {path} raised {type(error).__name__}: {error}. Correct the file."
        ) from error
    return module


def _import_module(where: str, spec: str):
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # behind everything else; stays, for what the function itself imports later
        importlib.invalidate_caches()
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is not None and (where == error.name or where.startswith(error.name + ".")):
            raise ImportError(
                f"{spec!r}: the module {error.name!r} is neither on the Python path nor in {os.getcwd()}. Correct the "
                "name, set PYTHONPATH, or write 'path/to/file.py:function'."
            ) from None
        raise ImportError(
            f"{spec!r}: the module {where} needs {error.name!r}, which is not installed. Install it."
        ) from error
    except Exception as error:
        raise ImportError(
            f"{spec!r}: importing the module {where} raised {type(error).__name__}: {error}. Correct it."
        ) from error


def _function_name(function: Callable) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _code(function: Callable) -> str | None:
    """A hash over the file a function is written in; `None` where there is none."""
    while isinstance(function, functools.partial):
        function = function.func
    try:
        file = inspect.getsourcefile(function if inspect.isroutine(function) else type(function))
    except TypeError:
        return None
    return file_digest(Path(file)) if file is not None and os.path.isfile(file) else None


def _check_arguments(function: Callable, what: str, names: Iterable[str]) -> None:
    try:
        inspect.signature(function).bind(**dict.fromkeys(names))
    except TypeError as error:
        raise TypeError(
            f"{what} must take the arguments {', '.join(names)}: {error}. Rename the columns, or give it `**kwargs` "
            "for arguments it does not need."
        ) from None
    except ValueError:  # a builtin without a signature: the call itself will tell
        pass


def _call(function: Callable, what: str, **kwargs) -> Any:
    """Call a user's function, which may be async, and say whose fault it is if it fails."""
    _check_arguments(function, what, kwargs)
    try:
        result = function(**kwargs)
        if inspect.isawaitable(result):

            async def wait():
                return await result

            with ThreadPoolExecutor(1) as executor:  # a notebook has a running loop already, this thread has none
                result = executor.submit(asyncio.run, wait()).result()
    except Exception as error:
        raise RuntimeError(
            f"{what} raised {type(error).__name__}: {error}. It was called for {len(kwargs['prompts'])} prompts, the "
            f"first of which is {_shown(kwargs['prompts'][0])}. Correct the function."
        ) from error
    return result


def _as_list(result: Any, what: str, expected: int) -> list:
    if isinstance(result, torch.Tensor | np.ndarray):
        result = result.tolist()
    if not isinstance(result, list | tuple):
        raise TypeError(
            f"{what} must return a list with one entry for each of `completions`, got {type(result).__name__} "
            f"({result!r:.60})."
        )
    if len(result) != expected:
        raise ValueError(
            f"{what} must return one entry for each of {expected} completions, got {len(result)}. Return them in the "
            "order of `completions`, None where it does not apply."
        )
    return list(result)


def _shown(text: Any) -> str:
    return repr(text) if len(repr(text)) <= 100 else repr(text)[:100] + "..."


class FunctionScorer:
    """
    Scores completions with a reward function of the kind TRL's `GRPOTrainer` takes.

    The function is called once per batch of rows with the keyword arguments `prompts`, `completions`, `completion_ids`
    (only if the rows have them) and every column of the prompts, such as `answer`, but for those whose name begins
    with an underscore, which are somebody's bookkeeping. All are lists with one entry per completion: prompts and
    columns are repeated. It returns one number per completion, or `None` where it does not
    apply. It may be async. `trainer_state`, `log_extra` and `log_metric`, which TRL passes too, are left out: there is
    no trainer.

    Args:
        function (`Callable`): the function.
        name (`str`, *optional*): what messages and columns call it; by default its own name.
    """

    def __init__(self, function: Callable, name: str | None = None):
        self.function, self.name = function, name or _function_name(function)
        self.code = _code(function)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[list[float | None]]:
        """
        Scores of every completion.

        Raises:
            TypeError: the function does not take the arguments, or does not return a list.
            ValueError: it returned another number of entries than there are completions.
            ScoringError: it returned something that is neither a finite number nor `None`.
            RuntimeError: it raised; the cause is chained.
        """
        rows = [as_given(row) for row in rows]
        lengths = [len(row["completions"]) for row in rows]
        if not sum(lengths):
            return [[] for _ in rows]
        columns = {column: None for row in rows for column in row if _belongs_to_prompt(column)}  # in order
        kwargs = {
            "prompts": [row["prompt"] for row in rows for _ in row["completions"]],
            "completions": [completion for row in rows for completion in row["completions"]],
        }
        if all(row.get("completion_ids") is not None for row in rows):
            kwargs["completion_ids"] = [ids for row in rows for ids in row["completion_ids"]]
        for column in columns:
            kwargs[column] = [row.get(column) for row in rows for _ in row["completions"]]
        what = f"The reward function {self.name!r}"
        result = iter(_as_list(_call(self.function, what, **kwargs), what, sum(lengths)))
        return [
            [_number(next(result), what, index, completion) for completion in range(length)]
            for index, length in enumerate(lengths)
        ]


def _belongs_to_prompt(column: str) -> bool:
    # "completion" is what TRL leaves out as well
    known = (*CANDIDATE_COLUMNS, "prompt", "completion", "games")
    return column not in known and not column.startswith(("rewards/", "_"))


def _number(value: Any, what: str, row: int, completion: int) -> float | None:
    if value is None:
        return None
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and math.prod(value.shape) == 1:
        value = value.item()
    try:
        number = None if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        number = None
    if number is None or not math.isfinite(number):
        raise ScoringError(
            what, row, completion,
            f"must return a finite number, got {value!r:.60}. Return None where it does not apply.",
        )  # fmt: skip
    return number
