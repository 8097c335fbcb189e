"""
The same numbers on one process and on two, through the real launchers, on CPU with gloo.

One process runs padded and two share prefixes, so that each comparison is one of both.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import PAIRS, REPOSITORY

WORKER = REPOSITORY / "tests" / "distributed" / "worker.py"
RANKED = [
    {"prompt": "a? ", "completions": ["x", "yy", "zzz"], "scores": [0.1, 0.9, 0.5]},
    {"prompt": "bb? ", "completions": ["one", "two"], "scores": [1.0, 2.0]},
    {"prompt": "c ", "completions": ["p", "q", "rr", "s"], "scores": [0.5, 0.5, 0.1, 0.9]},
    {"prompt": "dd ", "completions": ["same", "score"], "scores": [1.0, 1.0]},
    {"prompt": "eee ", "completions": ["first", "second", "third", "4th", "5th"], "scores": [5.0, 1.0, 3.0, 4.0, 2.0]},
]
ALONE = {"per_device_train_batch_size": 2, "prefix_sharing": False}
SHARED = {"per_device_train_batch_size": 1, "prefix_sharing": True, "check_prefix_sharing": True}
COMPARED = (
    "loss",
    "loss/calibration",
    "loss/regularization",
    "hinge/active",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "lengths/chosen",
    "entropy",
    "mean_token_accuracy",
    "logits/chosen",
    "num_tokens",
)
# rows of 1, 2, 4, 2 equal and 5 candidates
RAGGED = [{"prompt": "a? ", "completions": ["x"], "scores": [0.1]}, *RANKED[1:]]
COMPARED_RRHF = (
    "loss",
    "loss/rank",
    "loss/sft",
    "rank/violations",
    "rank/kendall_tau",
    "rewards/margins",
    "rewards/accuracies",
    "scores/best",
    "scores/mean",
    "logps/chosen",
    "logps/rejected",
    "logps_per_token/rejected",
    "lengths/rejected",
    "entropy",
    "mean_token_accuracy",
    "logits/rejected",
    "num_tokens",
)
# two prompts with pairs, one with a tie, and two that are the task's data alone
TASK = [
    {"prompt": "a? ", "completions": ["x", "yy", "zzz"], "scores": [0.0, 1.0, 0.0], "reference": "the task"},
    {"prompt": "bb? ", "completions": ["one", "two"], "scores": [1.0, 0.0], "reference": "one"},
    {"prompt": "c ", "completions": ["p", "qq"], "scores": [1.0, 1.0], "reference": "both are good"},
    {"prompt": "dd ", "completions": ["alone"], "scores": [1.0], "reference": "no sample"},
    {"prompt": "eee ", "completions": ["the task alone"], "scores": [1.0], "reference": None},
]
COMPARED_CLICK = (
    "loss",
    "loss/lm",
    "loss/pair",
    "hinge/active",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logps/reference",
    "lengths/rejected",
    "entropy",
    "mean_token_accuracy",
    "num_tokens",
)


def launch(command, folder, model_dir, rows, lora=False, method="slic", enable_prefix_sharing=False, **settings):
    """Run the worker under a launcher; returns its logs, its final weights, and what each process noted."""
    folder.mkdir()
    job = {
        "method": method,
        "enable_prefix_sharing": enable_prefix_sharing,
        "model": model_dir,
        "rows": rows,
        "lora": lora,
        "settings": {
            "output_dir": str(folder / "out"),
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
            **settings,
        },
    }
    (folder / "job.json").write_text(json.dumps(job))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*command, str(WORKER), str(folder / "job.json")],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    weights = load_file(folder / "model" / name)
    processes = [json.loads(path.read_text()) for path in sorted(folder.glob("process-*.json"))]
    return json.loads((folder / "logs.json").read_text()), weights, processes


def torchrun(processes):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def zero(stage):
    config = REPOSITORY / "accelerate_configs" / f"zero{stage}.yaml"
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*accelerate, "--config_file", str(config), "--num_processes", "2"]


def assert_same_run(one, other, rtol=1e-4, atol=1e-5, compared=COMPARED):
    (logs, weights, _), (other_logs, other_weights, _) = one, other
    steps, other_steps = ([log for log in run["train"] if "loss" in log] for run in (logs, other_logs))
    assert len(steps) == len(other_steps) >= 6
    for step, other_step in zip(steps, other_steps, strict=True):
        for name in compared:
            if name in step or name in other_step:  # a step without a pair has nothing to say about pairs
                assert other_step[name] == pytest.approx(step[name], rel=rtol, abs=atol), (name, step["step"])
    assert set(compared) <= {name for step in steps for name in step}
    for name in compared[:-1]:
        assert other_logs["eval"][f"eval_{name}"] == pytest.approx(logs["eval"][f"eval_{name}"], rel=rtol, abs=atol), (
            name
        )
    assert set(weights) ^ set(other_weights) <= {"lm_head.weight"}, "ZeRO-2 writes the tied head a second time"
    for name, weight in weights.items():
        torch.testing.assert_close(
            other_weights[name], weight, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_shared(one, two):
    assert one[2][0]["positions"] is None
    for process in two[2]:
        computed, padded = process["positions"]
        assert computed < 0.9 * padded


def assert_in_parts(one, two):
    """
    RAGGED in 3 epochs of 3 steps: 9 forwards of one process. In parts of at most 2 completions, each computed twice,
    for the loss and for the gradient, the five rows take 1, 1, 4, 1 and 6 forwards, and a row that fills up the last
    step of an epoch takes one more or several.
    """
    assert one[2][0]["forwards"] == 9
    counts = [process["forwards"] for process in two[2]]
    assert min(counts) > 9 and sum(counts) >= 3 * (13 + 1), counts


@pytest.mark.parametrize("data", ["even pairs", "uneven lists"])
def test_two_processes_equal_one(data, model_dir, tmp_path):
    """
    8 pairs divide evenly; 5 lists of 2 to 5 candidates do not: the last step has one prompt for two processes, which
    accelerate fills up with repeats.
    """
    rows = PAIRS if data == "even pairs" else RANKED
    one = launch([sys.executable], tmp_path / "one", model_dir, rows, **ALONE)
    two = launch(torchrun(2), tmp_path / "two", model_dir, rows, per_device_eval_batch_size=2, **SHARED)
    assert [process["world"] for process in two[2]] == [2, 2]
    assert_shared(one, two)
    assert_same_run(one, two)


def test_rrhf_on_two_processes_equals_one(model_dir, tmp_path):
    one = launch([sys.executable], tmp_path / "one", model_dir, RAGGED, method="rrhf", **ALONE)
    two = launch(torchrun(2), tmp_path / "two", model_dir, RAGGED, method="rrhf", **SHARED)
    assert [(p["world"], p["models"], p["reference"]) for p in two[2]] == [(2, 1, "None")] * 2
    assert_shared(one, two)
    assert_same_run(one, two, compared=COMPARED_RRHF)


@pytest.mark.slow
def test_rrhf_in_parts_under_zero_3_equals_one_process(model_dir, tmp_path):
    """
    The processes have different numbers of parts, and under ZeRO-3 have to keep step all the same: the rows are
    ragged, and each process has one of them at a time.
    """
    pytest.importorskip("deepspeed", reason="needs the extra trl_ext[deepspeed]")
    one = launch([sys.executable], tmp_path / "one", model_dir, RAGGED, method="rrhf", **ALONE)
    two = launch(zero(3), tmp_path / "two", model_dir, RAGGED, method="rrhf", **SHARED, max_completions_per_forward=2)
    assert [(p["world"], p["models"], p["reference"]) for p in two[2]] == [(2, 1, "None")] * 2
    assert_in_parts(one, two)
    assert_same_run(one, two, rtol=1e-3, atol=1e-4, compared=COMPARED_RRHF)


def test_click_on_two_processes_equals_one(model_dir, tmp_path):
    """The hinge is a mean over the prompts with a pair, which the processes have different numbers of."""
    one = launch([sys.executable], tmp_path / "one", model_dir, TASK, method="click", **ALONE)
    two = launch(torchrun(2), tmp_path / "two", model_dir, TASK, method="click", **SHARED)
    assert_same_run(one, two, compared=COMPARED_CLICK)


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_zero_equals_one_process(stage, model_dir, tmp_path):
    pytest.importorskip("deepspeed", reason="needs the extra trl_ext[deepspeed]")
    one = launch([sys.executable], tmp_path / "one", model_dir, PAIRS, **ALONE)
    two = launch(zero(stage), tmp_path / "two", model_dir, PAIRS, **SHARED)
    assert_shared(one, two)
    assert [(p["world"], p["models"], p["reference"]) for p in two[2]] == [(2, 1, "None")] * 2
    assert_same_run(one, two, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_plain_dpo_trainer_on_two_processes(strategy, model_dir, tmp_path):
    """TRL's own trainer, padded and sharing prefixes, with a live reference, under the same launcher."""
    if strategy != "ddp":
        pytest.importorskip("deepspeed", reason="needs the extra trl_ext[deepspeed]")
    command = torchrun(2) if strategy == "ddp" else zero(int(strategy[-1]))
    runs = [
        launch(
            command, tmp_path / name, model_dir, PAIRS, method="dpo", enable_prefix_sharing=name == "shared",
            per_device_train_batch_size=2,
        )
        for name in ("padded", "shared")
    ]  # fmt: skip
    assert_shared(*runs)
    (logs, weights, _), (other_logs, other_weights, _) = runs
    for step, other_step in zip(logs["train"], other_logs["train"], strict=True):
        for name in (name for name in step if not name.endswith(("runtime", "per_second", "flos"))):
            assert other_step[name] == pytest.approx(step[name], rel=1e-3, abs=1e-4), (name, step["step"])
    assert other_logs["eval"]["eval_loss"] == pytest.approx(logs["eval"]["eval_loss"], rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"reg_type": "kl"}, {"gradient_accumulation_steps": 2}, {"calibration": "list_rank"}]
)
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_more_settings_on_two_processes(strategy, lora, settings, model_dir, tmp_path):
    if strategy != "ddp":
        pytest.importorskip("deepspeed", reason="needs the extra trl_ext[deepspeed]")
    command = torchrun(2) if strategy == "ddp" else zero(int(strategy[-1]))
    rows = PAIRS if strategy != "ddp" else RANKED
    one = launch([sys.executable], tmp_path / "one", model_dir, rows, lora, **ALONE, **settings)
    two = launch(command, tmp_path / "two", model_dir, rows, lora, **SHARED, **settings)
    assert_shared(one, two)
    assert_same_run(one, two, rtol=1e-3, atol=1e-4)
    expected_models = 2 if settings.get("reg_type") == "kl" and not lora else 1
    assert [process["models"] for process in two[2]] == [expected_models] * 2


