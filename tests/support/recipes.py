"""Recipes as modules, as commands that are run or killed, and the dataclasses of their options."""

import functools
import importlib.util
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support import warm
from tests.support.data import REPOSITORY, REWARDS
from tests.support.processes import wait_until
from trl_ext.cli.options import recipe_dataclasses


def command(recipe, model_dir, prompts, output_dir, launcher=(), **kwargs):
    settings = {
        "model_name_or_path": model_dir, "dataset_name": prompts, "output_dir": output_dir, "bf16": False,
        "report_to": "none", "use_cpu": True, "per_device_train_batch_size": 2, "num_train_epochs": 2,
        "learning_rate": 3e-3, "logging_steps": 1, "save_strategy": "steps", "save_steps": 3, "num_rounds": 2,
        "rewards": f"{REWARDS}:vowels", "num_watched_prompts": 4, "max_new_tokens": 8, "temperature": 1.0,
        "num_candidates": 3, "max_length": 128, "activation_checkpointing": False, **kwargs,
    }  # fmt: skip
    arguments = [item for key, value in settings.items() if value is not None for item in (f"--{key}", str(value))]
    return [*(launcher or (sys.executable,)), str(REPOSITORY / "recipes" / recipe), *arguments]


VARIABLES = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONHASHSEED": "0", "PYTHONPATH": str(REPOSITORY)}
RECIPES = {file.stem: file for file in sorted((REPOSITORY / "recipes").glob("*.py"))}
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
DATACLASSES = {name: recipe_dataclasses(file) for name, file in RECIPES.items()}


@functools.cache
def recipe_module(name):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", REPOSITORY / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(arguments, fails=False, **variables):
    """What a command printed, in a process with these variables; it has to succeed, or to fail."""
    environment = {**os.environ, **VARIABLES, **variables}
    done = warm.run(arguments, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert (done.returncode != 0) == fails, done.stdout[-4000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def start(arguments):
    """A command that is running, and whose output nobody reads."""
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return warm.Popen(arguments, cwd=REPOSITORY, env={**os.environ, **VARIABLES}, **nowhere)


def start_and_kill(arguments, when):
    """kill -9 the run, and it alone, as soon as `when()`."""
    with start(arguments) as process:
        wait_until(when, process)
        os.kill(process.pid, signal.SIGKILL)
    time.sleep(2)  # what it started has to end by itself


def launcher(strategy):
    """The beginning of a command on two processes."""
    if strategy == "ddp":
        return (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    pytest.importorskip("deepspeed", reason="needs the extra trl_ext[deepspeed]")
    config = str(REPOSITORY / "accelerate_configs" / f"{strategy}.yaml")
    return (sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2")
