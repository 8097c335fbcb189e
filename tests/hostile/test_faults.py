"""
Runs that do not reach their end: each fault is caused for real, the run ends in time and says why, and going on from
there gives the result of a run that nothing has happened to.
"""

import json
import os
import re
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.support import warm
from tests.support.data import PAIRS, REPOSITORY
from tests.support.processes import ended_after, family, wait_until
from tests.support.recipes import command as recipe_command

pytestmark = pytest.mark.slow

WORKER = REPOSITORY / "tests" / "hostile" / "faulty_worker.py"
STEPS = 8
# what the launcher takes to notice, and for processes that do not listen to SIGTERM: 30 s, and some for a busy machine
IN_TIME = 60


def command(strategy, processes):
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    config = REPOSITORY / "accelerate_configs" / f"{strategy}.yaml"
    return [*accelerate, "--config_file", str(config), "--num_processes", str(processes)]


def start(folder, model_dir, *, strategy="ddp", processes=2, fault=None, resume=None, wrap=(), **settings):
    """Start a run in `folder`, or start it again there."""
    folder.mkdir(exist_ok=True)
    job = {
        "model": model_dir,
        "rows": PAIRS,
        "resume": resume,
        "fault": fault,
        "settings": {
            "output_dir": str(folder / "out"),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "activation_checkpointing": False,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "max_steps": STEPS,
            "logging_steps": 1,
            "save_steps": 2,
            "disable_tqdm": True,
            **settings,
        },
    }
    (folder / "job.json").write_text(json.dumps(job))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
    process = warm.Popen(
        [*wrap, *command(strategy, processes), str(WORKER), str(folder / "job.json")],
        env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    (folder / "launcher").write_text(str(process.pid))
    return process


def run(folder, model_dir, **kwargs):
    """Run to the end, whichever it is; returns the exit code and what was printed."""
    with ended_after(start(folder, model_dir, **kwargs)) as process:
        printed, _ = process.communicate(timeout=500)
    return process.returncode, printed


def finish(folder, model_dir, **kwargs):
    code, printed = run(folder, model_dir, **kwargs)
    assert code == 0, printed[-6000:]
    return printed


def seconds_since_the_fault(folder):
    return time.time() - float((folder / "fault").read_text())


def losses(folder, rel=0.0):
    """The loss of each step; of a step that was run twice, by the interrupted run and again, both are the same."""
    found = {}
    for line in (folder / "steps.jsonl").read_text().splitlines():
        log = json.loads(line)
        assert found.setdefault(log["step"], log["loss"]) == pytest.approx(log["loss"], rel=rel, abs=0)
    return found


def assert_resumed(folder):
    """It did not begin anew, which would give the same result."""
    steps = [json.loads(line)["step"] for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert steps.count(1) == 1


def assert_same_end(folder, untouched, num_steps=STEPS):
    assert_resumed(folder)
    assert losses(folder) == losses(untouched) and len(losses(folder)) == num_steps
    weights, expected = (load_file(where / "model" / "model.safetensors") for where in (folder, untouched))
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name


@pytest.fixture(scope="module", params=["ddp"])
def untouched(request, model_dir, tmp_path_factory):
    """A run of two processes that nothing happens to."""
    folder = tmp_path_factory.mktemp("untouched") / "run"
    finish(folder, model_dir, strategy=request.param)
    return folder


KILLS = {
    "in the forward pass": {"where": "forward", "step": 5},
    "while the optimiser is written": {"where": "save", "step": 6, "file": "optimizer", "process": 0},
}


@pytest.mark.parametrize("where", KILLS)
def test_a_process_that_is_killed(where, model_dir, untouched, tmp_path):
    folder = tmp_path / "run"
    fault = {"kind": "SIGKILL", "process": 1, **KILLS[where]}
    code, printed = run(folder, model_dir, fault=fault)
    assert code != 0 and seconds_since_the_fault(folder) < IN_TIME
    assert re.search(rf"local_rank: {fault['process']}", printed) and "Signal 9 (SIGKILL)" in printed
    printed = finish(folder, model_dir, resume="true")
    passed_over = "checkpoint-6 is skipped: it has no checkpoint.json" in printed
    assert passed_over == (fault["where"] == "save")
    assert_same_end(folder, untouched)


@pytest.mark.parametrize("untouched", ["zero2"], indirect=True)
def test_a_process_that_is_killed_under_zero_2(model_dir, untouched, tmp_path):
    pytest.importorskip("deepspeed", reason="needs the extra trl_ext[deepspeed]")
    folder, fault = tmp_path / "run", {"kind": "SIGKILL", "process": 1, **KILLS["while the optimiser is written"]}
    fault |= {"file": "optim_states", "process": 1}
    code, _ = run(folder, model_dir, strategy="zero2", fault=fault)
    assert code != 0 and seconds_since_the_fault(folder) < IN_TIME
    code, printed = run(folder, model_dir, resume="true", strategy="zero2", processes=1, gradient_accumulation_steps=2)
    assert code != 0 and "was written by 2 processes with sharding 'ZeRO-2'" in printed, printed[-6000:]
    printed = finish(folder, model_dir, resume="true", strategy="zero2")
    assert "checkpoint-6 is skipped" in printed
    assert_same_end(folder, untouched)


@pytest.mark.parametrize("kind", ["SIGSTOP", "loop"])
def test_a_process_that_hangs(kind, model_dir, untouched, tmp_path):
    """Four fifths of `ddp_timeout` after the last step, plus the launcher's 30 s for one that does not listen."""
    folder, timeout = tmp_path / "run", 20
    fault = {"kind": kind, "process": 1, "where": "forward", "step": 5}
    code, printed = run(folder, model_dir, fault=fault, ddp_timeout=timeout)
    assert code != 0 and seconds_since_the_fault(folder) < timeout + IN_TIME
    what = "No process has got on" if kind == "loop" else "(No process has got on|A process is missing)"
    assert re.search(f"{what} for 16 s, so the run ends here.", printed), printed
    assert re.search(r"process 0 \(.*, pid \d+\): step 6, in .*", printed), printed
    if kind == "SIGSTOP":
        assert re.search(r"process 1 \(.*, pid \d+\): .*; NO SIGN OF LIFE for \d+ s", printed)
    else:
        assert re.search(r"process 1 \(.*, pid \d+\): step 6, in .*faulty_worker.py:\d+ happen", printed)
    finish(folder, model_dir, resume="true")
    assert_same_end(folder, untouched)


@pytest.mark.parametrize("who", ["one process", "the launcher"])
def test_sigterm_saves_a_checkpoint(who, model_dir, untouched, tmp_path):
    """It comes in the middle of a step between two checkpoints. All processes end after the same step."""
    folder = tmp_path / "run"
    if who == "one process":
        fault = {"kind": "SIGTERM", "process": 1, "where": "forward", "step": 4}
        code, printed = run(folder, model_dir, fault=fault)
        assert "SIGTERM: checkpoint-5 is saved." in printed
    else:
        fault = {"kind": "SIGTERM", "process": 1, "to": "launcher", "where": "forward", "step": 4}
        # which signals the whole group of each process, those that load data among them
        code, printed = run(folder, model_dir, fault=fault, dataloader_num_workers=2)
        assert re.search(r"SIGTERM: checkpoint-[5-8] is saved.", printed), printed
    assert code != 0
    assert "The same command with `--resume_from_checkpoint true` resumes from there." in printed
    assert "is skipped" not in finish(folder, model_dir, resume="true")
    assert_same_end(folder, untouched)


def test_a_step_that_outlasts_the_grace_period(model_dir, untouched, tmp_path, monkeypatch):
    """The launcher kills what has not ended by then; the checkpoint before is what is left."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")
    folder = tmp_path / "run"
    fault = {"kind": "SIGTERM", "process": 1, "to": "launcher", "where": "forward", "step": 5, "seconds": 300}
    code, printed = run(folder, model_dir, fault=fault)
    assert code != 0 and 5 < seconds_since_the_fault(folder) < 30
    assert "SIGTERM: a checkpoint is saved after this step." in printed and "is saved. The same" not in printed
    finish(folder, model_dir, resume="true")
    assert_same_end(folder, untouched)


def test_sigterm_ends_one_process_alone(model_dir, tmp_path):
    one = tmp_path / "one"
    finish(one, model_dir, strategy="single_process", processes=1)
    folder = tmp_path / "run"
    fault = {"kind": "SIGTERM", "process": 0, "where": "forward", "step": 4}
    code, printed = run(folder, model_dir, strategy="single_process", processes=1, fault=fault)
    assert code != 0 and "returned non-zero exit status 143" in printed
    finish(folder, model_dir, strategy="single_process", processes=1, resume="true")
    assert_same_end(folder, one)


@pytest.mark.parametrize(("processes", "how"), [(1, "terminate"), (2, "kill")])
def test_a_launcher_that_ends_without_a_word(processes, how, model_dir, tmp_path):
    """The one of a single process does not pass SIGTERM on, and none can pass on SIGKILL."""
    strategy = "single_process" if processes == 1 else "ddp"
    whole, folder = tmp_path / "whole", tmp_path / "run"
    finish(whole, model_dir, strategy=strategy, processes=processes, max_steps=300, save_steps=1000)
    settings = {"strategy": strategy, "processes": processes, "max_steps": 300, "save_steps": 1000}
    with ended_after(start(folder, model_dir, **settings)) as process:
        wait_until((folder / "steps.jsonl").exists, process)
        workers = family(process)[1:]
        getattr(process, how)()
        printed, _ = process.communicate(timeout=200)
    _, left = psutil.wait_procs(workers, timeout=IN_TIME)
    assert not left and "is saved. The same command with" in printed
    finish(folder, model_dir, resume="true", **settings)
    assert_same_end(folder, whole, num_steps=300)


def test_a_full_disk(model_dir, untouched, tmp_path):
    """A file system with room for the first checkpoint, and not for the second, later grown."""
    folder = tmp_path / "run"
    finish(tmp_path / "sized", model_dir, max_steps=2)
    size = sum(file.stat().st_size for file in (tmp_path / "sized" / "out").rglob("*") if file.is_file())
    (folder / "out").mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(size * 1.5) // 1024}k", "tmpfs", str(folder / "out")]
    if subprocess.run(["unshare", "-rm", *mount], capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system, here or in a namespace of its own")
    inner = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", FULL_DISK, str(folder), model_dir, *mount],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert inner.returncode == 0, inner.stdout[-6000:] + inner.stderr[-6000:]
    assert_same_end(folder, untouched)


FULL_DISK = """
import subprocess, sys
from pathlib import Path
from tests.hostile.test_faults import finish, run

folder, model_dir, *mount = sys.argv[1:]
folder = Path(folder)
subprocess.run(mount, check=True)
code, printed = run(folder, model_dir)
print(printed)
assert code != 0
assert f"The disk is full" in printed and f"so {folder}/out/checkpoint-4 could not be written" in printed
assert f"The last whole checkpoint is {folder}/out/checkpoint-2" in printed
subprocess.run(["mount", "-o", "remount,size=1g", str(folder / "out")], check=True)
printed = finish(folder, model_dir, resume="true")
print(printed)
assert "checkpoint-4 is skipped: it has no checkpoint.json" in printed
"""


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_going_on_with_another_number_of_processes(before, after, model_dir, untouched, tmp_path):
    """With the same number of prompts in each step it is the same run; with another it is refused."""
    folder = tmp_path / "run"
    split = {
        1: {"strategy": "single_process", "processes": 1, "gradient_accumulation_steps": 2},
        2: {"strategy": "ddp", "processes": 2},
    }
    fault = {"kind": "SIGKILL", "process": 0, **KILLS["in the forward pass"]}
    code, _ = run(folder, model_dir, fault=fault, **split[before])
    assert code != 0
    code, printed = run(folder, model_dir, resume="true", **split[after], per_device_train_batch_size=4)
    assert (
        code != 0
        and (f"checkpoint-4 was written with 4 prompts per optimiser step ({before} processes), and this run takes 8")
        in printed
    ), printed[-6000:]
    finish(folder, model_dir, resume="true", **split[after])
    assert_resumed(folder)
    assert losses(folder, rel=1e-4) == pytest.approx(losses(untouched), rel=1e-4)
    weights, others = (load_file(where / "model" / "model.safetensors") for where in (folder, untouched))
    for name, weight in others.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4)


# The loop: sampling, scoring and training in turn, each in processes of its own


@pytest.fixture(scope="module")
def loop(model_dir, tmp_path_factory):
    """
    The command of a round on two processes, by output folder; and the folder of a run that nothing happens to. Each
    process samples two shards.
    """
    folder = tmp_path_factory.mktemp("loop")
    prompts = folder / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"{row['prompt']}{n} "}) + "\n" for n in range(17) for row in PAIRS)
    )
    settings = {
        "num_rounds": 1, "num_train_epochs": 1, "per_device_train_batch_size": 4, "max_new_tokens": 48,
        "save_steps": 1000,
    }  # fmt: skip

    def arguments(output, **more):
        return recipe_command("rrhf.py", model_dir, prompts, output, command("ddp", 2), **settings, **more)

    with ended_after(start_loop(arguments(folder / "untouched"))) as process:
        printed, _ = process.communicate(timeout=500)
    assert process.returncode == 0, printed[-6000:]
    return arguments, folder / "untouched"


def start_loop(arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return warm.Popen(
        arguments, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def stage_processes(launcher):
    """Those that a stage runs in, which are forked from a server."""
    found = []
    for process in psutil.Process(launcher.pid).children(recursive=True):
        try:
            if "forkserver" in " ".join([process.parent().name(), *process.parent().cmdline()]):
                found.append(process)
        except (psutil.NoSuchProcess, AttributeError):
            continue
    return found


# a file that is there when it is time, and what the run says of it
SHARD, BEGUN = "round-1/candidates/shards/*.jsonl", "round-1/model/.stage"
LOOP_FAULTS = {
    "killed while it generates": (SHARD, "Stage 'round-1/candidates'.* was ended by SIGKILL"),
    "stopped while it generates": (SHARD, "A process is missing for 60 s"),
    "asked to end while it generates": (SHARD, "SIGTERM: ended in stage 'round-1/candidates'"),
    "the launcher is asked to end": (BEGUN, "SIGTERM: ended in stage 'round-1/model'"),
}


@pytest.mark.parametrize("what", LOOP_FAULTS)
def test_the_loop(what, loop, tmp_path):
    arguments, untouched = loop
    output = tmp_path / "out"
    sign, message = LOOP_FAULTS[what]
    timeout = 60 if "stopped" in what else 1800
    with ended_after(start_loop(arguments(output, ddp_timeout=timeout))) as process:
        wait_until(lambda: any(output.glob(sign)), process)
        began, workers = time.time(), family(process)[1:]
        if "asked" in what:
            process.terminate()
        else:
            victim = stage_processes(process)[-1]
            victim.kill() if "killed" in what else victim.suspend()
        printed, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and re.search(message, printed), printed[-6000:]
    assert time.time() - began < IN_TIME + (timeout if "stopped" in what else 0)
    assert "The same command with `--resume_from_checkpoint true` resumes from there." in printed
    _, left = psutil.wait_procs(workers, timeout=IN_TIME)
    assert not left
    finished = [(path, path.stat().st_mtime_ns) for path in [*output.rglob("manifest.json"), *output.glob(SHARD)]]
    assert 0 < len(list(output.glob(SHARD))) < 4 or sign == BEGUN
    with ended_after(start_loop([*arguments(output), "--resume_from_checkpoint", "true"])) as process:
        printed, _ = process.communicate(timeout=500)
    assert process.returncode == 0, printed[-6000:]
    assert finished and finished == [(path, path.stat().st_mtime_ns) for path, _ in finished], "it went on"
    weights, expected = (load_file(folder / "round-1/model/model.safetensors") for folder in (output, untouched))
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name
    reports = [json.loads((folder / "rounds.json").read_text())["models"] for folder in (output, untouched)]
    assert reports[0] == reports[1]
