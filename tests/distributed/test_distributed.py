"""
The same numbers on one process and on two, through the real launchers, on CPU with gloo: a few cells of the matrix
(`test_matrix.py`) by default, and settings beyond it.

One process runs padded and two share prefixes, so that each comparison is one of both.
"""

import pytest
import torch

from tests.distributed.launching import PADDED, SHARED, Cell, assert_as_one_process

TWO_AT_A_TIME = {**SHARED, "max_completions_per_forward": 2}
ONE_EACH = {"split": "1x1x2"}

# what differs in kind: the method, how weights and gradients are spread, what is trained, what a step is made of.
# 8 pairs divide evenly; 5 and 7 rows do not, and accelerate fills up the last batch with repeats. Not with DeepSpeed,
# a launch of which takes longer than the rest together
A_FEW = [
    Cell("ddp", "slic", rows="pairs"),
    Cell("ddp", "rrhf", checkpointing=True),
    Cell("ddp", "spin", "lora", "1x2x2", rows="seven pairs", loss={"beta": 1.0}),
    # the hinge is a mean over the prompts with a pair, which the processes have different numbers of
    Cell("ddp", "click", rows="task", **ONE_EACH),
]
BEYOND = [
    Cell(strategy, "slic", trained, rows="pairs" if strategy != "ddp" else "ranked", loss=loss, **ONE_EACH)
    for strategy in ("ddp", "zero2", "zero3")
    for trained in ("full", "lora")
    for loss in ({"reg_type": "kl"}, {"calibration": "list_rank"})
]
BEYOND += [Cell(strategy, "rrhf", "qlora_bf16", "1x2x2") for strategy in ("ddp", "zero2", "zero3")]
BEYOND += [
    Cell(strategy, "ipo", trained, split, "seven ranked", loss={"beta": 0.5, "log_ratios": log_ratios})
    for strategy in ("ddp", "zero2", "zero3")
    for trained, split, log_ratios in (("full", "2x1x2", "sum"), ("lora", "1x2x2", "mean"))
]
# TRL would have PEFT under ZeRO-3 checkpointed with 'use_reentrant': True
NOT_REENTRANT = {**TWO_AT_A_TIME, "activation_checkpointing_kwargs": {"use_reentrant": False}}
BEYOND += [
    Cell("ddp", "rrhf", execution=TWO_AT_A_TIME, **ONE_EACH),
    Cell("ddp", "rrhf", "lora", "1x2x2", execution=TWO_AT_A_TIME),
    Cell("ddp", "rrhf", loss={"arithmetic": "official"}, **ONE_EACH),
    Cell("ddp", "rrhf", loss={"rank_weight": 0.0}, **ONE_EACH),
    Cell("zero2", "rrhf", execution={**TWO_AT_A_TIME, **PADDED}, **ONE_EACH),
    Cell("zero2", "rrhf", split="1x2x2", execution=TWO_AT_A_TIME),
    Cell("zero2", "rrhf", "lora", execution=TWO_AT_A_TIME, **ONE_EACH),
    Cell("zero3", "rrhf", execution=TWO_AT_A_TIME, **ONE_EACH),
    Cell("zero3", "rrhf", "qlora", execution=TWO_AT_A_TIME, **ONE_EACH),
    Cell("zero3", "rrhf", "lora", execution={**TWO_AT_A_TIME, **PADDED}, **ONE_EACH),
    Cell("zero3", "rrhf", split="1x2x2", execution=TWO_AT_A_TIME),
    Cell("zero3", "rrhf", checkpointing=True, execution=TWO_AT_A_TIME, **ONE_EACH),
    Cell("zero3", "rrhf", "lora", checkpointing=True, execution=NOT_REENTRANT, **ONE_EACH),
]


def assert_in_parts(one, two):
    """
    "ragged" in 3 epochs of 3 steps: 9 forwards of one process. In parts of at most 2 completions, each computed twice,
    for the loss and for the gradient, the five rows take 1, 1, 4, 1 and 6 forwards, and a row that fills up the last
    step of an epoch takes one more or several.
    """
    assert one.processes[0]["forwards"] == 9
    counts = [process["forwards"] for process in two.processes]
    assert min(counts) > 9 and sum(counts) >= 3 * (13 + 1), counts


def assert_found(cell, reference, found):
    assert_as_one_process(cell, reference, found)
    if "max_completions_per_forward" in cell.execution and cell.split == "1x1x2":
        assert_in_parts(reference, found)


@pytest.mark.parametrize("cell", A_FEW, ids=str)
def test_a_few_as_one_process(cell, outcome_of):
    assert_found(cell, outcome_of(cell.reference), outcome_of(cell))


@pytest.mark.slow
@pytest.mark.parametrize("cell", BEYOND, ids=str)
def test_more_settings_as_one_process(cell, outcome_of):
    assert_found(cell, outcome_of(cell.reference), outcome_of(cell))


def assert_plain_dpo(padded, shared):
    assert [process["positions"] for process in padded.processes] == [None, None]
    for process in shared.processes:
        computed, without = process["positions"]
        assert computed < 0.9 * without
    assert len(padded.steps) == len(shared.steps) >= 6
    for step, other_step in zip(padded.logs["train"], shared.logs["train"], strict=True):
        for name in (name for name in step if not name.endswith(("runtime", "per_second", "flos"))):
            assert other_step[name] == pytest.approx(step[name], rel=1e-3, abs=1e-4), (name, step["step"])
    assert shared.logs["eval"]["eval_loss"] == pytest.approx(padded.logs["eval"]["eval_loss"], rel=1e-4)
    for name, weight in padded.weights.items():
        torch.testing.assert_close(shared.weights[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(Cell(strategy, "dpo", rows="pairs"), marks=() if strategy == "ddp" else pytest.mark.slow)
        for strategy in ("ddp", "zero2", "zero3")
    ],
    ids=str,
)
def test_plain_dpo_trainer_on_two_processes(cell, outcome_of):
    """TRL's own trainer, padded and sharing prefixes, with a live reference, under the same launcher."""
    assert_plain_dpo(outcome_of(cell.reference), outcome_of(cell))
