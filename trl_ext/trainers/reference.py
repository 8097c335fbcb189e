"""The reference of a loss that compares with it: run over the rows once, before anything is trained, and let go."""

import gc
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from .._trl import add_fused_lm_head, create_model_from_path, prepare_deepspeed, take_down_deepspeed
from ..execution.forward import score_completions
from ..logps import completion_logps
from ..runtime.models import is_adapter, merged, refuse_missing_model
from ..runtime.parallelism import asks_for_fsdp
from ..runtime.processes import all_gather_objects
from ..runtime.trust import explain_remote_code, weights_only


def refuse_fsdp(args: TrainingArguments, who: str = "SPIN") -> None:
    """Raise `NotImplementedError` where FSDP would shard the model, from its settings or by the launcher."""
    if asks_for_fsdp(args) is not None:
        raise NotImplementedError(
            f"{who} computes the reference before FSDP has sharded the model. Use DDP or DeepSpeed."
        )


@dataclass
class ReferenceCollator:
    """A collator that puts `reference_logps` `(N,)`, float32, in the order of the rows, beside what another makes."""

    collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collator(examples)
        if "reference_logps" in examples[0]:
            logps = [logp for example in examples for logp in example["reference_logps"]]
            batch["reference_logps"] = torch.tensor(logps, dtype=torch.float32)
        return batch


