"""
Scoring: candidates in, the same with scores out.

A candidate row is what [`~trl_ext.sampling.sample_candidates`] gives: `prompt` (text or messages), `completions` (K
texts or lists of messages), and whatever other columns the prompts came with, such as `answer`. Optional, with one
entry per candidate: `logps` (log-likelihood under the sampler in nats, summed over tokens; `None` where it is not
known), `num_tokens` and `sources`.

    rows = score_rows(rows, build_scorers(["rewards.py:is_right"]))

A scorer is a reward function or a reward model, which look at one completion at a time, or a judge, who compares two.

Nothing here depends on the order of the rows, on how they are batched, or on the number of processes: whatever is
drawn at random is drawn from the seed and the row itself.

Paper: SLiC-HF (https://huggingface.co/papers/2305.10425) for the tournament of a pairwise judge.
"""

import asyncio
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import logging
import math
import operator
import os
import random
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from ._trl import _tokenize
from .columns import as_given, without_nulls
from .data import REMEDIES as ROW_REMEDIES
from .data import RowError, _check_number, _check_text, template_kwargs, without_end
from .machines import from_all, wait_as_long_as_it_takes
from .safety import UnsafeFileError, explain_remote_code, weights_only
from .sampling import file_digest, model_fingerprint, process_state, read_sealed, sealed, write_atomically
from .tokens import text_ids

logger = logging.getLogger(__name__)

# columns with one value per candidate; all others belong to the prompt
CANDIDATE_COLUMNS = (
    "completions", "completion_ids", "token_ids", "logps", "num_tokens", "ends", "sources", "scores",
)  # fmt: skip
# what can be wrong with a candidate row, beyond what can be wrong with other rows
REMEDIES = {
    **ROW_REMEDIES,
    "not a list": "Give it one entry per completion, or leave it out.",
    "other games": "Leave `games` out, or score the row with its judge again.",
}

DEFAULT_TEMPLATE = (
    "Which of two responses to a prompt is better, A or B?\n\n"
    "[PROMPT]\n{prompt}\n\n[RESPONSE A]\n{first}\n\n[RESPONSE B]\n{second}\n\n[BETTER]\n"
)


# architectures without a next token, by the ends of their names
OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
DEFAULT_LABELS = ("A", "B")


# what TRL's trainers give a reward function beside the columns of the dataset
TRL_REWARD_ARGUMENTS = ("trainer_state", "log_extra", "log_metric", "environments")


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
        raise ValueError(f"{spec!r} names no function. Write 'package.module:function' or 'path/to/file.py:function'.")
    module = _import_file(where, spec) if where.endswith(".py") else _import_module(where, spec)
    try:
        function = functools.reduce(getattr, name.split("."), module)
    except AttributeError:
        close = difflib.get_close_matches(name, [known for known in vars(module) if not known.startswith("_")])
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ImportError(f"{spec!r}: {where} has no {name!r}.{hint} Correct the name behind the colon.") from None
    if not callable(function):
        raise TypeError(f"{spec!r} is {type(function).__name__}, which cannot be called. Name a function.")
    if inspect.isclass(function):
        raise TypeError(f"{spec!r} is a class. Make an object of it in {where}, and name that object.")
    return function


def _import_file(where: str, spec: str):
    path = Path(where).expanduser().resolve()
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{spec!r}: there is no file {path}. Correct the path before the colon.")
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
            f"{spec!r}: {path} cannot be imported, it raised {type(error).__name__}: {error}. Correct the file."
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
                f"{spec!r}: there is no module {error.name!r} on the Python path or in {os.getcwd()}. Correct the "
                "name, set PYTHONPATH, or write 'path/to/file.py:function'."
            ) from None
        raise ImportError(
            f"{spec!r}: the module {where} needs {error.name!r}, which is not there. Install it."
        ) from error
    except Exception as error:
        raise ImportError(
            f"{spec!r}: the module {where} cannot be imported, it raised {type(error).__name__}: {error}. Correct it."
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
            f"{what} is called with the arguments {', '.join(names)}, which do not fit its own ({error}). Rename the "
            "columns, or give it `**kwargs` for arguments it does not need."
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
            f"{what} returned {type(result).__name__} ({result!r:.60}). It has to return a list with one entry for "
            "each of `completions`."
        )
    if len(result) != expected:
        raise ValueError(
            f"{what} returned {len(result)} entries for {expected} completions. It has to return one for each of "
            "`completions`, in their order; None where it does not apply."
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
            f"returned {value!r:.60}, which is not a finite number. Return a number, or None where it does not apply.",
        )  # fmt: skip
    return number


def _load_tokenizer(name_or_path: str, **kwargs) -> PreTrainedTokenizerBase:
    with explain_remote_code("reward_trust_remote_code"):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"The tokenizer of {name_or_path} has neither a padding nor an end token, so that texts cannot be "
                "batched. Set `pad_token` in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token  # as TRL does
    return tokenizer