TWO_AT_A_TIME = {"max_completions_per_forward": 2}
PADDED = {"prefix_sharing": False, "check_prefix_sharing": False}
# what differs in kind: how weights and gradients are spread, which of them are trained, and what a step is made of
RRHF_RUNS = [
    ("ddp", "all", TWO_AT_A_TIME),
    ("ddp", "lora", {**TWO_AT_A_TIME, "gradient_accumulation_steps": 2}),
    ("ddp", "all", {"arithmetic": "official"}),
    ("ddp", "all", {"rank_weight": 0.0}),
    ("zero2", "lora", {}),
    ("zero2", "all", {**TWO_AT_A_TIME, **PADDED}),
    ("zero2", "all", {**TWO_AT_A_TIME, "gradient_accumulation_steps": 2}),
    ("zero3", "lora", {}),
    ("zero3", "lora", {**TWO_AT_A_TIME, **PADDED}),
    ("zero3", "all", {**TWO_AT_A_TIME, "gradient_accumulation_steps": 2}),
    ("zero3", "all", {**TWO_AT_A_TIME, "activation_checkpointing": True}),
    # TRL would have this checkpointed with 'use_reentrant': True
    (
        "zero3",
        "lora",
        {
            **TWO_AT_A_TIME,
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": False},
        },
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "trained", "settings"), RRHF_RUNS, ids=str)
def test_more_settings_of_rrhf_on_two_processes(strategy, trained, settings, model_dir, tmp_path):
    if strategy != "ddp":
        pytest.importorskip("deepspeed", reason="needs the extra trl_ext[deepspeed]")
    command = torchrun(2) if strategy == "ddp" else zero(int(strategy[-1]))
    lora = trained == "lora"
    loss = {k: v for k, v in settings.items() if k in ("arithmetic", "rank_weight", "gradient_accumulation_steps")}
    one = launch([sys.executable], tmp_path / "one", model_dir, RAGGED, lora, method="rrhf", **{**ALONE, **loss})
    two = launch(command, tmp_path / "two", model_dir, RAGGED, lora, method="rrhf", **{**SHARED, **settings})
    assert [(p["world"], p["models"], p["reference"]) for p in two[2]] == [(2, 1, "None")] * 2
    if "max_completions_per_forward" in settings and "gradient_accumulation_steps" not in settings:
        assert_in_parts(one, two)
    assert not any(process["reentrant"] for process in two[2])
    compared = COMPARED_RRHF
    if settings.get("rank_weight") == 0:
        compared = [
            n for n in compared if not n.startswith(("loss/rank", "rank", "rewards", "scores/mean")) and "rej" not in n
        ]
    assert_same_run(one, two, rtol=1e-3, atol=1e-4, compared=compared)
