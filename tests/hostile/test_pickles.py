"""No pickle in a checkpoint, a model or a cache runs code."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file

from tests.support import warm
from tests.support.data import PAIRS, REPOSITORY
from tests.support.malicious import ROUTES, Malicious, adapter_on
from trl_ext import SLiCConfig, SLiCTrainer, SPINConfig, SPINTrainer
from trl_ext.runs.stages import merge_stage
from trl_ext.runtime.checkpoints import SEAL
from trl_ext.runtime.models import load_causal_lm
from trl_ext.runtime.trust import UnsafeFileError, weights_only


def plant(file: Path, marker: Path, zipped: bool = True) -> None:
    """Put a pickle that runs code in the place of a file."""
    torch.save({"x": Malicious(marker)}, file, _use_new_zipfile_serialization=zipped)


def test_the_pickle_that_is_planted_does_run_code(tmp_path):
    for zipped in (True, False):
        plant(tmp_path / "x.pt", tmp_path / "marker", zipped)
        torch.load(tmp_path / "x.pt", weights_only=False)
        assert (tmp_path / "marker").exists()
        (tmp_path / "marker").unlink()


SETTINGS = {
    "bf16": False, "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 2, "learning_rate": 1e-2,
    "logging_steps": 1, "save_steps": 1, "disable_tqdm": True, "max_steps": 2, "activation_checkpointing": False,
}  # fmt: skip


def slic(model, folder, **settings):
    lora = settings.pop("lora", False)
    return SLiCTrainer(
        model=model,
        args=SLiCConfig(str(folder), **{**SETTINGS, **settings}),
        train_dataset=Dataset.from_list(PAIRS),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]) if lora else None,
    )


@pytest.fixture(scope="module")
def checkpoints(model_dir, tmp_path_factory):
    """Of a whole model and of an adapter."""
    folders = {}
    for kind in ("full", "lora"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        slic(model_dir, folders[kind], max_steps=1, lora=kind == "lora").train()
    return {kind: folder / "checkpoint-1" for kind, folder in folders.items()}


def seal_again(checkpoint: Path) -> None:
    """As somebody would who wants a changed checkpoint to be taken."""
    sealed = json.loads((checkpoint / SEAL).read_text())
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL]
    sealed["files"] = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    (checkpoint / SEAL).write_text(json.dumps(sealed))


@pytest.mark.parametrize("resume", ["named", pytest.param("last", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("full", "optimizer.pt"),
        ("full", "scheduler.pt"),
        ("full", "rng_state.pth"),
        ("full", "scaler.pt"),
        ("full", "pytorch_model.bin"),
        ("lora", "adapter_model.bin"),
    ],
)
def test_a_checkpoint_cannot_run_code(kind, file, resume, checkpoints, model_dir, tmp_path, marker):
    checkpoint = tmp_path / "out" / "checkpoint-1"
    shutil.copytree(checkpoints[kind], checkpoint)
    for weights in ("model.safetensors", "adapter_model.safetensors") if file.endswith(".bin") else ():
        (checkpoint / weights).unlink(missing_ok=True)
    plant(checkpoint / file, marker, zipped=resume == "named")
    seal_again(checkpoint)
    trainer = slic(model_dir, tmp_path / "out", lora=kind == "lora")
    if file == "scaler.pt":  # of fp16, which needs a GPU
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(
        UnsafeFileError, match=f"{file} holds more than tensors and plain values: it names 'posix.system'.*Use a"
    ):
        trainer.train(resume_from_checkpoint=str(checkpoint) if resume == "named" else True)
    assert not marker.exists()
    with pytest.raises(pickle.UnpicklingError):  # afterwards torch is as it was
        torch.load(checkpoint / file, weights_only=True)


def test_what_a_checkpoint_has_that_is_never_read(checkpoints, model_dir, tmp_path, marker):
    checkpoint = tmp_path / "out" / "checkpoint-1"
    shutil.copytree(checkpoints["full"], checkpoint)
    plant(checkpoint / "training_args.bin", marker)
    seal_again(checkpoint)
    trainer = slic(model_dir, tmp_path / "out")
    trainer.train(resume_from_checkpoint=True)
    assert not marker.exists() and trainer.state.global_step == 2


def test_a_link_out_of_a_checkpoint_cannot_run_code(checkpoints, model_dir, tmp_path, marker):
    """As in the cache of the Hub, where all files are links."""
    checkpoint = tmp_path / "out" / "checkpoint-1"
    shutil.copytree(checkpoints["full"], checkpoint)
    (checkpoint / "optimizer.pt").unlink()
    plant(tmp_path / "blob", marker)
    (checkpoint / "optimizer.pt").symlink_to(tmp_path / "blob")
    seal_again(checkpoint)
    with pytest.raises(UnsafeFileError, match="optimizer.pt holds more than tensors and plain values"):
        slic(model_dir, tmp_path / "out").train(resume_from_checkpoint=True)
    assert not marker.exists()


def test_torch_is_as_it_was_afterwards(checkpoints):
    before = torch.load
    with weights_only(), pytest.raises(UnsafeFileError):
        torch.load(checkpoints["full"] / "training_args.bin", weights_only=False)
    assert torch.load is before


@pytest.mark.parametrize("route", ["trainer", "weights for sampling", "judge", "evaluation", "reference by name"])
def test_weights_of_a_model_cannot_run_code(route, model_dir, tmp_path, marker):
    shutil.copytree(model_dir, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    plant(tmp_path / "model" / "pytorch_model.bin", marker)
    with pytest.raises(UnsafeFileError, match="model/pytorch_model.bin holds more than tensors and plain values"):
        ROUTES[route](str(tmp_path / "model"), tmp_path, model_dir)
    assert not marker.exists()


def test_weights_of_an_adapter_cannot_run_code(model_dir, tmp_path, marker):
    shutil.copytree(model_dir, tmp_path / "base")
    adapter = adapter_on(str(tmp_path / "base"), tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    plant(adapter / "adapter_model.bin", marker)
    with pytest.raises(UnsafeFileError, match="adapter_model.bin holds more than tensors"):
        merge_stage(tmp_path / "merged", adapter=adapter, trust_remote_code=False)
    with pytest.raises((UnsafeFileError, OSError), match="adapter_model"):  # without PEFT nobody looks for this file
        load_causal_lm(adapter)
    assert not marker.exists()


def test_a_cache_of_reference_values_cannot_run_code(model_dir, tmp_path, marker, capsys):
    file = tmp_path / "out" / "reference_train.npz"
    file.parent.mkdir()
    with file.open("wb") as opened:
        np.savez(opened, logps=np.array([Malicious(marker)], dtype=object), digest=np.array("x"))
    config = SPINConfig(str(tmp_path / "out"), **{**SETTINGS, "save_steps": 100})
    SPINTrainer(model=model_dir, args=config, train_dataset=Dataset.from_list(PAIRS)).train()
    assert not marker.exists()
    values = np.load(file)["logps"]
    assert values.shape == (2 * len(PAIRS),), "computed anew"
    digest = np.load(file)["digest"]
    np.savez(file, logps=values + 1, digest=digest)
    args = SPINConfig(str(tmp_path / "out"), **{**SETTINGS, "save_steps": 100})
    SPINTrainer(model=model_dir, args=args, train_dataset=Dataset.from_list(PAIRS)).train()
    assert "is of other rows or weights, or was changed: the reference is computed anew" in capsys.readouterr().out
    assert np.array_equal(np.load(file)["logps"], values)


LOAD = """
import sys
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from trl_ext.runtime.trust import weights_only
if sys.argv[2] == "safely":
    with weights_only():
        TorchCheckpointEngine().load(sys.argv[1])