def _longest_input(name: str, max_length: int | None, config, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """`max_length`, or what the model can take; `None` if that is not known."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if max_length is None:
        known = [tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None, positions]
        return min((length for length in known if length), default=None)
    if max_length < 1:
        raise ValueError(f"max_length={max_length}: set it to 1 or more, or None for what the model can take.")
    if positions is not None and max_length > positions:
        raise ValueError(
            f"max_length={max_length}, and {name} has only {positions} positions. Set it to {positions} or less, or "
            "to None for what the model can take."
        )
    return max_length


def _cut_left(ids: list[int], max_length: int | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end of a sequence that is too long, as RRHF scores it. A begin token stays at the beginning."""
    if max_length is None or len(ids) <= max_length:
        return ids
    begins = (tokenizer.bos_token_id, tokenizer.cls_token_id)
    kept = 1 if max_length > 1 and ids[0] in [token for token in begins if token is not None] else 0
    return ids[:kept] + ids[len(ids) - max_length + kept :]


def _padded_batches(
    sequences: list[list[int]], batch_size: int, pad_token_id: int, device: torch.device
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """
    Batches of sequences of like length, padded on the right; the longest first, so that memory runs out at once or not
    at all.

    Yields:
        `tuple`: which sequences, input ids (batch_size, length), attention mask (batch_size, length).
    """
    by_length = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    for start in range(0, len(by_length), batch_size):
        indices = by_length[start : start + batch_size]
        input_ids = torch.full((len(indices), len(sequences[indices[0]])), pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, index in enumerate(indices):
            input_ids[row, : len(sequences[index])] = torch.tensor(sequences[index])
            attention_mask[row, : len(sequences[index])] = 1
        yield indices, input_ids.to(device), attention_mask.to(device)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: set it to 1 or more.")


class RewardModelScorer:
    """
    Scores completions with a sequence-classification model of one output, on the device of this process.

    The model reads what TRL's `RewardTrainer` trains on: the chat template of prompt and completion, or, for plain
    text, prompt + completion + the end token. (`GRPOTrainer` shows its reward models plain text without the begin and
    end token.) Sequences that are too long lose their beginning, which is counted in `counts`.

    Args:
        model_name_or_path (`str`): a folder or Hub id.
        batch_size (`int`, defaults to 16): completions at a time; batches are of like length.
        dtype (`str`, defaults to `"auto"`): of the weights; `"auto"` is the checkpoint's.
        max_length (`int`, *optional*): longest sequence in tokens; by default what the model can take.
        name (`str`, *optional*): what messages and columns call it; by default the last part of its path.
        revision (`str`, *optional*), trust_remote_code (`bool`, defaults to `False`): as in transformers.

    Raises:
        ValueError: there is no such model, it has another number of outputs than one, its head is not in the
            checkpoint, it is an adapter, or `max_length` exceeds what it can take.
    """

    def __init__(
        self,
        model_name_or_path: str,
        *,
        batch_size: int = 16,
        dtype: str = "auto",
        max_length: int | None = None,
        name: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ):
        path = str(model_name_or_path)
        _check_batch_size(batch_size)
        self.batch_size, self.name = batch_size, name or Path(path).name
        self.counts: Counter[str] = Counter()
        kwargs = {"revision": revision, "trust_remote_code": trust_remote_code}
        config, self.tokenizer, self.max_length = _read_reward_model(path, max_length, **kwargs)
        self.identity = _model_identity(path, revision, dtype, self.max_length)
        self.model, loading = _load(
            AutoModelForSequenceClassification, path, "reward model", config=config, dtype=dtype,
            output_loading_info=True, **kwargs,
        )  # fmt: skip
        random_weights = [*sorted(loading["missing_keys"]), *sorted(map(str, loading["mismatched_keys"]))]
        if random_weights:
            raise ValueError(
                f"The checkpoint {path} lacks {', '.join(random_weights[:5])}{', ...' if random_weights[5:] else ''}, "
                f"which transformers has filled with random numbers for {type(self.model).__name__}: the scores would "
                "be noise. Train it as a reward model first (TRL's RewardTrainer), or name one that is trained."
            )
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id  # finds the last token by it
        self.model.to(process_state().device).eval()

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[list[float | None]]:
        """
        Scores of every completion.

        Raises:
            ScoringError: the model gave NaN or infinity.
        """
        places = [(index, number) for index, row in enumerate(rows) for number in range(len(row["completions"]))]
        sequences = []
        for index, number in places:
            ends = rows[index].get("ends")
            is_cut = ends is not None and ends[number] == "length"
            ids = self._token_ids(rows[index], rows[index]["completions"][number], is_cut)
            sequences.append(_cut_left(ids, self.max_length, self.tokenizer))
            self.counts["completions"] += 1
            if len(sequences[-1]) < len(ids):
                self.counts[f"texts cut on the left at max_length={self.max_length}"] += 1
        scores: list[list[float | None]] = [[None] * len(row["completions"]) for row in rows]
        batches = _padded_batches(sequences, self.batch_size, self.tokenizer.pad_token_id, self.model.device)
        for indices, input_ids, attention_mask in batches:
            with torch.inference_mode():
                logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits  # (batch_size, 1)
            for position, logit in zip(indices, logits[:, 0].float().tolist(), strict=True):
                index, number = places[position]
                if not math.isfinite(logit):
                    raise ScoringError(
                        f"The reward model {self.name!r}", index, number,
                        f'gave {logit}. Try dtype="float32", and look at the completion.',
                    )  # fmt: skip
                scores[index][number] = logit
        return scores

    def _token_ids(self, row: Mapping[str, Any], completion: str | list, is_cut: bool = False) -> list[int]:
        """Prompt and completion as in training: without an end token where the completion was cut by its length."""
        if isinstance(completion, list):
            row = as_given({**row, "completion": completion})
            ids = _tokenize(self.tokenizer, row["prompt"] + row["completion"], **template_kwargs(row))["input_ids"]
        else:
            end = self.tokenizer.eos_token or ""
            ids = text_ids(self.tokenizer, row["prompt"] + completion.removesuffix(end) + end)
        return without_end(ids, self.tokenizer) if is_cut else ids


def _read_reward_model(path: str, max_length: int | None, **kwargs) -> tuple:
    """Config, tokenizer and longest input of a reward model, checked, without its weights."""
    _refuse_adapter(path, "reward model", **kwargs)
    config = _load(AutoConfig, path, "reward model", **kwargs)
    found = f"num_labels={config.num_labels} (architecture: {', '.join(config.architectures or ['unknown'])})"
    if config.num_labels != 1:
        raise ValueError(
            f"The reward model {path} has {found}: a score is one number. Name a sequence-classification model "
            "with num_labels=1, which is what TRL's RewardTrainer writes; a language model that compares two "
            "answers is a judge, not a reward model."
        )
    tokenizer = _load_tokenizer(path, **kwargs)
    return config, tokenizer, _longest_input(path, max_length, config, tokenizer)


def _read_judge(path: str, max_length: int | None, **kwargs) -> tuple:
    """Config, tokenizer and longest input of a language model that compares, checked, without its weights."""
    _refuse_adapter(path, "judge", **kwargs)
    config = _load(AutoConfig, path, "judge", **kwargs)
    other = next((name for name in config.architectures or [] if name.endswith(OTHER_HEADS)), None)
    if other is not None:
        raise ValueError(
            f"The judge {path} is a {other}, which predicts no next token. Name a causal language model; a "
            "sequence-classification model with one output is a reward model, not a judge."
        )
    tokenizer = _load_tokenizer(path, **kwargs)
    return config, tokenizer, _longest_input(path, max_length, config, tokenizer)


def _model_identity(path: str, revision: str | None, dtype: str, max_length: int | None) -> list:
    """What a model's scores depend on."""
    is_local = os.path.isdir(path)
    return [model_fingerprint(path), None if is_local else revision or "main", str(dtype), max_length]


def _refuse_adapter(path: str, role: str, *, revision: str | None = None, trust_remote_code: bool = False) -> None:
    try:
        adapter = find_adapter_config_file(path, revision=revision)
    except (OSError, ValueError):  # no such thing, or no network; loading it says so better
        return
    if adapter is not None:
        raise ValueError(
            f"The {role} {path} is a PEFT adapter, whose head may be another than its base model's. Merge it into its "
            "base model (`merge_and_unload()`), save that with its tokenizer, and name the result."
        )


def _load(auto_class, path: str, role: str, **kwargs):
    try:
        with weights_only():
            return auto_class.from_pretrained(path, **kwargs)
    except UnsafeFileError:
        raise
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            with explain_remote_code("reward_trust_remote_code"):
                raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"The {role} {path!r} could not be loaded: {reason.rstrip('.')}. Give the folder or Hub id of a model; a "
            "function is written 'package.module:function' or 'path/to/file.py:function'."
        ) from error


class RankerModelJudge:
    """
    A causal language model that compares two completions, by the next token's probability: label A or label B.

    This is SLiC-HF's pairwise ranker (§3.2), whose input is the prompt and both answers and whose output is "A" or
    "B". Equal probabilities mean that it cannot tell.

    Args:
        model_name_or_path (`str`): a folder or Hub id.
        template (`str`, defaults to `DEFAULT_TEMPLATE`):
            The text shown to the model, with the fields `{prompt}`, `{first}` and `{second}`; the label comes right
            behind it. For a model that was tuned on conversations write its marks (`<|im_start|>user` and so on) into
            the template. Prompts and completions made of messages are filled in as text, with the roles if there are
            several messages.
        labels (`tuple[str, str]`, defaults to `("A", "B")`): one token each, for the first and the second.
        batch_size (`int`, defaults to 8): comparisons at a time; batches are of like length.
        dtype (`str`, defaults to `"auto"`): of the weights; `"auto"` is the checkpoint's.
        max_length (`int`, *optional*): longest text in tokens, cut on the left; by default what the model can take.
        revision (`str`, *optional*), trust_remote_code (`bool`, defaults to `False`): as in transformers.

    Raises:
        ValueError: a field is missing in the template, a label is not one token, there is no such model, or
            `max_length` exceeds what it can take.
    """

    def __init__(
        self,
        model_name_or_path: str,
        *,
        template: str = DEFAULT_TEMPLATE,
        labels: tuple[str, str] = DEFAULT_LABELS,
        batch_size: int = 8,
        dtype: str = "auto",
        max_length: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ):
        path = str(model_name_or_path)
        _check_batch_size(batch_size)
        wanted, fields = {"prompt", "first", "second"}, {name for _, name, _, _ in string.Formatter().parse(template)}
        if fields - {None} != wanted:
            raise ValueError(
                f"The judge's template has the fields {sorted(fields - {None})}, and needs {{prompt}}, {{first}} and "
                "{second}. Put each of them in; write other braces twice."
            )
        self.template, self.batch_size, self.__name__ = template, batch_size, Path(path).name
        self.counts: Counter[str] = Counter()
        kwargs = {"revision": revision, "trust_remote_code": trust_remote_code}
        config, self.tokenizer, self.max_length = _read_judge(path, max_length, **kwargs)
        self.label_ids = _label_ids(self.tokenizer, template, labels)
        self.identity = [*_model_identity(path, revision, dtype, self.max_length), template, list(labels)]
        self.model = _load(AutoModelForCausalLM, path, "judge", config=config, dtype=dtype, **kwargs)
        self.model.to(process_state().device).eval()
        # logits at the last tokens only, where the model offers that: all of them would be much the largest tensor
        self._can_keep_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def __call__(self, prompts: list, completions: list[list]) -> list[int]:
        """
        Compare the two completions of each prompt.

        Args:
            prompts (`list`): texts or lists of messages.
            completions (`list[list]`): two for each prompt.

        Returns:
            `list[int]`: for each prompt 0 if the first is better, 1 if the second is, -1 if they are equal.
        """
        sequences = []
        for prompt, (first, second) in zip(prompts, completions, strict=True):
            text = self.template.format(prompt=as_text(prompt), first=as_text(first), second=as_text(second))
            ids = _text_token_ids(self.tokenizer, text)
            sequences.append(_cut_left(ids, self.max_length, self.tokenizer))
            if len(sequences[-1]) < len(ids):
                self.counts[f"texts cut on the left at max_length={self.max_length}"] += 1
        verdicts = [-1] * len(sequences)
        batches = _padded_batches(sequences, self.batch_size, self.tokenizer.pad_token_id, self.model.device)
        for indices, input_ids, attention_mask in batches:
            logps = self._label_logps(input_ids, attention_mask)  # (batch_size, 2)
            for index, (first, second) in zip(indices, logps.tolist(), strict=True):
                verdicts[index] = -1 if first == second else int(second > first)
        return verdicts

    @torch.inference_mode()
    def _label_logps(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        last = attention_mask.sum(dim=1) - 1  # (batch_size,)
        kwargs, place = {}, last
        if self._can_keep_logits:
            kwargs["logits_to_keep"], place = torch.unique(last, return_inverse=True)
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).logits
        logits = logits[torch.arange(len(last), device=logits.device), place]  # (batch_size, vocabulary)
        return logits.float().log_softmax(dim=-1)[:, self.label_ids]


def _label_ids(tokenizer: PreTrainedTokenizerBase, template: str, labels: Sequence[str]) -> list[int]:
    """The token each label adds to the end of the template, where it may be another than the label's alone."""
    text = template.format(prompt="", first="", second="")
    before, label_ids = _text_token_ids(tokenizer, text), []
    for label in labels:
        after = _text_token_ids(tokenizer, text + label)
        if after[:-1] != before:
            raise ValueError(
                f"The judge's label {label!r} is not one token behind the template's end {text[-20:]!r}: it is "
                f"tokenised as {tokenizer.convert_ids_to_tokens(after[-4:])}. Choose labels of one token; if a space "
                "belongs to the token, take it off the template's end and put it before the labels."
            )
        label_ids.append(after[-1])
    if len(label_ids) != 2 or label_ids[0] == label_ids[1]:
        raise ValueError(f"labels={tuple(labels)!r}: give two different labels, for the first and the second.")
    return label_ids


def _text_token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = text_ids(tokenizer, text)
    # some tokenizers put an end token behind every text; the label has to come behind the template
    return ids[:-1] if ids and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id) else ids


def as_text(messages: str | Sequence[Mapping[str, Any]] | None) -> str:
    """
    Text or messages as text: what they say, with the roles in front if there are several. Content may be text, a list
    of parts, of which the text counts, or `None`.
    """
    if messages is None or isinstance(messages, str):
        return messages or ""
    contents = []
    for message in messages:
        content = message.get("content") or ""
        if not isinstance(content, str):
            parts = [part if isinstance(part, str) else part.get("text") for part in content]
            content = "".join(part or "" for part in parts)
        contents.append(content)
    if len(messages) == 1:
        return contents[0]
    return "\n\n".join(f"{m.get('role')}: {content}" for m, content in zip(messages, contents, strict=True))


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


class PairwiseScorer:
    """
    Scores completions by a knock-out tournament with a judge who compares two at a time (SLiC-HF §3.2).

    Each row's candidates are drawn into pairs, the winners are drawn against each other, and so on. K candidates cost
    K - 1 games. With a number that is not a power of two, one stands out a round (a bye), never the same one twice
    before the final. All games of a round, over all rows given, are judged in one call.

    Identical completions play as one. Completions that say nothing do not play and score -1, below all others.

    The score is the longest chain of wins (beat one who beat one who beat one ...). Without byes this is the number of
    games won. With them it differs, and only so does the winner of every game score higher than its loser: of three,
    the winner may have had the bye, and then won one game, as did the one it beat.

    The draw, and which of two is shown first (RSO swaps them to cancel a judge's liking for a place), follow from the
    seed and the row itself, not from the other rows, the order of the candidates or the number of processes.

    Args:
        judge (`Callable`):
            Called with the keyword arguments `prompts` and `completions`, a list of two completions for each prompt.
            Returns for each 0 if the first is better, 1 if the second is, and -1 if it cannot tell; a seeded coin then
            decides, and `counts` keeps count.
        seed (`int`, defaults to 42): of the draw, the places and the coin.
        name (`str`, *optional*): what messages and columns call it; by default the judge's name.
    """

    def __init__(self, judge: Callable, *, seed: int = 42, name: str | None = None):
        self.judge, self.seed, self.name = judge, seed, name or _function_name(judge)
        self.code = None if isinstance(judge, RankerModelJudge) else _code(judge)
        self.identity = [judge.identity if isinstance(judge, RankerModelJudge) else None, seed]
        # how many texts a model had to cut goes with our own counts
        self.counts: Counter[str] = judge.counts if isinstance(judge, RankerModelJudge) else Counter()

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[list[float | None]]:
        """Scores of every completion; see [`~PairwiseScorer.play`]."""
        return [tournament_scores(row, games) for row, games in zip(rows, self.play(rows), strict=True)]

    def play(self, rows: Sequence[Mapping[str, Any]]) -> list[list[list[int]]]:
        """
        Play the tournaments.

        Args:
            rows (`Sequence[dict]`): candidate rows.

        Returns:
            `list[list[list[int]]]`: for each row its games in the order they were played, each as `[winner, loser]`,
            which are indices into `completions`.

        Raises:
            TypeError, ValueError: the judge does not take the arguments, or does not return one of 0, 1 and -1 for
                each pair.
            RuntimeError: the judge raised; the cause is chained.
        """
        what = f"The judge {self.name!r}"
        rows, brackets = [as_given(row) for row in rows], []
        for row in rows:
            generator = _generator(self.seed, "tournament", row)
            brackets.append(_KnockOut([players[0] for players in _distinct(row["completions"])], generator))
        while any(bracket.pairings() for bracket in brackets):
            prompts, completions, swaps = [], [], []
            for row, bracket in zip(rows, brackets, strict=True):
                for pairing in bracket.pairings():
                    swaps.append(bracket.generator.random() < 0.5)
                    shown = reversed(pairing) if swaps[-1] else pairing
                    prompts.append(row["prompt"])
                    completions.append([row["completions"][index] for index in shown])
            verdicts = _as_list(_call(self.judge, what, prompts=prompts, completions=completions), what, len(prompts))
            verdicts = iter(
                self._first_wins(verdict, swapped) for verdict, swapped in zip(verdicts, swaps, strict=True)
            )
            for bracket in brackets:
                bracket.record([next(verdicts) for _ in bracket.pairings()])
        for bracket in brackets:
            self.counts["games"] += len(bracket.games)
            self.counts["games the judge could not decide: a coin did"] += bracket.num_coins
        return [[list(game) for game in bracket.games] for bracket in brackets]

    def _first_wins(self, verdict: Any, swapped: bool) -> bool | None:
        """Whether the first of a pairing wins, as it was before it was swapped; `None` if the judge cannot tell."""
        try:
            verdict = operator.index(verdict)
        except TypeError:
            verdict = repr(verdict)
        if verdict not in (0, 1, -1):
            raise ValueError(
                f"The judge {self.name!r} returned {verdict!s:.60} for a pair. It has to return 0 if the first is "
                "better, 1 if the second is, or -1 if it cannot tell."
            )
        return None if verdict == -1 else (verdict == 0) != swapped


class _KnockOut:
    """
    One row's tournament: who meets whom next, and the games so far as `(winner, loser)`.

    Args:
        players (`list[int]`): in an order that does not depend on that of the row's candidates.
        generator (`random.Random`): for the draw and for coins.
    """

    def __init__(self, players: list[int], generator: random.Random):
        self.generator, self.games, self.num_coins = generator, [], 0
        self.standing = generator.sample(players, len(players))

    def pairings(self) -> list[tuple[int, int]]:
        return list(zip(self.standing[::2], self.standing[1::2], strict=False))

    def record(self, first_wins: list[bool | None]) -> None:
        """Take the results of a round; a coin decides where they are `None`."""
        winners = []
        for (first, second), first_won in zip(self.pairings(), first_wins, strict=True):
            if first_won is None:
                first_won = self.generator.random() < 0.5
                self.num_coins += 1
            self.games.append((first, second) if first_won else (second, first))
            winners.append(self.games[-1][0])
        bye = self.standing[2 * len(winners) :]
        self.standing = bye + winners  # the bye to the front: the last one stands out next time


def tournament_scores(row: Mapping[str, Any], games: Sequence[Sequence[int]]) -> list[float]:
    """
    The scores that a row's games give: the longest chain of wins, see [`PairwiseScorer`].

    Args:
        row (`dict`): a candidate row.
        games (`Sequence`): `[winner, loser]` indices into `completions`, in the order they were played.

    Returns:
        `list[float]`: one score per completion; identical ones share it, empty ones have -1.
    """
    chain: Counter[int] = Counter()
    for winner, loser in games:
        chain[winner] = max(chain[winner], chain[loser] + 1)
    scores = [-1.0] * len(row["completions"])
    for players in _distinct(row["completions"]):
        for index in players:
            scores[index] = float(chain[players[0]])
    return scores


def _key(text: str | list) -> str:
    """Text or messages as one string; keys that are None, at any depth, do not count: Arrow fills them in."""
    if isinstance(text, str):
        return text
    return json.dumps(without_nulls(text), sort_keys=True, ensure_ascii=False, default=str)


def _is_empty(completion: Any) -> bool:
    try:
        _check_text(completion, "completions", is_completion=True)
    except RowError as error:
        return error.problem == "empty"
    return False


def _distinct(completions: Sequence) -> list[list[int]]:
    """Indices of the completions that say something, identical ones together; sorted by what they say."""
    found: dict[str, list[int]] = {}
    for index, completion in enumerate(completions):
        if not _is_empty(completion):
            found.setdefault(_key(completion), []).append(index)
    return [found[key] for key in sorted(found)]


def _generator(seed: int, purpose: str, row: Mapping[str, Any]) -> random.Random:
    """Random numbers of a row's own: from the seed, the prompt and its candidates, in whatever order they are."""
    content = [seed, purpose, _key(row["prompt"]), sorted(_key(completion) for completion in row["completions"])]
    return random.Random(hashlib.sha256(json.dumps(content).encode()).digest())


def _check_row(row: Mapping[str, Any]) -> None:
    for column in ("prompt", "completions"):
        if row.get(column) is None:
            raise RowError("missing", column, f"is missing; the columns are {sorted(row)}")
    prompt, completions = row["prompt"], row["completions"]
    if not isinstance(completions, list):
        raise RowError("not text", "completions", f"is {type(completions).__name__}, not a list")
    _check_text(prompt, "prompt", is_completion=False)
    for index, completion in enumerate(completions):
        column = f"completions[{index}]"
        try:
            _check_text(completion, column, is_completion=True)
        except RowError as error:
            if error.problem != "empty":  # counted and left out later
                raise
        if not isinstance(completion, type(prompt)):
            form = type(prompt).__name__
            raise RowError("mixed", column, f"is {type(completion).__name__} while 'prompt' is {form}")
    for column in ("completion_ids", "token_ids", "logps", "num_tokens", "ends", "sources"):
        values = row.get(column)
        if values is not None and (not isinstance(values, list) or len(values) != len(completions)):
            given = f"{len(values)} entries" if isinstance(values, list) else type(values).__name__
            raise RowError("not a list", column, f"has {given} for {len(completions)} completions")
    for logp in row.get("logps") or []:
        if logp is not None:
            _check_number(logp, "logps")


def _check_rows(rows: Sequence[Mapping[str, Any]], check: Callable) -> None:
    if not rows:
        raise ValueError("There are no rows. Check the candidates, and the split they come from.")
    for index, row in enumerate(rows):
        try:
            check(row)
        except RowError as error:
            raise ValueError(f"Row {index}: {error}. {REMEDIES[error.problem]}") from None


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
        raise ValueError(f"dtype={dtype!r} is not known. Set it to 'auto', 'float32', 'bfloat16' or 'float16'.")
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
            "There is nothing to score with. Name a reward function ('path/to/file.py:function'), a reward model or a "
            "judge."
        )
    if len(set(specs)) < len(specs):
        twice = next(spec for spec in specs if specs.count(spec) > 1)
        raise ValueError(f"{twice!r} is named twice. Name it once, and give it a weight instead.")
    _check_weights(weights, specs, [] if judge is None else [judge])
    are_models = [_names_a_model(spec, "reward") for spec in rewards]
    judge_is_model = judge is not None and _names_a_model(judge, "judge")
    # all names are read before a function's module is run
    functions = [
        None if is_model else load_reward_function(spec) for spec, is_model in zip(rewards, are_models, strict=True)
    ]
    return rewards, functions, None if judge is None or judge_is_model else load_reward_function(judge)


