"""SPIN's rows: prompts with real answers."""

from collections.abc import Sequence
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ...data.columns import TEMPLATE_COLUMNS, as_given, check_features, without_files
from ...data.limits import Limits
from ...data.load import refuse_unless_json
from ...data.prepare import prepare_row, refuse_outside_window
from ...data.prompts import hold_out, prompt_key, prompt_token_ids
from ...data.row_error import RowError, refusal
from ...data.rows import RowOptions, parse_row
from .config import SPINConfig


def is_sft_data(dataset: Dataset | IterableDataset) -> bool:
    """Whether rows hold real answers alone, on which all iterations are played."""
    columns = set(dataset.column_names or next(iter(dataset), {}))
    return bool(columns & {"completion", "messages"}) and not columns & {"chosen", "rejected", "prompt_ids"}


def sft_rows(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: SPINConfig, limits: Limits | None, name: str
) -> list[dict[str, Any]]:
    """
    Check rows of SFT, and give them one form.

    Args:
        dataset ([`~datasets.Dataset`]): rows of `prompt` and `completion`, text or messages, or of `messages`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's.
        config ([`SPINConfig`]): for `max_length`, `max_new_tokens`, `first_turn_only` and `on_invalid_row`.
        limits ([`Limits`], *optional*): of the model.
        name (`str`): how messages call the dataset.

    Returns:
        `list[dict]`: the rows that can be used, with `prompt` and `completion`, both text or both messages, and
        whatever other columns there are.

    Raises:
        ValueError: a column is missing, or rows cannot be used, unless `on_invalid_row="drop"`; nothing is left; a row
            that the model has too few positions or token embeddings for.
    """
    dataset = without_files(dataset, name)
    check_features(dataset.features, name)
    columns = set(dataset.column_names)
    if "messages" not in columns and not {"prompt", "completion"} <= columns:
        raise ValueError(
            f"The {name} dataset must have `prompt` and `completion` (the real answer), or `messages` that end with "
            f"it, got the columns {sorted(columns)}. Rename or add the columns."
        )
    if "label" in columns:
        raise ValueError(
            f"The {name} dataset must not have a column `label`: SPIN would imitate the bad answers too. Keep the "
            "rows with good answers, and remove the column."
        )
    if "messages" not in columns and config.first_turn_only:
        raise ValueError(
            "`first_turn_only` must be False for rows of `prompt` and `completion`, got True: it cuts `messages`. "
            "Remove it."
        )
    options = RowOptions(min_completions=1, max_length=config.max_length, eos_token=tokenizer.eos_token)
    check_row = None if limits is None else limits.row_check(name, tokenizer, config.max_length)
    rows, problems = [], {}
    for index, row in enumerate(dataset):
        try:
            refuse_unless_json(row, index)
            sft_row, prepared = _sft_row(as_given(row), tokenizer, config, options)
            if limits is not None:
                num_tokens = len(prompt_token_ids(tokenizer, sft_row))
                refuse_outside_window(num_tokens, config.max_new_tokens, limits.made_for)
                check_row(prepared)
            rows.append(sft_row)
        except RowError as error:
            answer = "messages" if "messages" in columns else "completion"
            detail = str(error).replace("'completions[0]'", repr(answer))
            problems.setdefault(error.problem, []).append((index, detail))
    if not rows or (problems and config.on_invalid_row == "error"):
        raise ValueError(refusal(name, len(dataset), problems) if problems else f"The {name} dataset has no rows.")
    if problems:
        count = sum(map(len, problems.values()))
        PartialState().print(
            f"{name} data: {len(dataset)} rows, {count} dropped: "
            + ", ".join(f"{problem} {len(found)}" for problem, found in sorted(problems.items()))
        )
    return rows


def _sft_row(row, tokenizer, config: SPINConfig, options: RowOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row in one form, and what training would make of its real answer."""
    row = {key: value for key, value in row.items() if value is not None or key not in TEMPLATE_COLUMNS}
    if "messages" in row:
        row["prompt"], row["completion"] = _split(row.pop("messages"), config.first_turn_only)
    if not row.get("prompt"):
        raise RowError("missing", "prompt", "is missing or empty")
    candidate = {**row, "completions": [row["completion"]], "scores": [0.0]}
    row["prompt"], (row["completion"],), *_ = parse_row(candidate, options)
    if isinstance(row["completion"], list) and len(row["completion"]) > 1:
        raise RowError("not an answer", "completion", f"has {len(row['completion'])} messages, where one is wanted")
    return row, prepare_row(candidate, tokenizer, options)


def _split(messages: Any, first_turn_only: bool) -> tuple[list, list]:
    """Prompt and answer of a conversation."""
    if not isinstance(messages, list) or not messages:
        raise RowError("missing", "messages", "is missing or empty")
    if not all(isinstance(message, dict) for message in messages):
        raise RowError("missing", "messages", "is not a list of messages with `role` and `content`")
    roles = [message.get("role") for message in messages]
    if first_turn_only and "assistant" in roles:
        messages = messages[: roles.index("assistant") + 1]
    last = messages[-1].get("role")
    if last != "assistant":
        raise RowError("not an answer", "messages", f"ends with a message of the {last}, not with an answer")
    if len(messages) == 1:
        raise RowError("missing", "messages", "has an answer and no question before it")
    return messages[:-1], messages[-1:]


def as_dataset(rows: Sequence[dict]) -> Dataset:
    """Rows of which some have a column that others lack; `Dataset.from_list` would take the first row's columns."""
    columns = dict.fromkeys(column for row in rows for column in row)
    filled = [{column: row.get(column) for column in columns} for row in rows]
    return Dataset.from_list(filled, on_mixed_types="use_json")  # arguments of tool calls differ in type


def train_and_watched(train_dataset, eval_dataset, tokenizer, config: SPINConfig, limits: Limits | None):
    rows = sft_rows(train_dataset, tokenizer, config, limits, "train")
    if eval_dataset is not None:
        watched = sft_rows(eval_dataset, tokenizer, config, limits, "eval")
        prompts = set(map(prompt_key, watched))
        train = [row for row in rows if prompt_key(row) not in prompts]
        if not train:
            raise ValueError(
                "The train dataset must have prompts that are not in the eval dataset, got none. Use another eval "
                "dataset."
            )
        if len(train) < len(rows):
            PartialState().print(f"{len(rows) - len(train)} rows are left out: their prompts are in the eval dataset")
        return train, watched
    if config.num_watched_prompts == 0:
        return rows, []
    return hold_out(rows, config.num_watched_prompts, config.seed)
