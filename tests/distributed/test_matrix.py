"""
Every method under every strategy gives the run of one process: the matrix.

Each of SLiC-HF, RRHF and SPIN under each of {one process, DDP, ZeRO-1, -2, -3 on two}, and any two values of these,
{full, LoRA, QLoRA}, {activation checkpointing on, off} and the splits of a global batch of 4. Each cell shares
prefixes, and is compared with one process that runs the batch at once and padded. The last batch of an epoch has 1
prompt (RRHF) or 3; lists differ in length from process to process.

On CPU with gloo, through `accelerate launch` and the shipped configs. `pytest -m matrix` runs it.
"""

import itertools

import pytest
import torch
from datasets import Dataset

from tests.distributed import worker
from tests.distributed.launching import (
    JOB,
    SETTINGS,
    STRATEGIES,
    Cell,
    assert_as_one_process,
    run_jobs,
    strategy_command,
)
from tests.support import reference

DATA = {"slic": "seven ranked", "rrhf": "ragged", "spin": "seven pairs"}
SPLITS = {1: ("4x1x1", "2x2x1", "1x4x1"), 2: ("2x1x2", "1x2x2")}
ADAPTERS = ("full", "lora", "qlora")


def cells():
    """
    Each method under each strategy with activation checkpointing and without: on one process in every split, on two in
    one of them. Adapters and splits turn round, so that any two values meet.
    """
    for (row, strategy), (column, method) in itertools.product(enumerate(STRATEGIES), enumerate(DATA)):
        splits = SPLITS[STRATEGIES[strategy][2]]
        for checkpointing, (turn, split) in itertools.product((False, True), enumerate(splits)):
            if strategy != "single" and turn != (row + column // 2 + checkpointing * column) % len(splits):
                continue
            trained = ADAPTERS[(row + column + checkpointing + (turn if strategy == "single" else 0)) % 3]
            loss = {"beta": 1.0} if method == "spin" else {}
            yield Cell(strategy, method, trained, split, DATA[method], checkpointing, loss)


CELLS = list(cells())
PAIRED = {
    "method": DATA,
    "strategy": STRATEGIES,
    "trained": ADAPTERS,
    "checkpointing": (False, True),
    "processes": SPLITS,
}


def test_any_two_values_meet():
    def value(cell, name):
        return int(cell.split[-1]) if name == "processes" else getattr(cell, name)

    for one, other in itertools.combinations(PAIRED, 2):
        wanted = set(itertools.product(PAIRED[one], PAIRED[other]))
        if {one, other} == {"strategy", "processes"}:
            wanted = {(strategy, number) for strategy, (_, _, number) in STRATEGIES.items()}
        assert wanted == {(value(cell, one), value(cell, other)) for cell in CELLS}, (one, other)
    for processes, splits in SPLITS.items():
        of_these = [cell for cell in CELLS if value(cell, "processes") == processes]
        for name in ("method", "trained", "checkpointing"):
            wanted = set(itertools.product(splits, PAIRED[name]))
            assert wanted == {(cell.split, value(cell, name)) for cell in of_these}, name


@pytest.mark.matrix
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_as_one_process(cell, outcome_of):
    assert_as_one_process(cell, outcome_of(cell.reference), outcome_of(cell))


SLOW_LOSSES = {
    "slic": lambda model, opponent, rows: reference.slic_loss(
        model, rows, calibration="rank", delta=1.0, reg_weight=0.1
    ),
    "rrhf": lambda model, opponent, rows: reference.rrhf_loss(model, rows),
    "spin": lambda model, opponent, rows: reference.spin_loss(model, opponent, rows, beta=1.0),
}


@pytest.mark.matrix
@pytest.mark.parametrize("trained", ["full", "lora", "qlora"])
@pytest.mark.parametrize("method", DATA)
def test_one_process_is_the_loop_by_hand(method, trained, wide_model_dir, tmp_path):
    """What the matrix compares with: one sequence at a time from plain logits, and the steps of AdamW written out."""
    if trained == "qlora":
        pytest.importorskip("bitsandbytes", reason="needs the extra trl_ext[quantization]")
    cell = next(c for c in CELLS if (c.method, c.trained) == (method, trained)).reference
    job = {**JOB, **cell.job(wide_model_dir)}
    settings = {**SETTINGS, "output_dir": str(tmp_path), "train_sampling_strategy": "sequential", **job["settings"]}

    def construct():
        logs = worker.Logs()
        config = worker.METHODS[method][1](**settings)
        return worker.construct(job, config, Dataset.from_list(job["rows"]), logs), logs

    trainer, logs = construct()
    rows = list(trainer.train_dataset)
    trainer.train()
    steps = [log for log in logs.logs if "loss" in log]

    by_hand, opponent = construct()[0].model, construct()[0].model  # of the same seed
    weights = [parameter for parameter in by_hand.parameters() if parameter.requires_grad]
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    for number, step in enumerate(steps):
        batches = -(-len(rows) // 4)
        start = number % batches * 4
        loss = SLOW_LOSSES[method](by_hand, opponent, rows[start : start + 4])
        assert step["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
        gradients = torch.autograd.grad(loss, weights)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        assert step["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        rate = SETTINGS["learning_rate"] * (1 - number / len(steps))
        for weight, gradient, (first, second) in zip(weights, gradients, moments, strict=True):
            gradient = gradient * min(1, 1 / (norm + 1e-6))
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.999).add_(0.001 * gradient**2)
            mean, square = first / (1 - 0.9 ** (number + 1)), second / (1 - 0.999 ** (number + 1))
            with torch.no_grad():
                weight -= rate * mean / (square.sqrt() + SETTINGS["adam_epsilon"])
    assert len(steps) == 6
    found = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    for expected, weight in zip(weights, found, strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.matrix
def test_a_run_in_a_row_is_the_run_alone(wide_model_dir, tmp_path):
    """Nothing of the runs before is left in the processes: under ZeRO-3, where most is kept about a model."""
    pytest.importorskip("deepspeed", reason="needs the extra trl_ext[deepspeed]")
    cells = [
        Cell("zero3", "spin", "lora", checkpointing=True, rows="seven pairs"),
        Cell("zero3", "slic", split="1x2x2", rows="seven ranked", checkpointing=True),
        Cell("zero3", "rrhf"),
    ]
    found = []
    for name, jobs in (("row", cells), ("alone", cells[-1:])):
        outcomes, said = run_jobs(
            strategy_command("zero3"), tmp_path / name, {cell.name: cell.job(wide_model_dir) for cell in jobs}
        )
        assert not said, said
        found.append(outcomes[cells[-1].name])
    row, alone = found
    figures = [[(log["loss"], log["grad_norm"]) for log in outcome.steps] for outcome in found]
    assert figures[0] == figures[1]
    assert row.weights.keys() == alone.weights.keys()
    for name, weight in row.weights.items():
        assert torch.equal(weight, alone.weights[name]), name