@dataclass
class ScorerConfig:
    """
    How models that score, and judges that are models, are run. A recipe's config can inherit from it.

    Parameters:
        reward_batch_size (`int`, *optional*, defaults to `16`): completions, or comparisons, at a time.
        reward_dtype (`str`, *optional*, defaults to `"auto"`): of the weights; `"auto"` is the checkpoint's.
        reward_max_length (`int`, *optional*): longest text in tokens, cut on the left; by default what the model can
            take.
        reward_trust_remote_code (`bool`, *optional*, defaults to `False`): run code that comes with the model.
    """

    reward_batch_size: int = field(
        default=16, metadata={"help": "Completions a reward model or judge reads at a time."}
    )
    reward_dtype: str = field(default="auto", metadata={"help": "Of reward models; 'auto' is the checkpoint's."})
    reward_max_length: int | None = field(
        default=None, metadata={"help": "Longest text a reward model reads, in tokens; default: what it can take."}
    )
    reward_trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with a reward model."}
    )

    def scorer_options(self) -> dict[str, Any]:
        """Keyword arguments for [`build_scorers`] and [`check_scorers`]."""
        return {
            "batch_size": self.reward_batch_size,
            "dtype": self.reward_dtype,
            "max_length": self.reward_max_length,
            "trust_remote_code": self.reward_trust_remote_code,
        }


