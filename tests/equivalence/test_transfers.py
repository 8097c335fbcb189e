"""Transfers to the host and other synchronisations of a training step, counted on a CPU."""

import collections
import sys

import pytest
import torch
import trl
from datasets import Dataset
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from trl_ext import SLiCConfig, SLiCTrainer, enable_prefix_sharing
from trl_ext.execution import shared_prefixes, sharing, transfer
from trl_ext.playground.model import byte_level_tokenizer

# each makes the host wait for a CUDA device
WAITING = {
    "item",
    "tolist",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "cpu",
    "nonzero",
    "masked_select",
}


class Waits(TorchFunctionMode):
    """Counts such calls that come from this package's code, by name and line, but for `transfer.py`'s."""

    def __init__(self):
        super().__init__()
        self.counted = collections.Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("__getitem__", "__setitem__"):  # a bool index has to be counted
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            waits = any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in index)
        else:
            waits = name in WAITING
        caller = sys._getframe(1)
        if waits and "/trl_ext/" in caller.f_code.co_filename and caller.f_globals["__name__"] != transfer.__name__:
            self.counted[f"{name} at {caller.f_code.co_filename}:{caller.f_lineno}"] += 1
        return func(*args, **(kwargs or {}))


class OneStep(TrainerCallback):
    """Counts within the second step, in which nothing is logged, saved or checked any more."""

    def __init__(self, waits):
        self.waits = waits

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.waits.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.waits.__exit__(None, None, None)


def trainer_of(kind, model_dir, args, rows):
    if kind == "slic":
        return SLiCTrainer(model_dir, args=SLiCConfig(**args, prefix_sharing=True), train_dataset=rows)
    tokenizer = byte_level_tokenizer()
    if kind == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=1)
        trainer = trl.RewardTrainer(model, trl.RewardConfig(**args), train_dataset=rows, processing_class=tokenizer)
    else:
        model = AutoModelForCausalLM.from_pretrained(model_dir)
        trainer = trl.DPOTrainer(model, args=trl.DPOConfig(**args), train_dataset=rows, processing_class=tokenizer)
    enable_prefix_sharing(trainer, True)
    return trainer


@pytest.mark.parametrize("kind", ["dpo", "slic", "reward"])
def test_a_step_waits_once(kind, strong_model_dir, settings, long_prompts, monkeypatch):
    """For the plan, whatever number of models see the batch."""
    transfers = []
    for module in (sharing, shared_prefixes):
        monkeypatch.setattr(module, "on_host", lambda tensors: transfers.append(1) or transfer.on_host(tensors))
    args = {**settings, "max_steps": 3, "logging_steps": 100, "gradient_accumulation_steps": 1}
    trainer = trainer_of(kind, strong_model_dir, args, Dataset.from_list(list(long_prompts)))
    waits = Waits()
    trainer.add_callback(OneStep(waits))
    trainer.train()
    assert trainer.prefix_sharing.statistics.batches_shared == len(transfers) == 3
    assert not waits.counted
