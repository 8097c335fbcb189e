"""Scorers by their names in the settings, checked before anything is sampled."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .config import DEFAULT_LABELS, DEFAULT_TEMPLATE
from .functions import FunctionScorer, Scorer, _belongs_to_prompt, _check_arguments, load_reward_function
from .models import RankerModelJudge, RewardModelScorer, _check_batch_size, _label_ids, _read_judge, _read_reward_model
from .tournament import PairwiseScorer


def load_judge(spec: str, **kwargs) -> Callable:
    """
    Load a pairwise judge.

    Args:
        spec (`str`): a function as in [`load_reward_function`], called with `prompts` and `completions` (two each) and
            returning 0, 1 or -1 for each; or the folder or Hub id of a causal language model.
        kwargs: for [`RankerModelJudge`], if it is a model.

    Returns:
        `Callable`: the judge.

    Raises:
        ValueError, ImportError, TypeError, FileNotFoundError: as [`load_reward_function`] and [`RankerModelJudge`].
    """
    return RankerModelJudge(spec, **kwargs) if _names_a_model(spec, "judge") else load_reward_function(spec)


def build_scorers(
    rewards: str | Sequence[str] = (),
    weights: Sequence[float] | None = None,
    *,
    judge: str | None = None,
    seed: int = 42,
    batch_size: int = 16,
    dtype: str = "auto",
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> list[Scorer]:
    """
    Load scorers by name.

    Args:
        rewards (`Sequence[str]`):
            Each a reward function, `"package.module:function"` or `"path/to/file.py:function"`, or the folder or Hub
            id of a reward model.
        weights (`Sequence[float]`, *optional*): one for each of `rewards`, and one more for the judge; only checked
            here, before anything is loaded. See [`score_rows`].
        judge (`str`, *optional*): a pairwise judge, see [`load_judge`]. It comes last.
        seed (`int`, defaults to 42): of the judge's tournaments.
        batch_size (`int`, defaults to 16): completions a model scores at a time.
        dtype (`str`, defaults to `"auto"`): of the models' weights.
        max_length (`int`, *optional*): longest sequence a model reads; by default what it can take.
        trust_remote_code (`bool`, defaults to `False`): as in transformers.

    Returns:
        `list`: one scorer per entry of `rewards`, and one for the judge.

    Raises:
        ValueError: nothing is named, something twice, or the number of weights does not match; and whatever
            [`load_reward_function`], [`RewardModelScorer`] and [`load_judge`] raise.
    """
    rewards, functions, judge_function = _named(rewards, weights, judge)
    models = {
        "batch_size": batch_size, "dtype": dtype, "max_length": max_length, "trust_remote_code": trust_remote_code
    }  # fmt: skip
    scorers: list[Scorer] = [
        RewardModelScorer(spec, **models) if function is None else FunctionScorer(function)
        for spec, function in zip(rewards, functions, strict=True)
    ]
    if judge is not None:
        scorers.append(PairwiseScorer(judge_function or RankerModelJudge(judge, **models), seed=seed))
    names = [scorer.name for scorer in scorers]
    for spec, scorer in zip([*rewards, judge], scorers, strict=False):
        scorer.spec = spec
        if names.count(scorer.name) > 1:
            scorer.name = spec
    return scorers


def check_scorers(
    rewards: str | Sequence[str] = (),
    weights: Sequence[float] | None = None,
    *,
    judge: str | None = None,
    columns: Sequence[str] | None = None,
    batch_size: int = 16,
    dtype: str = "auto",
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> None:
    """
    Find out, before anything is sampled, what [`build_scorers`] would refuse. Functions, configs and tokenizers are
    loaded, weights are not.

    Args:
        rewards, weights, judge, batch_size, dtype, max_length, trust_remote_code: as in [`build_scorers`].
        columns (`Sequence[str]`, *optional*): columns of the prompts, to see whether the functions take them.

    Raises:
        ValueError, ImportError, TypeError, FileNotFoundError: as [`build_scorers`]; or a function that does not take
            its arguments.
    """
    rewards, functions, judge_function = _named(rewards, weights, judge)
    _check_batch_size(batch_size)
    if dtype != "auto" and not isinstance(getattr(torch, str(dtype).removeprefix("torch."), None), torch.dtype):
        raise ValueError(f"`dtype` must be 'auto', 'float32', 'bfloat16' or 'float16', got {dtype!r}.")
    kwargs = {"revision": None, "trust_remote_code": trust_remote_code}
    for spec, function in zip(rewards, functions, strict=True):
        if function is None:
            _read_reward_model(spec, max_length, **kwargs)
        elif columns is not None:
            names = ["prompts", "completions", *filter(_belongs_to_prompt, columns)]
            _check_arguments(function, f"The reward function {spec!r}", names)
    if judge_function is not None:
        _check_arguments(judge_function, f"The judge {judge!r}", ["prompts", "completions"])
    elif judge is not None:
        _, tokenizer, _ = _read_judge(judge, max_length, **kwargs)
        _label_ids(tokenizer, DEFAULT_TEMPLATE, DEFAULT_LABELS)


def _named(rewards, weights, judge) -> tuple[list[str], list[Callable | None], Callable | None]:
    """Names of rewards, checked, and the functions that they and the judge name; `None` for models."""
    rewards = [rewards] if isinstance(rewards, str) else list(rewards)
    specs = [*rewards, *([] if judge is None else [judge])]
    if not specs:
        raise ValueError(
            "`rewards` or a judge must be given, got neither. Name a reward function ('path/to/file.py:function'), a "
            "reward model or a judge."
        )
    if len(set(specs)) < len(specs):
        twice = next(spec for spec in specs if specs.count(spec) > 1)
        raise ValueError(f"Each scorer must be named once, got {twice!r} twice. Give it a weight instead.")
    _check_weights(weights, specs, [] if judge is None else [judge])
    are_models = [_names_a_model(spec, "reward") for spec in rewards]
    judge_is_model = judge is not None and _names_a_model(judge, "judge")
    # all names are read before a function's module is run
    functions = [
        None if is_model else load_reward_function(spec) for spec, is_model in zip(rewards, are_models, strict=True)
    ]
    return rewards, functions, None if judge is None or judge_is_model else load_reward_function(judge)


def _names_a_model(spec: str, role: str) -> bool:
    """Whether a text is the name of a model, not of a function; refuses what is neither."""
    path = Path(spec).expanduser()
    if os.path.isdir(path):
        return True
    if ":" in spec:
        return False
    if spec.endswith(".py"):
        raise ValueError(f"The {role} must be a function or a model, got the file {spec!r}. Write '{spec}:function'.")
    if not spec or spec.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"The {role} must be a function or a model, got {spec!r}, which is not there. Correct the path, or write "
            "'path/to/file.py:function' for a function."
        )
    return True


def _check_weights(weights: Sequence[float] | None, names: Sequence[str], judges: Sequence[str] = ()) -> list[float]:
    if weights is None:
        return [1.0] * len(names)
    if list(names) == list(judges):
        raise ValueError(
            f"`weights` must not be given where the judge {names[0]!r} scores alone, got "
            f"{', '.join(map(str, weights))}. Remove them."
        )
    if len(weights) != len(names):
        raise ValueError(
            f"`weights` must hold one for each of {len(names)} scorers ({', '.join(names)}), got {len(weights)}. Give "
            "them in this order, or none for an equal sum."
        )
    for weight, name in zip(weights, names, strict=True):
        if not math.isfinite(weight):
            raise ValueError(f"The weight of {name!r} must be a finite number, got {weight}.")
        if weight < 0 and name in judges:
            raise ValueError(
                f"The weight of the judge {name!r} must be positive, got {weight}. The winners of its games would "
                "score lower. Name a judge that prefers the opposite."
            )
    if not any(weights):
        raise ValueError("`weights` must not all be 0, which makes all scores equal. Change one of them.")
    return [float(weight) for weight in weights]