def _names_a_model(spec: str, role: str) -> bool:
    """Whether a text is the name of a model, not of a function; refuses what is neither."""
    path = Path(spec).expanduser()
    if os.path.isdir(path):
        return True
    if ":" in spec:
        return False
    if spec.endswith(".py"):
        raise ValueError(f"The {role} {spec!r} is a file without a function. Write '{spec}:function'.")
    if not spec or spec.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"The {role} {spec!r} looks like a folder, and there is none. Correct the path, or write "
            "'path/to/file.py:function' for a function."
        )
    return True


def _check_weights(weights: Sequence[float] | None, names: Sequence[str], judges: Sequence[str] = ()) -> list[float]:
    if weights is None:
        return [1.0] * len(names)
    if list(names) == list(judges):
        raise ValueError(
            f"Weights are given ({', '.join(map(str, weights))}) and the judge {names[0]!r} scores alone: there is "
            "nothing to weigh it against. Leave them out."
        )
    if len(weights) != len(names):
        raise ValueError(
            f"{len(weights)} weights are given for {len(names)} scorers ({', '.join(names)}). Give one for each, in "
            "this order, or none for an equal sum."
        )
    for weight, name in zip(weights, names, strict=True):
        if not math.isfinite(weight):
            raise ValueError(f"The weight of {name!r} is {weight}. Give a finite number.")
        if weight < 0 and name in judges:
            raise ValueError(
                f"The weight of the judge {name!r} is {weight}: who wins its games would score lower. Give a positive "
                "number, or name a judge who prefers the opposite."
            )
    if not any(weights):
        raise ValueError("All weights are 0, so that all scores are equal. Give one of them another number.")
    return [float(weight) for weight in weights]


