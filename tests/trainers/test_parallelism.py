"""Tensor, context and sequence parallelism are refused by name, before any weight is loaded, however they are set."""

import json
import os
import sys

import pytest
from accelerate import ParallelismConfig
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig
from trl import DPOConfig, DPOTrainer

from tests.support import warm
from tests.support.data import REPOSITORY
from trl_ext import RRHFConfig, RRHFTrainer, SLiCConfig, SLiCTrainer, enable_prefix_sharing
from trl_ext.playground.model import byte_level_tokenizer

IN_THE_TRAINER = {
    "cp": ({"parallelism_config": ParallelismConfig(cp_size=2)}, r"cp_size=2 \(parallelism_config\)"),
    "tp": ({"parallelism_config": ParallelismConfig(tp_size=4)}, r"tp_size=4 \(parallelism_config\)"),
    "sp": (
        {"parallelism_config": ParallelismConfig(sp_size=2, sp_backend="deepspeed")},
        r"sp_size=2 \(parallelism_config\)",
    ),
    "tp_plan": ({"model_init_kwargs": {"tp_plan": "auto"}}, r"tp_plan='auto' \(model_init_kwargs\)"),
    "tp_size": (
        {"model_init_kwargs": {"distributed_config": DistributedConfig(tp_size=2)}},
        r"tp_size=2 \(model_init_kwargs\)",
    ),
}


@pytest.fixture
def no_weights(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(load))


@pytest.mark.parametrize(("settings", "named"), IN_THE_TRAINER.values(), ids=IN_THE_TRAINER)
@pytest.mark.parametrize(("trainer", "config"), [(SLiCTrainer, SLiCConfig), (RRHFTrainer, RRHFConfig)])
def test_set_in_the_trainer(trainer, config, settings, named, model_dir, pairs, config_kwargs, no_weights):
    args = config(**config_kwargs, **settings)
    with pytest.raises(NotImplementedError, match=f"{trainer.__name__} does not support {named}: its loss needs"):
        trainer(model_dir, args=args, train_dataset=pairs)


@pytest.mark.parametrize("kind", ["tp", "cp", "sp"])
def test_set_by_the_launcher(kind, model_dir, pairs, config_kwargs, no_weights, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{kind.upper()}_SIZE", "2")
    with pytest.raises(NotImplementedError, match=rf"does not support {kind}_size=2 \(accelerate's config file, or"):
        SLiCTrainer(model_dir, args=SLiCConfig(**config_kwargs), train_dataset=pairs)


def test_sharding_of_weights_is_not_refused(model_dir, pairs, config_kwargs, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    args = SLiCConfig(**config_kwargs, parallelism_config=ParallelismConfig())
    assert SLiCTrainer(model_dir, args=args, train_dataset=pairs).train().global_step > 0


def test_a_plain_trainer_shares_nothing(model_dir, pairs, config_kwargs):
    args = DPOConfig(**{**config_kwargs, "bf16": False, "use_cpu": True})
    trainer = DPOTrainer(model_dir, args=args, train_dataset=pairs, processing_class=byte_level_tokenizer())
    assert enable_prefix_sharing(trainer, True).shares
    trainer.args.parallelism_config = ParallelismConfig(sp_size=2)
    with pytest.raises(ValueError, match=r"cannot be honoured: with sp_size=2 \(parallelism_config\) a process does"):
        enable_prefix_sharing(trainer, True)
    with pytest.warns(UserWarning, match=r"not shared between their completions: with sp_size=2"):
        assert not enable_prefix_sharing(trainer).shares


LAUNCHES = {
    "context": (
        ["--use_fsdp", "--fsdp_version", "2", "--use_parallelism_config", "--parallelism_config_cp_size", "2"],
        {},
        "cp_size=2 (accelerate's config file, or its command line)",
    ),
    "autotp": (
        ["--use_deepspeed", "--deepspeed_config_file", "deepspeed.json"],
        {"tensor_parallel": {"autotp_size": 2}},
        "tensor_parallel.autotp_size=2 (DeepSpeed's config)",
    ),
    "sequence": (
        ["--use_deepspeed", "--deepspeed_config_file", "deepspeed.json"],
        {"sequence_parallel_size": 2},
        "sequence_parallel_size=2 (DeepSpeed's config)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "deepspeed", "named"), LAUNCHES.values(), ids=LAUNCHES)
def test_a_recipe_under_the_real_launcher(flags, deepspeed, named, model_dir, pairs, tmp_path):
    if deepspeed:
        pytest.importorskip("deepspeed", reason="needs the extra trl_ext[deepspeed]")
    (tmp_path / "deepspeed.json").write_text(
        json.dumps({"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 1}, **deepspeed})
    )
    pairs.to_json(tmp_path / "pairs.jsonl")
    (tmp_path / "train.py").write_text(
        "from datasets import load_dataset\n"
        "from trl_ext import SLiCConfig, SLiCTrainer\n"
        "rows = load_dataset('json', data_files='pairs.jsonl', split='train')\n"
        f"SLiCTrainer({model_dir!r}, args=SLiCConfig('out', use_cpu=True, bf16=False), train_dataset=rows)\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--mixed_precision", "no"]
    done = warm.run(
        [*command, *flags, "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode != 0
    assert f"SLiCTrainer does not support {named}" in done.stderr, done.stderr[-3000:]
