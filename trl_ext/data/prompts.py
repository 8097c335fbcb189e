"""Rows of prompts: checking them before sampling, holding some out, answers that are mixed in."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from .._trl import _tokenize
from .columns import as_given, without_nulls
from .limits import Limits
from .messages import template_kwargs
from .prepare import prepare_row, refuse_outside_window
from .row_error import RowError, refusal
from .rows import RowOptions, _says_something
from .tokens import text_ids


def check_prompts(
    rows: Sequence[dict],
    tokenizer,
    options: RowOptions,
    mix_in: Sequence[str],
    on_invalid_row: str,
    *,
    limits: Limits | None = None,
    max_new_tokens: int = 0,
) -> list[dict]:
    """
    Find the rows that sampling or training would refuse whatever is sampled, by preparing each with a short answer and
    those that are mixed in.

    Args:
        rows (`Sequence[dict]`): with `prompt`, columns to mix in, and others.
        tokenizer: the model's.
        options ([`RowOptions`]): what the trainer wants.
        mix_in (`Sequence[str]`): columns with further answers.
        on_invalid_row (`str`): `"error"`, or `"drop"` to leave such rows out, and say so.
        limits ([`Limits`], *optional*): of the model.
        max_new_tokens (`int`, defaults to 0): of the answers that are sampled.

    Returns:
        `list[dict]`: the rows that can be used.

    Raises:
        ValueError: rows that cannot be used, with their numbers; a row that the model has too few positions or token
            embeddings for.
    """
    options = replace(options, min_completions=1, eos_token=tokenizer.eos_token)
    usable, problems = [], {}
    window, check_row = None, None
    if limits is not None:
        window, check_row = limits.made_for, limits.row_check("prompt", tokenizer, options.max_length)
    for index, row in enumerate(rows):
        stub = "x" if isinstance(row["prompt"], str) else [{"role": "assistant", "content": "x"}]
        answers = [stub, *(answer for column in mix_in for answer in mixed_in(row, column))]
        known = {key: row[key] for key in ("prompt", "reference", "tools", "chat_template_kwargs") if key in row}
        try:
            prepared = prepare_row(
                {**known, "completions": answers, "scores": [0.0] * len(answers)}, tokenizer, options
            )
            if limits is not None:
                refuse_outside_window(len(prompt_token_ids(tokenizer, row)), max_new_tokens, window)
                check_row(prepared)
        except RowError as error:
            problems.setdefault(error.problem, []).append((index, str(error)))
        else:
            usable.append(row)
    if problems and (on_invalid_row == "error" or not usable):
        raise ValueError(refusal("prompt", len(rows), problems))
    for problem, found in problems.items():
        PartialState().print(f"prompts dropped, {problem}: {len(found)} rows")
    return usable


def hold_out(rows: Sequence[dict], number: int, seed: int) -> tuple[list[dict], list[dict]]:
    """
    Split rows into those to train on and `number` to watch. Equal prompts stay on one side.

    Raises:
        ValueError: more than half of the prompts would be watched.
    """
    prompts = list(dict.fromkeys(map(prompt_key, rows)))
    if 2 * number > len(prompts):
        raise ValueError(
            f"`num_watched_prompts` must be at most half of the {len(prompts)} different prompts, got {number}. Lower "
            "it."
        )
    chosen = set(random.Random(seed).sample(prompts, number))
    train, watched = [], {}
    for row in rows:
        prompt = prompt_key(row)
        if prompt not in chosen:
            train.append(row)
        else:
            watched.setdefault(prompt, row)
    num_left_out = len(rows) - len(train) - len(watched)
    if num_left_out:
        PartialState().print(f"{num_left_out} rows are dropped: another row with their prompt is held out")
    return train, list(watched.values())


def prompt_key(row: dict) -> str:
    """The same for equal prompts, text or messages."""
    return json.dumps(row["prompt"], sort_keys=True)


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> list[int]:
    """The tokens a model answers to, by the template training uses too."""
    if isinstance(row["prompt"], str):
        return text_ids(tokenizer, row["prompt"])
    row = as_given(row)
    return _tokenize(tokenizer, row["prompt"], add_generation_prompt=True, **template_kwargs(row))["input_ids"]


def as_answers(value: Any) -> list:
    """The answers in a column of the data, which holds one or a list of them; `None` says nothing."""
    is_list_of_answers = isinstance(value, list) and not (value and isinstance(value[0], Mapping))
    return [answer for answer in (value if is_list_of_answers else [value]) if answer is not None]


def mixed_in(row: Mapping[str, Any], column: str) -> list:
    """
    The answers in a column of the data that say something, in the form of the row's prompt; conversations without the
    prompt in front.
    """
    prompt, answers = row["prompt"], as_answers(row[column])
    if isinstance(prompt, str):
        return [answer for answer in answers if answer.strip()]
    prompt, found = without_nulls(prompt), []
    for answer in answers:
        messages = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else without_nulls(answer)
        if messages[: len(prompt)] == prompt:
            messages = messages[len(prompt) :]
        if any(_says_something(message) for message in messages):
            found.append(messages)
    return found