def combine(values: Sequence[Sequence[float | None]], weights: Sequence[float]) -> list[float]:
    """
    The weighted sum of several scorers' values for the completions of one row. `None` counts as 0, as in TRL.

    Args:
        values (`Sequence`): for each scorer, a value or `None` for each of the K completions.
        weights (`Sequence[float]`): one per scorer.

    Returns:
        `list[float]`: K scores.

    Raises:
        ScoringError: a completion for which every scorer gave `None`.
    """
    scores = []
    for index, column in enumerate(zip(*values, strict=True)):
        if all(value is None for value in column):
            raise ScoringError(
                "Scoring", 0, index,
                "every reward function returned None, so it has no score. Let one of them return a number, or leave "
                "the row out.",
            )  # fmt: skip
        scores.append(
            math.fsum(weight * value for weight, value in zip(weights, column, strict=True) if value is not None)
        )
    return scores


def score_rows(
    rows: Sequence[Mapping[str, Any]],
    scorers: Sequence[Scorer],
    weights: Sequence[float] | None = None,
    *,
    batch_size: int = 64,
    folder: str | Path | None = None,
    desc: str = "Scoring",
) -> list[dict[str, Any]]:
    """
    Score the candidates of all rows, split over the processes of the run.

    Batches of rows go to the processes in turn. They are the same batches for any number of processes, so the result
    is the same to the last digit.

    With a `folder`, each batch is kept there once it is scored: when a later one fails, the same call goes on with
    what is left, with any number of processes. Other rows, scorers or batches begin anew, in another subfolder; other
    weights do not. If the file of a reward function has changed, a finished scoring begins anew, and an unfinished one
    goes on with a warning: it may be that the function was mended, and what it had scored was paid for.

    What scorers count (texts cut, games decided by a coin) is summed over the processes, kept in their `counts`, and
    logged.

    Args:
        rows (`Sequence[dict]`): candidate rows, the same on all processes. They are left as they are.
        scorers (`Sequence[Scorer]`): one or several; their names must differ.
        weights (`Sequence[float]`, *optional*): of the scorers; by default 1 each.
        batch_size (`int`, defaults to 64): rows a scorer sees at a time.
        folder (`str` or `Path`, *optional*): where scores are kept on the way; all processes must see it.
        desc (`str`): of the progress bar.

    Returns:
        `list[dict]`: the rows in their order with `scores`, the weighted sum ([`combine`]). With several scorers also
        `rewards/<name>`, each one's own values or `None`. With a [`PairwiseScorer`] alone also `games`, as
        [`~PairwiseScorer.play`] gives them; in a sum with others its games no longer tell who scores higher. The same
        on all processes.

    Raises:
        ValueError: unusable rows, scorers or weights, or a completion without a score ([`ScoringError`]).
        RuntimeError: a function raised, here (the cause is chained) or on another process.
    """
    rows, names = [as_given(row) for row in rows], [scorer.name for scorer in scorers]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"The scorers are {names}. Give one or more, with a name of its own each.")
    judges = [scorer.name for scorer in scorers if isinstance(scorer, PairwiseScorer)]
    weights = _check_weights(weights, names, judges)
    _check_batch_size(batch_size)
    _check_rows(rows, _check_row)
    state = process_state()
    starts = range(0, len(rows), batch_size)
    files, scored = {}, {}
    if folder is not None:
        place = _open_scores(Path(folder), rows, scorers, batch_size)
        files = {start: _scores_file(place, number) for number, start in enumerate(starts)}
        scored = {start: _read_scores(file, place, start) for start, file in files.items() if file.exists()}
        state.wait_for_everyone()  # all processes have looked before one of them finishes a batch
    unfinished = [start for start in starts if start not in scored]
    counts_before = [Counter(getattr(scorer, "counts", {})) for scorer in scorers]
    done: list[tuple[int, dict]] = []
    failure = None
    try:
        for start in tqdm(
            unfinished[state.process_index :: state.num_processes],
            desc=desc,
            disable=not state.is_main_process,
            leave=False,
        ):
            done.append((start, _score_batch(rows[start : start + batch_size], start, scorers, weights)))
            if start in files:
                batch = json.loads(json.dumps(done[-1][1], default=float))
                write_atomically(files[start], sealed({"of": [place.name, start], **batch}))
    except Exception as error:  # the other processes wait for us below
        failure = error
    message = None if failure is None else f"process {state.process_index}, {type(failure).__name__}: {failure}"
    wait_as_long_as_it_takes()
    everything = from_all((done, message))
    if failure is not None:
        if folder is not None:
            failure.add_note(f"What was scored before is kept in {place}: the same call goes on from there.")
        raise failure
    for _, message in everything:
        if message is not None:
            raise RuntimeError(f"Scoring failed on another process ({message})")

    scored |= {start: batch for parts, _ in everything for start, batch in parts}
    for index, scorer in enumerate(scorers):
        total = sum((Counter(scored[start]["counts"][index]) for start in starts), Counter())
        if total:
            scorer.counts.clear()
            scorer.counts.update(counts_before[index] + total)
            if state.is_main_process:
                said = ", ".join(f"{count} {what}" for what, count in total.items())
                # the first counts what was done, any other what went wrong on the way
                logger.log(logging.WARNING if len(total) > 1 else logging.INFO, f"{scorer.name}: {said}")
    result = []
    for start in starts:
        values, games = scored[start]["values"], scored[start]["games"]
        for index, row in enumerate(rows[start : start + batch_size]):
            kept = {k: v for k, v in row.items() if k not in ("scores", "games") and not k.startswith("rewards/")}
            of_row = [column[index] for column in values]
            result.append({**kept, "scores": combine(of_row, weights)})
            if len(scorers) > 1:
                result[-1] |= {f"rewards/{name}": value for name, value in zip(names, of_row, strict=True)}
            elif games is not None:
                result[-1]["games"] = games[index]
    return result


