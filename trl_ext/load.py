"""Datasets for the recipes: local files, folders, the Hub and TRL's mixtures."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_datasets(script_args, dataset_args, *, with_eval: bool, seed: int) -> tuple[Any, Any]:
    """
    Load the train split, and the eval split if one is wanted. Row numbers in messages are those of the split.

    `dataset_name` may be a Hub name, a local `.json`, `.jsonl`, `.parquet` or `.csv` file, a folder with such files,
    or a folder written by `Dataset.save_to_disk`. `datasets` in a config file is TRL's mixture. Data without an eval
    split is split with `--test_split_size`.

    Raises:
        FileNotFoundError: `dataset_name` looks like a local path and is not there.
        ValueError: no dataset, or no split of the wanted name.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk
    from trl import get_dataset

    name, streaming = script_args.dataset_name, script_args.dataset_streaming
    if dataset_args.datasets:
        if streaming or script_args.dataset_config is not None:
            raise ValueError(
                "`dataset_streaming` and `dataset_config` mean nothing for a mixture. Set `streaming` in the config "
                "file, and `name` in each of its `datasets`."
            )
        streaming = dataset_args.streaming
        if name:
            raise ValueError(f"Both `datasets` and dataset_name={name!r} are given. Leave one of them out.")
        # the split is ours: TRL's is not seeded
        dataset = get_dataset(dataclasses.replace(dataset_args, test_split_size=None))
    elif name is None:
        raise ValueError(
            "A model is given but no data. Set `--dataset_name` to a Hub name, a local file or a folder; with neither "
            "a model nor data the recipe runs its playground."
        )
    else:
        path = Path(name).expanduser()
        name = str(path) if name.startswith("~") else name
        is_saved = any(os.path.isfile(path / made) for made in ("dataset_dict.json", "dataset_info.json"))
        if script_args.dataset_config is not None and (path.suffix in FILE_FORMATS or is_saved):
            raise ValueError(
                f"dataset_config={script_args.dataset_config!r} means nothing for local data. Leave it out."
            )
        if path.suffix in FILE_FORMATS:
            if not os.path.isfile(path):
                raise FileNotFoundError(
                    f"dataset_name={name!r} looks like a local file, and there is none. Mend the path."
                )
            dataset = _load_file(path, streaming)
        elif is_saved:
            if streaming:
                raise ValueError("Data written by `save_to_disk` is not streamed. Leave `--dataset_streaming` out.")
            dataset = load_from_disk(name)
        elif name.startswith((".", "/", "~")) and not os.path.isdir(path):
            raise FileNotFoundError(
                f"dataset_name={name!r} looks like a local folder, and there is none. Mend the path."
            )
        else:
            dataset = load_dataset(name, name=script_args.dataset_config, streaming=streaming)
        if not isinstance(dataset, dict):
            dataset = DatasetDict({script_args.dataset_train_split: dataset})

    train_split, eval_split = script_args.dataset_train_split, script_args.dataset_test_split
    if train_split not in dataset:
        raise ValueError(f"There is no split {train_split!r}, only {sorted(dataset)}. Set `--dataset_train_split`.")
    train_dataset = dataset[train_split]
    if dataset_args.test_split_size is not None and (not with_eval or eval_split in dataset):
        why = f"there is a split {eval_split!r}" if eval_split in dataset else "evaluation is off"
        raise ValueError(
            f"test_split_size={dataset_args.test_split_size} would do nothing: {why}. Leave it out"
            + (", or set `--eval_strategy steps`." if not with_eval else ".")
        )
    if not with_eval:
        return train_dataset, None
    if eval_split in dataset:
        return train_dataset, dataset[eval_split]
    if dataset_args.test_split_size is None or streaming:
        raise ValueError(
            f"Evaluation is on and there is no split {eval_split!r}, only {sorted(dataset)}. Set "
            "`--dataset_test_split`, or `--test_split_size 0.1` to set rows of the train split apart (not for "
            "streams), or `--eval_strategy no`."
        )
    parts = train_dataset.train_test_split(test_size=dataset_args.test_split_size, seed=seed)
    return parts["train"], parts["test"]


def _load_file(path: Path, streaming: bool) -> dict[str, Any]:
    """A local file as `datasets` reads it, or a `ValueError` that names it."""
    from datasets import load_dataset

    try:
        dataset = load_dataset(FILE_FORMATS[path.suffix], data_files={"train": str(path)}, streaming=streaming)
    except Exception as error:  # of pyarrow's, pandas' and its own kinds; the first of them knows why
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(f"{path} cannot be read as a table of rows: {_in_one_line(cause)}. Mend the file.") from error
    if path.suffix == ".jsonl" and not streaming:
        with path.open("rb") as opened:
            num_lines = sum(bool(line.strip()) for line in opened)
        if num_lines != len(dataset["train"]):  # a line that Arrow cannot hold may be taken for a table of its own
            raise ValueError(
                f"{path} has {num_lines} lines and is read as {len(dataset['train'])} rows. Put one JSON object on "
                "each line, with values of the same type in each column."
            )
    return dataset


def _in_one_line(error: BaseException) -> str:
    return (" ".join(str(error).split())[:200] or type(error).__name__).rstrip(". ")


def load_prompts(script_args, dataset_args) -> list[dict[str, Any]]:
    """
    The rows of the train split, for sampling. A prompt that is only implied by `chosen` and `rejected`, or that
    repeats the first message of these conversations as text, becomes what training would see.

    Raises:
        ValueError: rows without a prompt, rows that cannot be kept as JSON, or a stream.
    """
    from .data import RowError, check_features, prompt_of

    if script_args.dataset_streaming or dataset_args.streaming:
        raise ValueError("Prompts to sample for are read as a whole. Leave `--dataset_streaming` out.")
    dataset_args = dataclasses.replace(dataset_args, test_split_size=None)  # for the training on what is sampled
    dataset, _ = load_datasets(script_args, dataset_args, with_eval=False, seed=0)
    check_features(dataset.features, "prompt")
    columns = set(dataset.column_names)
    if "prompt" not in columns and not columns >= {"chosen", "rejected"}:
        raise ValueError(
            f"The dataset has the columns {sorted(columns)} and no `prompt` to sample answers for. Rename or add it."
        )
    try:
        rows = dataset.to_list()
    except Exception as error:
        raise ValueError(f"The rows of the dataset cannot be read: {_in_one_line(error)}. Mend them.") from error
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
            f"Row {index}: column {column!r} holds {row[column]!r:.60}, which cannot be kept as JSON. Turn it into "
            "text or numbers, or leave the column out."
        )


def _is_jsonable(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