class Reference:
    """
    The reference while it is there: the trainer's own model, or another that is let go again.

    Args:
        trainer ([`~transformers.Trainer`]): with `model`, `data_collator`, `prefix_sharing` and prepared rows.
        ref_model (`str` or [`~transformers.PreTrainedModel`], *optional*): by default the trainer's model as it is.
    """

    def __init__(self, trainer: Trainer, ref_model: str | PreTrainedModel | None):
        self.trainer, self.ref_model, self.was_training = trainer, ref_model, trainer.model.training
        self._model: nn.Module | None = None

    def __enter__(self) -> "Reference":
        return self

    def __exit__(self, *exception) -> None:
        if self._model is not None and self.trainer.is_deepspeed_enabled:
            take_down_deepspeed(self._model)
        self._model = self.ref_model = None
        gc.collect()  # an engine and its model hold each other
        self.trainer.model.train(self.was_training)
        if torch.accelerator.is_available():
            torch.accelerator.memory.empty_cache()

    def add_to(self, dataset: Dataset, name: str) -> Dataset:
        """
        Add the column `reference_logps`: log-likelihood of each completion under the reference, in nats. Those that an
        interrupted run has kept are taken again if they are of the same rows and weights.
        """
        accelerator, weights = self.trainer.accelerator, self.fingerprint
        file = Path(self.trainer.args.output_dir) / f"reference_{name}.npz"
        kept, digest = [None], ""
        if accelerator.is_main_process:
            digest = _digest(dataset, weights)
            if file.is_file():
                try:
                    with np.load(file, allow_pickle=False) as found:
                        values, of = found["logps"], str(found["digest"])
                    kept = [_by_row(values, dataset) if of == _sealed_digest(digest, values) else None]
                    why = "is of other rows or weights, or was changed"
                except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
                    why = f"cannot be read ({error})"
                if kept[0] is None:
                    accelerator.print(f"{file} {why}: the reference is computed anew.")
        broadcast_object_list(kept)
        logps = kept[0]
        if logps is None:
            logps = self.logps(dataset)
            if accelerator.is_main_process:
                file.parent.mkdir(parents=True, exist_ok=True)
                values = np.array([logp for row in logps for logp in row])  # rows may have different numbers of them
                with file.with_suffix(".unfinished").open("wb") as unfinished:
                    np.savez(unfinished, logps=values, digest=np.array(_sealed_digest(digest, values)))
                file.with_suffix(".unfinished").replace(file)
        return dataset.add_column("reference_logps", logps)

    @property
    def model(self) -> nn.Module:
        """Loaded, and on its device, on first use."""
        if self._model is None:
            trainer, args, model = self.trainer, self.trainer.args, self.ref_model
            if model is None:
                model = trainer.model
            else:
                if isinstance(model, str | Path):
                    kwargs = {"dtype": trainer.model.dtype, "trust_remote_code": args.trust_remote_code}
                    kwargs.update(args.model_init_kwargs or {})
                    if is_adapter(model, kwargs.get("revision")):
                        model = merged(model, **{**kwargs, "device_map": None})
                    else:
                        refuse_missing_model(model, "`ref_model`")
                if isinstance(model, str | Path):
                    with explain_remote_code(), weights_only():
                        model = create_model_from_path(str(model), **{**kwargs, "device_map": None})
                model.requires_grad_(False)
                add_fused_lm_head(model.get_base_model() if is_peft_model(model) else model)
                if trainer.prefix_sharing is not None:
                    trainer.prefix_sharing.install(model)
                model = model.to(args.device) if not trainer.is_deepspeed_enabled else model
            # DeepSpeed has not placed or sharded the model yet
            self._model = prepare_deepspeed(model, trainer.accelerator) if trainer.is_deepspeed_enabled else model
            self._model.eval()
        return self._model

    @cached_property  # the weights do not change while the reference is there
    def fingerprint(self) -> str:
        """
        Of the weights, to recognise the model after an interruption: sum and sum of squares of each parameter, in
        float64, of all processes' shares where it is sharded.
        """
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            values = parameter.detach()
            if hasattr(parameter, "ds_tensor"):  # the last share is filled up with anything
                share, rank = parameter.ds_tensor.flatten(), self.trainer.accelerator.process_index
                values = share[: max(parameter.ds_numel - rank * share.numel(), 0)]
            values = values.double()
            digest.update(f"{name} {values.sum().item()!r} {values.square().sum().item()!r}\n".encode())
        return "".join(all_gather_objects(digest.hexdigest()))

    @torch.no_grad()
    def logps(self, dataset: Dataset) -> list[list[float]]:
        """Log-likelihoods of the completions of all rows, in nats; split over the processes, the same on all."""
        accelerator, args = self.trainer.accelerator, self.trainer.args
        size = args.precompute_ref_batch_size or args.per_device_eval_batch_size
        lengths = [_num_tokens(row) for row in dataset]
        order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        found: list[tuple[int, list[float]]] = []
        # all processes take as many turns, as a sharded model is collected by all of them together
        for turn in range(0, len(batches), accelerator.num_processes):
            number = turn + accelerator.process_index
            batch = batches[min(number, len(batches) - 1)]
            rows = [dataset[index] for index in batch]
            inputs = self.trainer.data_collator(rows)
            inputs = {key: value.to(args.device) for key, value in inputs.items()}
            with accelerator.autocast():
                outputs = score_completions(self.model, inputs)
            sums = iter(completion_logps(outputs.log_probs, inputs["completion_mask"]).sums.tolist())
            if number < len(batches):
                found += [
                    (index, [next(sums) for _ in row["completion_ids"]])
                    for index, row in zip(batch, rows, strict=True)
                ]
        if accelerator.num_processes > 1:
            found = gather_object(found)
        return [logps for _, logps in sorted(found)]


def _by_row(values: np.ndarray, dataset: Dataset) -> list[list[float]]:
    values = iter(values.tolist())
    return [[next(values) for _ in ids] for ids in dataset["completion_ids"]]


def _sealed_digest(digest: str, values: np.ndarray) -> str:
    """Of what the values were computed from and of themselves, so that damaged ones are not taken."""
    return hashlib.sha256(f"{digest} {values.dtype} {values.shape}".encode() + values.tobytes()).hexdigest()


def _digest(dataset: Dataset, weights: str) -> str:
    digest = hashlib.sha256(weights.encode())
    for row in dataset.select_columns(["prompt_ids", "completion_ids"]):
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def _num_tokens(row: dict[str, Any]) -> int:
    return len(row["prompt_ids"]) + max(map(len, row["completion_ids"]))
