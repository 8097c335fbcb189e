"""Checks before training, shared by every trainer in this package: what would fail, or go wrong, hours later."""

import copy
import io
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainingArguments

from ._trl import measured_in_evaluation
from .adapter_checks import without_weights
from .pretrained import load_config, repair_generation_config

logger = get_logger(__name__)

GROUPS_BY_LENGTH = ("group_by_length", "batch_rebalance")


# Rows


def row_lengths(dataset: Dataset) -> np.ndarray:
    """Tokens of each row's longest sequence, `(rows,)`: of prepared rows, or of rows in TRL's columns."""
    names = [name for name in dataset.column_names if name.endswith("ids")]
    lengths = [np.zeros(0, dtype=np.int64)]
    for table in dataset.select_columns(names).with_format("arrow").iter(batch_size=1000):
        found = {name: table[name].combine_chunks() for name in names}
        prompt = _lengths(found["prompt_ids"]) if "prompt_ids" in found else 0
        others = []
        for name, column in found.items():
            if name == "prompt_ids":
                continue
            if name == "completion_ids" and str(column.type.value_type).startswith(("list", "large_list")):
                counts, inner = _lengths(column), _lengths(pc.list_flatten(column))
                others.append(np.maximum.reduceat(inner, np.concatenate([[0], counts.cumsum()[:-1]])))
            else:
                others.append(_lengths(column))
        lengths.append(prompt + np.max(others, axis=0) if others else prompt)
    return np.concatenate(lengths)


def _lengths(column: Any) -> np.ndarray:
    return pc.list_value_length(column).to_numpy(zero_copy_only=False)


def _largest_id(dataset: Dataset) -> int:
    names, largest = [name for name in dataset.column_names if name.endswith("ids")], 0
    for table in dataset.select_columns(names).with_format("arrow").iter(batch_size=1000):
        for name in names:
            column = table[name].combine_chunks()
            while str(column.type).startswith(("list", "large_list")):
                column = pc.list_flatten(column)
            largest = max(largest, pc.max(column).as_py() or 0)
    return largest


class Limits:
    """
    What a model can be fed with: how many positions it has, and how many token embeddings.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): as given to the trainer.
        args: the trainer's settings.

    Attributes:
        positions (`int`, *optional*): longest sequence that it can compute at all; `None` where positions are computed
            and not looked up.
        made_for (`int`, *optional*): longest sequence that its config declares.
        embeddings (`int`): token embeddings.
    """

    def __init__(self, model: Any, args: Any):
        self.name = model if isinstance(model, str) else type(model).__name__
        self._source = (model, args)
        config = (load_config(model, args) if isinstance(model, str) else model.config).get_text_config()
        self.made_for = getattr(config, "max_position_embeddings", None)
        self.embeddings = config.vocab_size
        if not isinstance(model, str):
            self.embeddings = _rows_of(model.get_input_embeddings()) or self.embeddings

    @cached_property  # a sequence longer than `made_for` asks for it, and the modules have to be built
    def positions(self) -> int | None:
        model, args = self._source
        modules = without_weights(model, args) if isinstance(model, str) else model
        return self.made_for if modules is not None and _looks_positions_up(modules, self.made_for) else None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "positions": self.positions if self.made_for else None, "_source": None}

    def check(self, dataset: Any, name: str, tokenizer: Any, max_length: int | None) -> Any:
        """
        Refuse rows that are too long for the model, or have tokens that it does not know. A stream is checked as it
        is read, and returned with the check.
        """
        check_row = self.row_check(name, tokenizer, max_length)
        if isinstance(dataset, IterableDataset):
            return dataset.map(check_row, features=dataset.features)
        largest = _largest_id(dataset)
        if largest >= self.embeddings:
            self._refuse_token(largest, f"in the {name} dataset", tokenizer)
        longest = int(row_lengths(dataset).max(initial=0))
        self.check_length(longest, f"The {name} dataset has a row of {longest} tokens", max_length)
        return dataset

    def row_check(
        self, name: str, tokenizer: Any, max_length: int | None
    ) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """What refuses a prepared row that is too long for the model, or has tokens that it does not know."""
        if (tokenizer.pad_token_id or 0) >= self.embeddings:
            self._refuse_token(tokenizer.pad_token_id, "padding", tokenizer)
        return _CheckRow(self, name, tokenizer, max_length)

    def check_length(self, longest: int, what: str, max_length: int | None, setting: str = "max_length") -> None:
        """Refuse, or warn of, a sequence that is longer than the model's positions."""
        if self.made_for is None or longest <= self.made_for:
            return
        if self.positions is not None:
            raise ValueError(
                f"{what}, and {self.name} has {self.positions} positions ({setting}={max_length}). Set "
                f"{setting}={self.positions} or less, or take a model with more positions."
            )
        logger.log(
            logging.WARNING,
            f"{what}, and {self.name} was made for {self.made_for} ({setting}={max_length}): its answers may degrade "
            f"behind that. Set {setting}={self.made_for} or less if that is not intended.",
        )

    def _refuse_token(self, token: int, where: str, tokenizer: Any) -> None:
        raise ValueError(
            f"The token {tokenizer.convert_ids_to_tokens(token)!r} ({where}) has the id {token}, and {self.name} has "
            f"{self.embeddings} token embeddings. Use the model's own tokenizer, or pass the model as an object after "
            f"`model.resize_token_embeddings({len(tokenizer)})`."
        )


