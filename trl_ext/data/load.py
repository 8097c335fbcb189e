"""Datasets for the recipes: local files, folders, the Hub and TRL's mixtures."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any


def load_datasets(script_args, dataset_args, *, with_eval: bool, seed: int) -> tuple[Any, Any]:
    """
    Load the train split, and the eval split if one is wanted. Row numbers in messages are those of the split.

    `dataset_name` may be a Hub name, a local file that `datasets` reads by its ending, a folder with such files, or a
    folder written by `Dataset.save_to_disk`. `datasets` in a config file is TRL's mixture. Data without an eval split
    is split with `--test_split_size`.

    Raises:
        FileNotFoundError: `dataset_name` looks like a local path and is not there.
        ValueError: no dataset, or no split of the wanted name.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk
    from trl import get_dataset

    from .files import csv_as_text, fault_of, names_a_file

    name, streaming = script_args.dataset_name, script_args.dataset_streaming
    if dataset_args.datasets:
        if streaming or script_args.dataset_config is not None:
            raise ValueError(
                "`dataset_streaming` and `dataset_config` must not be set with `datasets`. Set `streaming` in the "
                "config file, and `name` in each entry of `datasets`."
            )
        streaming = dataset_args.streaming
        if name:
            raise ValueError(f"`dataset_name` must not be set with `datasets`, got {name!r}. Remove one of them.")
        # the split is ours: TRL's is not seeded
        with csv_as_text():
            dataset = get_dataset(dataclasses.replace(dataset_args, test_split_size=None))
    elif name is None:
        raise ValueError(
            "`--dataset_name` must be set where a model is given. Set it to a Hub name, a local file or a folder. "
            "With neither a model nor data, the recipe runs its playground."
        )
    else:
        path = Path(name).expanduser()
        name = str(path) if name.startswith("~") else name
        is_file = os.path.isfile(path)
        is_saved = any(os.path.isfile(path / made) for made in ("dataset_dict.json", "dataset_info.json"))
        if script_args.dataset_config is not None and (is_file or is_saved or names_a_file(path)):
            raise ValueError(
                f"`dataset_config` must not be set with local data, got {script_args.dataset_config!r}. Remove it."
            )
        if is_file:
            dataset = _load_file(path, streaming)
        elif is_saved:
            if streaming:
                raise ValueError("Data written by `save_to_disk` cannot be streamed. Remove `--dataset_streaming`.")
            dataset = load_from_disk(name)
        elif not path.exists() and (names_a_file(path) or name.startswith((".", "/"))):
            kind = "file" if names_a_file(path) else "folder"
            raise FileNotFoundError(
                f"`dataset_name` must be a Hub name or a local {kind}, got {name!r}, which is not there. Correct the "
                "path."
            )
        else:
            try:
                with csv_as_text():
                    where = str(path.resolve()) if path.is_dir() else name  # `datasets` finds no name in "."
                    dataset = load_dataset(where, name=script_args.dataset_config, streaming=streaming)
            except Exception as error:
                fault = fault_of(path) if path.is_dir() else None
                if fault is None:
                    raise
                raise ValueError(fault) from error
        if not isinstance(dataset, dict):
            dataset = DatasetDict({script_args.dataset_train_split: dataset})

    train_split, eval_split = script_args.dataset_train_split, script_args.dataset_test_split
    if train_split not in dataset:
        raise ValueError(f"`dataset_train_split` must be one of {sorted(dataset)}, got {train_split!r}. Set it.")
    train_dataset = dataset[train_split]
    if dataset_args.test_split_size is not None and (not with_eval or eval_split in dataset):
        why = f"there is a split {eval_split!r}" if eval_split in dataset else "evaluation is off"
        raise ValueError(
            f"`test_split_size` has no effect, got {dataset_args.test_split_size}: {why}. Remove it"
            + (", or set `--eval_strategy steps`." if not with_eval else ".")
        )
    if not with_eval:
        return train_dataset, None
    if eval_split in dataset:
        return train_dataset, dataset[eval_split]
    if dataset_args.test_split_size is None or streaming:
        raise ValueError(
            f"`dataset_test_split` must be one of {sorted(dataset)}, got {eval_split!r}. Set it, or "
            "`--test_split_size 0.1` to hold out rows of the train split (not for streams), or `--eval_strategy no`."
        )
    parts = train_dataset.train_test_split(test_size=dataset_args.test_split_size, seed=seed)
    return parts["train"], parts["test"]


def _load_file(path: Path, streaming: bool) -> dict[str, Any]:
    """[`~trl_ext.data.files.load_file`], imported when it is needed: importing `datasets` takes seconds."""
    from .files import load_file

    return load_file(path, streaming)


def load_prompts(script_args, dataset_args) -> list[dict[str, Any]]:
    """
    The rows of the train split, for sampling. A prompt that is only implied by `chosen` and `rejected`, or that
    repeats the first message of these conversations as text, becomes what training would see.

    Raises:
        ValueError: rows without a prompt, rows that cannot be kept as JSON, or a stream.
    """
    from .columns import as_given, check_features, without_files
    from .files import in_one_line
    from .row_error import RowError
    from .rows import prompt_of

    if script_args.dataset_streaming or dataset_args.streaming:
        raise ValueError("Prompts to sample for cannot be streamed. Remove `--dataset_streaming`.")
    dataset_args = dataclasses.replace(dataset_args, test_split_size=None)  # for the training on what is sampled
    dataset, _ = load_datasets(script_args, dataset_args, with_eval=False, seed=0)
    dataset = without_files(dataset, "prompt")
    check_features(dataset.features, "prompt")
    columns = set(dataset.column_names)
    if "prompt" not in columns and not columns >= {"chosen", "rejected"}:
        raise ValueError(
            f"The dataset must have a column `prompt` to sample answers for, got {sorted(columns)}. Rename or add one."
        )
    try:
        rows = [as_given(row) for row in dataset.to_list()]
    except Exception as error:
        raise ValueError(f"The rows of the dataset cannot be read: {in_one_line(error)}. Correct them.") from error
    for index, row in enumerate(rows):
        refuse_unless_json(row, index)
        try:
            row["prompt"] = prompt_of(row)
        except RowError as error:
            raise ValueError(f"Row {index}: {error}. Give each row its `prompt`.") from None
    return rows


def refuse_unless_json(row: dict[str, Any], index: int) -> None:
    """Raise a `ValueError` that names the column of a row that cannot be kept as JSON."""
    column = next((name for name, value in row.items() if not _is_jsonable(value)), None)
    if column is not None:
        raise ValueError(
            f"Row {index}: column {column!r} must hold what JSON can, got {row[column]!r:.60}. Turn it into text or "
            "numbers, or remove the column."
        )


def _is_jsonable(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
