"""Signals to a run of one process; `distributed/test_faults.py` has launches of several."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from tests.conftest import PAIRS
from trl_ext import SLiCConfig, SLiCTrainer
from trl_ext.stages import PRELOADED
from trl_ext.trl_configs import BestOfNConfig
from trl_ext.trl_trainers import BestOfNTrainer

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


@pytest.mark.parametrize("trainer_class", [SLiCTrainer, pytest.param(BestOfNTrainer, marks=pytest.mark.slow)])
def test_a_signal_to_the_whole_group_while_workers_load_the_data(trainer_class, context, model_dir, tmp_path):
    folder = tmp_path / "out"
    process = context.Process(target=train, args=(folder, model_dir, trainer_class, TRAINERS[trainer_class]))
    process.start()
    wait_for((folder / "steps").exists, process)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(60)
    printed = (folder / "printed").read_text()
    assert process.exitcode == 128 + signal.SIGTERM, printed
    assert list(folder.glob("checkpoint-*/checkpoint.json")) and "Traceback" not in printed
