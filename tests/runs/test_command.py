"""The `trl-ext` command: what goes to accelerate, what to the recipe, and the wheel that brings both."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

import trl_ext
from tests.support.data import PAIRS, REPOSITORY
from tests.support.recipes import RECIPES
from trl_ext.cli import main as command

OPTIONS = dict.fromkeys(("model_name_or_path", "learning_rate", "bf16", "report_to"))


def test_options_go_to_the_recipe_or_to_the_launcher():
    words = [
        "--num_processes",
        "2",
        "--learning_rate=1e-5",
        "--multi_gpu",
        "--bf16",
        "false",
        "--report-to",
        "none",
        "a",
    ]
    launcher, ours = command.split_options([*words, "--mixed-precision=no", "--accelerate_config", "zero2"], OPTIONS)
    zero2 = str(REPOSITORY / "accelerate_configs" / "zero2.yaml")
    assert launcher == ["--num_processes", "2", "--multi_gpu", "--mixed-precision=no", "--config_file", zero2]
    assert ours == ["--learning_rate=1e-5", "--bf16", "false", "--report-to", "none", "a"]


def test_a_config_is_the_users_file_or_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = str(REPOSITORY / "recipes" / "configs" / "slic_ultrafeedback.yaml")
    for name in ("slic_ultrafeedback", "slic_ultrafeedback.yaml"):
        assert command.split_options(["--config", name], OPTIONS)[1] == ["--config", shipped]
    Path("slic_ultrafeedback.yaml").touch()
    own = ["--config", "slic_ultrafeedback.yaml"]
    assert command.split_options(own, OPTIONS) == ([], own)


@pytest.mark.parametrize(("word", "meant"), [("--lerning_rate", "learning_rate"), ("--num_proceses", "num_processes")])
def test_an_option_of_neither_is_refused(word, meant):
    with pytest.raises(ValueError, match=rf"Unknown option `{word}`. Did you mean `--{meant}`\?"):
        command.split_options([word, "1"], OPTIONS)


def test_trainers_are_imported_on_first_use():
    program = (
        "import sys, trl_ext\n"
        "assert not {'torch', 'transformers', 'trl', 'accelerate'} & set(sys.modules)\n"
        "assert {'RRHFTrainer', 'RRHFConfig', 'share_prefixes'} <= set(dir(trl_ext)) >= set(trl_ext.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY)
    assert all(getattr(trl_ext, name) for name in trl_ext.__all__)


def test_help_comes_without_heavy_imports():
    program = (
        "import sys\nfrom trl_ext.cli.main import main\n"
        "for words in ([], ['slic', '--help']):\n    sys.argv = ['trl-ext', *words]\n    main()\n"
        "assert not {'torch', 'transformers', 'trl', 'accelerate'} & set(sys.modules)\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 10  # 0.6 s on a quiet machine; the imports that are left out take 20
    for name in command.recipes():
        assert f"\n  {name} " in done.stdout
    assert "usage: trl-ext slic [--config FILE]" in done.stdout and "--reg_weight float" in done.stdout


def test_a_recipe_that_is_not_there_is_one_line():
    words = [sys.executable, "-m", "trl_ext.cli.main", "slik"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: Unknown recipe `slik`. Did you mean `slic`?\n"


@pytest.mark.slow
def test_the_wheel_trains_in_an_environment_without_the_repository(model_dir, tmp_path):
    """The other packages are this environment's; the package, its recipes and configs are the wheel's alone."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words, cwd=tmp_path):
        done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=environment, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return done.stdout

    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(REPOSITORY))
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    python, script = tmp_path / "venv" / "bin" / "python", tmp_path / "venv" / "bin" / "trl-ext"
    packages = run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    run(str(python), "-m", "pip", "install", "-q", "--no-deps", str(next(tmp_path.glob("trl_ext-*.whl"))))
    # a .pth file inside the added folder is not read: the repository, which is installed there, stays out
    Path(packages, "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(str(python), "-c", "import trl_ext; print(trl_ext.__file__)").strip()
    assert Path(where).is_relative_to(packages)
    assert "sample_and_rank" in run(str(script), "--help")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    words = "slic --accelerate_config cpu --num_processes 1 --dataset_name pairs.jsonl --output_dir out --max_steps 2"
    words += " --bf16 false --report_to none --max_length 128 --use_cpu true"
    run(str(script), *words.split(), "--model_name_or_path", model_dir)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def refused(launcher, *words):
    done = subprocess.run(
        [*launcher, str(RECIPES["slic"]), *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == "Error: Unknown option `--lerning_rate`. Did you mean `--learning_rate`?\n"
    assert done.stdout == ""
    return done


def test_a_recipe_prints_one_line_at_once():
    """The time has room for a busy machine: importing torch and TRL takes ten times as long."""
    started = time.monotonic()
    done = refused([sys.executable], "--lerning_rate", "1")
    assert done.returncode == 1 and time.monotonic() - started < 10


def test_the_launcher_of_one_process_adds_nothing():
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    assert refused(launcher, "--lerning_rate", "1").returncode == -signal.SIGTERM


def test_warnings_of_libraries_are_silenced_word_by_word():
    """In a process of its own: pytest has warning filters, and here the libraries are imported already."""
    code = """
import logging, sys, warnings
import trl_ext.runtime.library_warnings as silenced
import torch
from torch.utils.data import DataLoader
from trl import DPOConfig
DPOConfig("x", bf16=False, report_to="none")
next(iter(DataLoader([1], pin_memory=True)))
logger = logging.getLogger("DeepSpeed")
logger.warning(silenced.LOGGED["DeepSpeed"][0])
from accelerate.logging import get_logger
from accelerate import PartialState
PartialState(cpu=True)
orpo = "trl.experimental.orpo.orpo_trainer"
get_logger(orpo).warning(silenced.LOGGED[orpo][0])
logger.warning("another message")
warnings.warn(silenced.PYTHON_WARNINGS[0] + " And more.")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line for line in done.stderr.splitlines() if not line.startswith("  ")][0] == "another message"
    assert "And more." in done.stderr and len(done.stderr.splitlines()) <= 3