TorchCheckpointEngine().load(sys.argv[1])
"""


@pytest.mark.slow
def test_deepspeed_itself_unpickles(tmp_path, marker):
    """That there is something to be kept from: once DeepSpeed does not, `weights_only` is needed less."""
    pytest.importorskip("deepspeed", reason="needs the extra trl_ext[deepspeed]")
    plant(tmp_path / "states.pt", marker)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", LOAD, str(tmp_path / "states.pt")]
    done = subprocess.run([*command, "safely"], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "UnsafeFileError" in done.stderr and not marker.exists()
    subprocess.run([*command, "as it does"], env=environment, check=True, capture_output=True)
    assert marker.exists()


def zero(stage: int) -> list[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    return [*launch, "--config_file", str(REPOSITORY / "accelerate_configs" / f"zero{stage}.yaml")]


def run_under(launcher, folder, model, data, *others):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
    worker = str(REPOSITORY / "tests" / "support" / "resume_worker.py")
    return warm.run(
        [*launcher, worker, model, str(data), str(folder), *others],
        env=environment, cwd=folder.parent, capture_output=True, text=True, timeout=400,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])  # for 2 see `hostile/test_faults.py`
def test_deepspeed_resumes_without_unpickling(stage, model_dir, tmp_path):
    """On two processes: resumed bit by bit as the uninterrupted run; with a planted pickle it ends, and says which."""
    pytest.importorskip("deepspeed", reason="needs the extra trl_ext[deepspeed]")
    data, whole, resumed, evil = (tmp_path / name for name in ("rows.jsonl", "whole", "resumed", "evil"))
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    done = run_under(zero(stage), whole, model_dir, data)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    done = run_under(zero(stage), resumed, model_dir, data, "--resume_from_checkpoint", "true")
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")
    start = load_file(whole / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], start[name]) for name in one), "it went on"
    states = [torch.load(f, weights_only=False) for f in sorted((whole / "checkpoint-4").rglob("*optim_states.pt"))]
    again = [torch.load(f, weights_only=False) for f in sorted((resumed / "checkpoint-4").rglob("*optim_states.pt"))]
    assert (
        len(states) == 2
        and list(tensors(states))
        and all(torch.equal(*pair) for pair in zip(tensors(states), tensors(again), strict=True))
    )
    if stage < 3:  # one is enough: DeepSpeed has one function that loads a file
        return
    shutil.copytree(whole / "checkpoint-2", evil / "checkpoint-2")
    file = sorted((evil / "checkpoint-2").rglob("*model_states.pt"))[0]
    plant(file, tmp_path / "marker")
    seal_again(evil / "checkpoint-2")
    done = run_under(zero(stage), evil, model_dir, data, "--resume_from_checkpoint", "true")
    assert done.returncode != 0 and not (tmp_path / "marker").exists()
    assert f"{file.name} holds more than tensors and plain values: it names 'posix.system'" in done.stderr


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from tensors(one)
