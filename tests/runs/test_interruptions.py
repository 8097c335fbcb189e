"""Signals to a run of one process; `hostile/test_faults.py` has launches of several."""

import fcntl
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from tests.support.data import PAIRS, REPOSITORY
from tests.support.processes import ended_after, wait_until
from tests.support.recipes import command as recipe_command
from tests.support.sampling import SETTINGS, TEXTS, shard_files
from trl_ext import SLiCConfig, SLiCTrainer
from trl_ext.methods.best_of_n.config import BestOfNConfig
from trl_ext.methods.best_of_n.trainer import BestOfNTrainer
from trl_ext.runs.manifest import start_afresh
from trl_ext.runs.process import PRELOADED
from trl_ext.runs.run import Run
from trl_ext.runtime.checkpoints import checkpoint_to_resume
from trl_ext.runtime.run_lock import hold_folder, release_folder
from trl_ext.runtime.signals import RESUME_HINT
from trl_ext.sampling.candidates import sample_candidates
from trl_ext.sampling.config import SamplingConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals as on Linux")


class Steps(TrainerCallback):
    """Writes down the steps that are finished, so that a test knows when it is time."""

    def __init__(self, file: Path):
        self.file = file

    def on_step_end(self, args, state, control, **kwargs):
        self.file.write_text(str(state.global_step))


def train(folder: Path, model_dir: str, trainer_class: type, config_class: type) -> None:
    """In a process group of its own, as a run that is started from a shell."""
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # of its data loader's workers; other tests set another
    # held back where a stage of another test has started the fork server
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
    folder.mkdir()
    printed = os.open(folder / "printed", os.O_WRONLY | os.O_CREAT)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    settings = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_steps": 10_000,
        "max_steps": 10_000,
        "per_device_train_batch_size": 2,
        "dataloader_num_workers": 2,
        "activation_checkpointing": False,
    }
    trainer = trainer_class(
        model=model_dir,
        args=config_class(str(folder), **settings),
        train_dataset=Dataset.from_list(PAIRS),
        callbacks=[Steps(folder / "steps")],
    )
    trainer.train()


@pytest.fixture(scope="module")
def context():
    """Processes from it take no time to import anything."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([*PRELOADED, __name__])
    return found


def wait_for(condition, process, seconds=200):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)


TRAINERS = {SLiCTrainer: SLiCConfig, BestOfNTrainer: BestOfNConfig}


@pytest.mark.parametrize(
    ("trainer_class", "number"),
    [
        (SLiCTrainer, signal.SIGTERM),
        (SLiCTrainer, signal.SIGINT),
        pytest.param(BestOfNTrainer, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_whole_group_while_workers_load_the_data(trainer_class, number, context, model_dir, tmp_path):
    folder = tmp_path / "out"
    process = context.Process(target=train, args=(folder, model_dir, trainer_class, TRAINERS[trainer_class]))
    process.start()
    wait_for((folder / "steps").exists, process)
    os.killpg(process.pid, number)
    process.join(60)
    printed = (folder / "printed").read_text()
    assert process.exitcode == 128 + number, printed
    assert list(folder.glob("checkpoint-*/checkpoint.json")) and "Traceback" not in printed


def test_a_second_ctrl_c_ends_at_once():
    """What the launcher passes on right after the first one is none."""
    code = (
        "import time\n"
        "from trl_ext.runtime.signals import on_stop, watch_signals_and_launcher\n"
        "with on_stop(lambda number: print('noted', int(number), flush=True)):\n"
        "    watch_signals_and_launcher()\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(100)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "noted 2\n"
        process.send_signal(signal.SIGINT)
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=30)[0]
    assert process.returncode == 130 and printed.startswith("Ctrl-C again: ended at once. What is finished is kept.")
    assert "Traceback" not in printed


def test_a_folder_in_which_a_run_is_at_work_is_refused(model_dir, tmp_path):
    message = f"Another run is active in {tmp_path}. Wait until it has ended, or set another `--output_dir`."
    Run(tmp_path, {}, resume=False).keep("prompts", {"a": "1"})
    release_folder(tmp_path)
    args = SLiCConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1, save_strategy="no")
    trainer = SLiCTrainer(model_dir, args=args, train_dataset=Dataset.from_list(PAIRS))
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    begins = {
        "rounds": lambda: Run(tmp_path, {}, resume=True),
        "the playground, which would be wiped": lambda: start_afresh(tmp_path),
        "a recipe": lambda: checkpoint_to_resume(args),
        "a trainer": trainer.train,
    }
    for begin in begins.values():
        with pytest.raises(FileExistsError, match=re.escape(message)):
            begin()
    assert (tmp_path / "prompts" / "a").exists()
    os.close(other)
    trainer.train()
    assert hold_folder(tmp_path), "it was released at the end of training"
    assert not hold_folder(tmp_path)
    release_folder(tmp_path)


@pytest.mark.slow
def test_ctrl_c_to_a_launch(model_dir, tmp_path):
    """While it samples, to the launcher and all that it has started; before that, a second run is refused."""
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"{n} " + row["prompt"]}) + "\n" for n in range(40) for row in PAIRS)
    )
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    command = recipe_command("rrhf.py", model_dir, prompts, output, launcher, num_rounds=1, max_new_tokens=64)
    start = {"cwd": REPOSITORY, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with ended_after(subprocess.Popen(command, **start, start_new_session=True)) as process:
        wait_until(lambda: any(output.glob("round-1/candidates/**/*")), process)
        refused = subprocess.run(command, **start, timeout=300)
        assert refused.returncode != 0 and f"Another run is active in {output}" in refused.stdout
        began = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        printed, _ = process.communicate(timeout=300)
    assert time.monotonic() - began < 30 and process.returncode != 0
    assert "Traceback" not in printed and printed.count(RESUME_HINT) == 1, printed
    # that second run took a while, in which the first may have come to another stage
    assert re.search(r"Ctrl-C: ended in stage 'round-1/\w+'\. What is finished is kept\. The same command", printed)


MANY = [{"prompt": f"{number}: {text}", "number": number} for number, text in enumerate(TEXTS * 2)]


def sample_many(model, folder):
    return sample_candidates(model, MANY, SamplingConfig(**SETTINGS), folder, shard_size=1)


def test_killed_and_resumed(sampler_dir, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))  # it is one for all tests, and those of stages need it like that
    process = context.Process(target=sample_many, args=(sampler_dir, tmp_path / "killed"))
    process.start()
    deadline = time.monotonic() + 120
    while len(shard_files(tmp_path / "killed")) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    finished = shard_files(tmp_path / "killed")
    assert process.exitcode == -9 and 3 <= len(finished) < len(MANY), "killed half-way"
    rows, report = sample_many(sampler_dir, tmp_path / "killed")
    now = shard_files(tmp_path / "killed")
    assert len(now) == len(MANY) and {name: now[name] for name in finished} == finished, "nothing is made again"
    expected, expected_report = sample_many(sampler_dir, tmp_path / "whole")
    assert rows == expected and report == expected_report