def _score_batch(
    rows: list[Mapping[str, Any]], start: int, scorers: Sequence[Scorer], weights: list[float]
) -> dict[str, Any]:
    """Values of each scorer for each row, the last judge's games, and what each scorer counted; in JSON's types."""
    games, values = None, []
    before = [Counter(getattr(scorer, "counts", {})) for scorer in scorers]
    try:
        for scorer in scorers:
            if isinstance(scorer, PairwiseScorer):
                games = scorer.play(rows)
                values.append([tournament_scores(row, played) for row, played in zip(rows, games, strict=True)])
            else:
                values.append(scorer(rows))
        for index, of_row in enumerate(zip(*values, strict=True)):
            try:
                combine(of_row, weights)
            except ScoringError as error:
                error.row = index
                raise
    except ScoringError as error:
        error.prompt = rows[error.row]["prompt"]
        error.row += start
        raise
    except Exception as error:
        error.add_note(f"Rows {start} to {start + len(rows) - 1} were being scored.")
        raise
    counts = [Counter(getattr(scorer, "counts", {})) - b for scorer, b in zip(scorers, before, strict=True)]
    return {"values": values, "games": games, "counts": [dict(count) for count in counts]}


def _open_scores(folder: Path, rows: list, scorers: Sequence[Scorer], batch_size: int) -> Path:
    """The subfolder for the scores of these rows by these scorers; the same on all processes."""
    state, place = process_state(), None
    if state.is_main_process:
        of_completions = ("prompt", "completions", "completion_ids", "ends")
        said_to_scorers = [
            {k: v for k, v in row.items() if k in of_completions or _belongs_to_prompt(k)} for row in rows
        ]
        who = [
            [type(scorer).__name__, scorer.name, *(getattr(scorer, key, None) for key in ("spec", "identity"))]
            for scorer in scorers
        ]
        identity = json.dumps([said_to_scorers, who, batch_size], sort_keys=True, default=str)
        place = folder / hashlib.sha256(identity.encode()).hexdigest()[:16]
        code, file = [getattr(scorer, "code", None) for scorer in scorers], place / "code.json"
        if file.exists() and file.read_text() != json.dumps(code):
            numbers = range(math.ceil(len(rows) / batch_size))
            kept = [_scores_file(place, number) for number in numbers if _scores_file(place, number).exists()]
            if len(kept) == len(numbers):
                logger.info(f"A reward function has changed since {place} was made: scoring anew.")
                for portion in kept:
                    portion.unlink()
            elif kept:
                logger.warning(
                    f"A reward function has changed. What it had scored before is kept, {len(kept)} of {len(numbers)} "
                    f"portions in {place}; remove that folder to score everything anew."
                )
        write_atomically(file, json.dumps(code))
    return from_all(place)[0]  # the main process's


