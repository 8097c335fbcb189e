"""Runs of the worker under a launcher, one after the other in the same processes, and how two of them are compared."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support import warm
from tests.support.data import PAIRS, REPOSITORY
from tests.support.processes import ended_after

WORKER = REPOSITORY / "tests" / "distributed" / "worker.py"
CONFIGS = REPOSITORY / "accelerate_configs"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
# strategy -> its config, what has to be installed, number of processes
STRATEGIES = {
    "single": ("single_process.yaml", [], 1),
    "ddp": ("ddp.yaml", [], 2),
    "zero1": ("zero1.yaml", ["deepspeed"], 2),
    "zero2": ("zero2.yaml", ["deepspeed"], 2),
    "zero3": ("zero3.yaml", ["deepspeed"], 2),
}
SHARDED = ("zero3", "fsdp2")

RANKED = [
    {"prompt": "a? ", "completions": ["x", "yy", "zzz"], "scores": [0.1, 0.9, 0.5]},
    {"prompt": "bb? ", "completions": ["one", "two"], "scores": [1.0, 2.0]},
    {"prompt": "c ", "completions": ["p", "q", "rr", "s"], "scores": [0.5, 0.5, 0.1, 0.9]},
    {"prompt": "dd ", "completions": ["same", "score"], "scores": [1.0, 1.0]},
    {"prompt": "eee ", "completions": ["first", "second", "third", "4th", "5th"], "scores": [5.0, 1.0, 3.0, 4.0, 2.0]},
]
# rows of 1, 2, 4, 2 equal and 5 candidates
RAGGED = [{"prompt": "a? ", "completions": ["x"], "scores": [0.1]}, *RANKED[1:]]
ROWS = {
    "pairs": PAIRS,
    "seven pairs": PAIRS[:7],
    "ranked": RANKED,
    "seven ranked": [
        *RANKED,
        {"prompt": "ff? ", "completions": ["good", "bad"], "scores": [2.0, 1.0]},
        {"prompt": "g ", "completions": ["low", "middle", "high"], "scores": [0.0, 1.0, 2.0]},
    ],
    "ragged": RAGGED,
    # two prompts with pairs, one with a tie, and two that are the task's data alone
    "task": [
        {"prompt": "a? ", "completions": ["x", "yy", "zzz"], "scores": [0.0, 1.0, 0.0], "reference": "the task"},
        {"prompt": "bb? ", "completions": ["one", "two"], "scores": [1.0, 0.0], "reference": "one"},
        {"prompt": "c ", "completions": ["p", "qq"], "scores": [1.0, 1.0], "reference": "both are good"},
        {"prompt": "dd ", "completions": ["alone"], "scores": [1.0], "reference": "no sample"},
        {"prompt": "eee ", "completions": ["the task alone"], "scores": [1.0], "reference": None},
    ],
}
NOT_COMPARED = {"step", "epoch"}  # of the dataloader, which is as long as its process's share
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "activation_checkpointing": False,
    "learning_rate": 1e-2,
    "num_train_epochs": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "optim": "adamw_torch",
    "adam_epsilon": 1e-3,  # or Adam makes a step of a gradient that is nothing but rounding
}
JOB = {"enable_prefix_sharing": False}
PADDED = {"prefix_sharing": False, "check_prefix_sharing": False}
SHARED = {"prefix_sharing": True, "check_prefix_sharing": True}


@dataclass(frozen=True)
class Cell:
    """
    One training run.

    Attributes:
        trained: "full", "lora", "qlora" with the adapter in float32, or "qlora_bf16", in bfloat16, as TRL makes it.
        split: micro-batch x gradient accumulation x processes.
        loss: settings that the run it is compared with has as well.
        execution: settings that should change nothing.
    """

    strategy: str
    method: str
    trained: str = "full"
    split: str = "2x1x2"
    rows: str = "ragged"
    checkpointing: bool = False
    loss: dict[str, Any] = field(default_factory=dict)
    execution: dict[str, Any] = field(default_factory=lambda: SHARED)

    @cached_property
    def name(self) -> str:
        parts = [self.strategy, self.method, self.trained, self.split, self.rows.replace(" ", "_")]
        parts += ["checkpointed"] * self.checkpointing + ["padded"] * (not self.is_shared)
        settings = {**self.loss, **self.execution}
        return "-".join([*parts, *(f"{key}={value}" for key, value in settings.items() if key not in SHARED)])

    __str__ = __repr__ = lambda self: self.name

    @property
    def is_shared(self) -> bool:
        return self.execution["prefix_sharing"]

    @property
    def reference(self) -> "Cell":
        """
        What it is compared with: the same training on one process, the whole batch at once, padded, nothing computed
        twice. TRL's own trainer averages otherwise over processes; it is compared with itself, padded.
        """
        if self.method == "dpo":
            return replace(self, execution=PADDED)
        size, steps, processes = map(int, self.split.split("x"))
        split = f"{size * steps * processes}x1x1"
        return replace(self, strategy="single", split=split, checkpointing=False, execution=PADDED)

    def job(self, model_dir: str) -> dict[str, Any]:
        size, steps, _ = map(int, self.split.split("x"))
        return {
            "method": self.method,
            "enable_prefix_sharing": self.method == "dpo" and self.is_shared,
            "model": model_dir,
            "rows": ROWS[self.rows],
            "trained": self.trained,
            "settings": {
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": steps,
                "activation_checkpointing": self.checkpointing,
                **self.loss,
                **({} if self.method == "dpo" else self.execution),
            },
        }


@dataclass
class Outcome:
    """What a run has left behind."""

    folder: Path

    @cached_property
    def processes(self) -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("process-*.json"))]

    @cached_property
    def logs(self) -> dict:
        return json.loads((self.folder / "logs.json").read_text())

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        (file,) = (self.folder / "model").glob("*model.safetensors")
        return load_file(file)

    @property
    def steps(self) -> list[dict]:
        return [log for log in self.logs["train"] if "loss" in log]

    def __iter__(self):
        return iter((self.logs, self.weights, self.processes))


def strategy_command(strategy: str) -> list[str]:
    config, _, processes = STRATEGIES[strategy]
    return [*ACCELERATE, "--config_file", str(CONFIGS / config), "--num_processes", str(processes)]


def run_launcher(
    command, folder: Path, environment: dict[str, str], timeout: float, start=warm.Popen
) -> tuple[str, str, str]:
    """Run a launcher in a folder; returns in what way it has failed, "" if it has not, its output and its errors."""
    run = start(command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with run:
        try:
            with ended_after(run):
                printed, errors = run.communicate(timeout=timeout)
            return f"exit status {run.returncode}" if run.returncode else "", printed, errors
        except subprocess.TimeoutExpired:
            return f"still running after {timeout} s", *run.communicate(timeout=60)


def run_jobs(
    command: list[str], folder: Path, jobs: dict[str, dict], timeout: float = 400, environment: dict | None = None
) -> tuple[dict[str, Outcome], str]:
    """
    Run jobs by name, one after the other, under one launch. Returns those that came to their end, and what the launch
    has said if it failed.
    """
    folder.mkdir(parents=True)
    listed = []
    for number, job in enumerate(jobs.values()):
        run = folder / str(number)
        run.mkdir()
        settings = {**SETTINGS, "output_dir": str(run / "out"), **job["settings"]}
        listed.append({**JOB, **job, "folder": str(run), "settings": settings})
    (folder / "jobs.json").write_text(json.dumps(listed))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)]),
        **(environment or {}),
    }
    failed, printed, errors = run_launcher(
        [*command, str(WORKER), str(folder / "jobs.json")], folder, environment, timeout
    )
    said = f"{failed}\n{printed[-3000:]}{errors[-9000:]}" if failed else ""
    outcomes = {name: Outcome(folder / str(number)) for number, name in enumerate(jobs)}
    processes = max((len(outcome.processes) for outcome in outcomes.values()), default=0)
    finished = {
        name: outcome
        for name, outcome in outcomes.items()
        if (outcome.folder / "logs.json").exists() and len(outcome.processes) == processes
    }
    return finished, said


def assert_same_run(one, other, rtol=1e-4, atol=1e-5, only_later=(), grad_norm_rtol=0.0):
    """Losses, all metrics and final weights; those named in `only_later` are but rounding at the first step."""
    (logs, weights, _), (other_logs, other_weights, _) = one, other
    steps, other_steps = ([log for log in run["train"] if "loss" in log] for run in (logs, other_logs))
    assert len(steps) == len(other_steps) >= 6
    compared = {name for step in steps for name in step} - NOT_COMPARED
    assert len(compared) > 10
    for step, other_step in zip(steps, other_steps, strict=True):
        assert step.keys() == other_step.keys()  # a step without a pair has nothing to say about pairs
        for name in compared & step.keys():
            if step["step"] > 1 or name not in only_later:
                relative = max(rtol, grad_norm_rtol) if name == "grad_norm" else rtol
                assert other_step[name] == pytest.approx(step[name], rel=relative, abs=atol), (name, step["step"])
    for name in compared - {"num_tokens", "grad_norm", "learning_rate"}:  # those are of training alone
        key = f"eval_{name}"
        assert other_logs["eval"][key] == pytest.approx(logs["eval"][key], rel=rtol, abs=atol), key
    assert set(weights) ^ set(other_weights) <= {"lm_head.weight"}, "ZeRO-2 writes the tied head a second time"
    for name, weight in weights.items():
        torch.testing.assert_close(
            other_weights[name], weight, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_as_one_process(cell: Cell, reference: Outcome, found: Outcome) -> None:
    """A run of a cell has computed what the slow one has, and in the way that its name says."""
    processes = int(cell.split.split("x")[-1])
    assert len(found.processes) == processes
    for process in found.processes:
        assert process["world"] == processes
        assert process["strategy"] == cell.strategy
        assert process["sharded"] == (cell.strategy in SHARDED)
        assert process["checkpointed"] == cell.checkpointing
        assert process["quantized"] == cell.trained.startswith("qlora")
        assert process["dtypes"] == ["torch.bfloat16" if cell.trained == "qlora_bf16" else "torch.float32"]
        with_reference = cell.loss.get("reg_type") == "kl" and cell.trained == "full"
        assert process["models"] == 1 + with_reference
        assert (process["reference"] == "None") == (not with_reference)
        if cell.is_shared:
            computed, padded = process["positions"]
            assert computed < 0.9 * padded
        else:
            assert process["positions"] is None
        if "max_completions_per_forward" in cell.execution:
            assert not process["reentrant"]
    assert all(step["grad_norm"] > 1e-3 for step in found.steps), "it has trained"
    assert reference.processes[0]["positions"] is None and not reference.processes[0]["checkpointed"]
    rewards = {name for name in reference.steps[0] if name.startswith("rewards/")}
    only_later = rewards if cell.method in ("spin", "ipo") else ()  # these begin as their own reference
    # weights in bfloat16 are some roundings apart: less than half a step of the optimiser; their norm is one itself
    rounding = {"rtol": 1e-3, "atol": 5e-3, "grad_norm_rtol": 2**-7} if cell.trained == "qlora_bf16" else {}
    assert_same_run(reference, found, only_later=only_later, **rounding)
    if cell.method == "spin":
        assert found.steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert found.steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
