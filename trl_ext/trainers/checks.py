"""Checks before training, shared by every trainer in this package, for faults that would show hours later."""

import copy
import io
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import Trainer, TrainingArguments

from .._trl import measured_in_evaluation
from ..data.limits import row_lengths
from ..runtime.models import repair_generation_config

GROUPS_BY_LENGTH = ("group_by_length", "batch_rebalance")


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
            f"`train_dataset` must be a `Dataset` with train_sampling_strategy={strategy!r}, got a stream, whose "
            "lengths are unknown. Pass a `Dataset`, or remove `train_sampling_strategy`."
        )
    if strategy == "batch_rebalance" and args.world_size > 1:
        raise NotImplementedError(
            "`train_sampling_strategy` must not be 'batch_rebalance' on several processes: rows that fill up the "
            "last batch would count twice. Set 'group_by_length'."
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