def _read_scores(file: Path, place: Path, start: int) -> dict[str, Any]:
    try:
        batch = read_sealed(file, {"of": list, "values": list, "counts": list})
        if batch["of"] != [place.name, start]:
            raise ValueError(f"{file} holds the scores of other rows.")
    except ValueError as error:
        raise ValueError(f"{error} Put back what was there, or remove it to score its rows again.") from None
    return batch


def _scores_file(place: Path, number: int) -> Path:
    return place / f"{number:05d}.json"


def reward_functions(scorers: Sequence[Scorer], is_cut: Callable[[list[int]], bool]) -> list[Callable]:
    """
    Scorers as reward functions of the kind TRL's `RLOOTrainer` and `GRPOTrainer` take: what a scorer reads is what it
    reads here, wherever it is used. A function gets the columns that [`FunctionScorer`] gives it, and needs no
    `**kwargs`.

    Args:
        scorers (`Sequence[Scorer]`): one or several.
        is_cut (`Callable`): tells of a completion's token ids whether it was ended by its length alone. A reward model
            then reads it without an end token.
    """
    return [_reward_function(scorer, is_cut) for scorer in scorers]


def _reward_function(scorer: Scorer, is_cut: Callable[[list[int]], bool]) -> Callable:
    def reward(prompts, completions, completion_ids, **columns):
        kept = {name: values for name, values in columns.items() if name not in TRL_REWARD_ARGUMENTS}
        kept["ends"] = [["length" if is_cut(ids) else "stop"] for ids in completion_ids]
        rows = [
            {"prompt": prompt, "completions": [completion], **{name: values[index] for name, values in kept.items()}}
            for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        return [score for (score,) in scorer(rows)]

    reward.__name__ = scorer.name
    return reward