class _CheckRow:
    """Checks one prepared row; a class, so that it can go to other processes."""

    def __init__(self, limits: Limits, name: str, tokenizer: Any, max_length: int | None):
        self.limits, self.name, self.tokenizer, self.max_length = limits, name, tokenizer, max_length

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        sequences = [row["prompt_ids"], *row["completion_ids"]]
        largest = max((max(ids, default=0) for ids in sequences), default=0)
        if largest >= self.limits.embeddings:
            self.limits._refuse_token(largest, f"in the {self.name} dataset", self.tokenizer)
        longest = len(row["prompt_ids"]) + max(map(len, row["completion_ids"]), default=0)
        if longest > (self.limits.made_for or longest) and self.limits.positions is not None:
            what = f"The {self.name} dataset has a row of {longest} tokens"
            self.limits.check_length(longest, what, self.max_length)
        return row


def _rows_of(embeddings: nn.Module) -> int | None:
    weight = getattr(embeddings, "weight", None)
    shape = getattr(weight, "ds_shape", None) or getattr(weight, "shape", None)  # of ZeRO-3's shards
    return int(shape[0]) if shape else None


def _looks_positions_up(model: nn.Module, positions: int) -> bool:
    """
    Whether a model has a table with a row for each position: learned embeddings (GPT-2, OPT), or a buffer (GPT-J,
    GPT-Neo).
    """
    tokens = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not tokens:
            if positions <= module.num_embeddings <= positions + 8:
                return True
        for buffer in module.buffers(recurse=False):
            if buffer.dim() >= 2 and positions in buffer.shape[-2:]:
                return True
    return False


def with_lengths(dataset: Any, args: TrainingArguments) -> Any:
    """What a sampler that groups rows by their length needs to know of a dataset; any other dataset as it is."""
    if args.train_sampling_strategy not in GROUPS_BY_LENGTH or not isinstance(dataset, Dataset):
        return dataset
    if {args.length_column_name, "input_ids"} & set(dataset.column_names):
        return dataset
    return Dataset.from_dict({args.length_column_name: row_lengths(dataset)})


def check_sampling_strategy(args: TrainingArguments, train_dataset: Any) -> None:
    """Refuse ways of sampling rows that would do nothing."""
    strategy = args.train_sampling_strategy
    if strategy in GROUPS_BY_LENGTH and isinstance(train_dataset, IterableDataset):
        raise ValueError(
            f"train_sampling_strategy={strategy!r} needs the lengths of all rows, and a stream has them one by one. "
            "Pass a `Dataset`, or leave `train_sampling_strategy` out."
        )
    if strategy == "batch_rebalance" and args.world_size > 1:
        raise NotImplementedError(
            "train_sampling_strategy='batch_rebalance' on several processes is not supported: rows that fill up the "
            "last batch could not be told from others. Set 'group_by_length'."
        )


# Before the first step


def check_before_training(trainer: Trainer) -> None:
    """
    Called by `train` before anything is computed: repairs the generation config, saves all but the weights to a
    temporary folder, and looks for the metric by which the best model is chosen.

    Raises:
        ValueError: something could not be saved, or no evaluation gives the metric.
    """
    check_saving(trainer)
    check_best_metric(trainer)


def check_saving(trainer: Trainer) -> None:
    """Save everything but the weights, as after training; a `ValueError` names what cannot be saved."""
    model = trainer.model
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    repair_generation_config(base)
    parts = {
        "the model's config": base.config.save_pretrained,
        "the model's generation config": getattr(getattr(base, "generation_config", None), "save_pretrained", None),
        "the tokenizer": getattr(trainer.processing_class, "save_pretrained", None),
        "the training arguments": lambda folder: torch.save(trainer.args, io.BytesIO()),
    }
    if isinstance(model, PeftModel):
        parts["the adapter's config"] = lambda folder: [
            copy.deepcopy(config).save_pretrained(folder) for config in model.peft_config.values()
        ]
    for what, save in parts.items():
        if save is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                save(folder)
            except Exception as error:  # whatever it is, it would come after the training
                raise ValueError(
                    f"{what[0].upper()}{what[1:]} could not be saved after training: "
                    f"{' '.join(str(error).split())[:300]}. Correct it before training."
                ) from error
    folder = trainer.args.output_dir
    if trainer.args.should_save and os.path.isdir(folder) and not os.access(folder, os.W_OK):
        raise PermissionError(f"`output_dir` must be a folder that can be written to, got {folder!r}.")


def check_best_metric(trainer: Trainer) -> None:
    """Raise a `ValueError` if no evaluation gives `metric_for_best_model`."""
    args, datasets = trainer.args, trainer.eval_dataset
    if args.metric_for_best_model is None or str(args.eval_strategy.value) == "no" or datasets is None:
        return
    wanted = args.metric_for_best_model
    wanted = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
    prefixes = [f"eval_{name}" for name in datasets] if isinstance(datasets, dict) else ["eval"]
    names = _metric_names(trainer, next(iter(datasets.values())) if isinstance(datasets, dict) else datasets)
    of_each = getattr(trainer, "metrics_of_each_eval_set", False)
    known = {f"{prefix}_{name}" for prefix in prefixes for name in ("loss", "runtime", *(names or ()))}
    known |= {f"{prefix}_{name}_per_second" for prefix in prefixes for name in ("samples", "steps")}
    if not of_each:  # TRL's do not tell eval sets apart
        known |= {f"eval_{name}" for name in names or ()}
    if wanted in known or (names is None and wanted not in ("eval_loss", "eval_runtime")):
        return
    shown = ", ".join(sorted(name.removeprefix("eval_") for name in known if "per_second" not in name))
    raise ValueError(
        f"`metric_for_best_model` must be a metric that an evaluation gives, got {args.metric_for_best_model!r}. "
        f"Set it to one of: {shown}."
    )


def _metric_names(trainer: Trainer, dataset: Any) -> Sequence[str] | None:
    """What is logged of an evaluation, found out by one batch; `None` where that cannot be."""
    ours = getattr(trainer, "_metric_sums", None)
    measured = measured_in_evaluation(trainer) if ours is None else ours["eval"]
    if measured is None or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return None
    rows = []
    trainer._set_signature_columns_if_needed()
    removes_columns = trainer.args.remove_unused_columns
    for row in trainer._remove_unused_columns(dataset) if isinstance(dataset, Dataset) else dataset:
        known = trainer._signature_columns if removes_columns else row
        rows.append({name: value for name, value in row.items() if name in known})
        if len(rows) == trainer.args.per_device_eval_batch_size:
            break
    was_training = trainer.model.training
    trainer.model.eval()
    try:
        trainer.prediction_step(trainer.model, trainer.data_collator(rows), prediction_loss_only=True)
        names = {name.removeprefix("eval_") for name in measured}
    finally:
        measured.clear()
        trainer.model.train(was_training)
    swapped = {one.replace(a, b) for one in names for a, b in (("chosen", "rejected"), ("rejected", "chosen"))}
    return sorted(names | swapped | {"rewards/margins", "rewards/accuracies"})
