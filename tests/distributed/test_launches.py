"""The files of `accelerate_configs/`, and the recipes launched with them as their users do."""

import json
import os
import shutil
import subprocess

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from datasets import Dataset
from torch.utils.cpp_extension import get_cxx_compiler
from trl import DPOConfig, DPOTrainer

from tests.distributed.launching import ACCELERATE, ROWS, run_launcher
from tests.support import warm
from tests.support.data import PAIRS, REPOSITORY, REWARDS, read_jsonl
from trl_ext import RRHFConfig, RRHFTrainer, SLiCConfig, SLiCTrainer, SPINConfig, SPINTrainer, enable_prefix_sharing

CONFIGS = sorted((REPOSITORY / "accelerate_configs").rglob("*.yaml"))
# file -> what the launcher tells the processes
TOLD = {
    "single_process": {},
    "ddp": {},
    "cpu": {},
    "zero1": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    },
    "zero3_offload": {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
    },
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    },
}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_every_key_of_a_config_is_one_of_the_launcher(config):
    """Accelerate refuses unknown keys at the top itself; those in a section it would hand on to nobody."""
    loaded = load_config_from_file(str(config))
    known = vars(launch_command_parser().parse_args(["script.py"]))
    values = yaml.safe_load(config.read_text())
    assert values["mixed_precision"] == "no" and config.read_text().startswith("#")
    sections = {name: values[name] for name in values if isinstance(values[name], dict)}
    assert set(sections) <= {"deepspeed_config", "fsdp_config"}
    for name, section in sections.items():
        assert getattr(loaded, name) == section
        assert not set(section) - set(known), f"{config.name}, {name}"


@pytest.mark.parametrize("name", TOLD)
def test_a_config_launches_as_many_processes_as_told(name):
    """Up to the command and the environment of the processes; the matrix starts most of them."""
    command = ["--config_file", str(REPOSITORY / "accelerate_configs" / f"{name}.yaml"), "--num_processes", "3"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args([*command, "script.py"]))
    if name == "single_process":
        assert not (arguments.multi_gpu or arguments.use_deepspeed or arguments.use_fsdp)
        return
    if arguments.use_deepspeed:
        pytest.importorskip("deepspeed", reason="needs the extra trl_ext[deepspeed]")
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(arguments)
    else:
        assert arguments.multi_gpu or arguments.use_fsdp
        environment = prepare_multi_gpu_env(arguments)
    assert arguments.nproc_per_node == "3"
    assert {key: environment.get(key) for key in TOLD[name]} == TOLD[name]


def test_every_config_of_one_machine_is_tried():
    of_one_machine = [config.stem for config in CONFIGS if yaml.safe_load(config.read_text())["num_machines"] == 1]
    assert sorted(of_one_machine) == sorted(TOLD)


# What would quietly be something else


@pytest.mark.parametrize("method", [(SLiCTrainer, SLiCConfig), (RRHFTrainer, RRHFConfig), (SPINTrainer, SPINConfig)])
@pytest.mark.parametrize("asked", ["by the launcher", "by the settings"])
def test_fsdp_on_a_cpu_is_refused_before_any_weight_is_loaded(method, asked, config_kwargs, pairs, monkeypatch):
    trainer_class, config_class = method
    config = config_class(**config_kwargs)
    if asked == "by the launcher":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        config.fsdp = True
    given = r"distributed_type: FSDP\)" if asked == "by the launcher" else "fsdp=True"
    with pytest.raises(ValueError, match=given + " needs GPUs. .* zero3.yaml for sharded weights"):
        trainer_class(model="no/such-model", args=config, train_dataset=pairs)


def test_fsdp_on_a_cpu_is_refused_for_a_plain_dpo_trainer(model_dir, pairs, config_kwargs, monkeypatch):
    trainer = DPOTrainer(model=model_dir, args=DPOConfig(**config_kwargs), train_dataset=pairs)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="needs GPUs"):
        enable_prefix_sharing(trainer)
    assert getattr(trainer, "prefix_sharing", None) is None


def test_deepspeed_that_would_be_ddp_is_refused(pairs, config_kwargs, monkeypatch):
    config = SLiCConfig(**config_kwargs)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match="ACCELERATE_USE_CPU must not be set with DeepSpeed.* Unset it"):
        SLiCTrainer(model="no/such-model", args=config, train_dataset=pairs)


# The recipes. On a CPU nothing has to be added to the command.

without_accelerator = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="tries what happens on a machine without accelerator"
)


@pytest.fixture
def data(tmp_path):
    """A file of each kind of rows, 8 of each."""
    rows = {
        "pairs": PAIRS,
        "ranked": (ROWS["ranked"] * 2)[:8],
    }
    for name, each in rows.items():
        Dataset.from_list(each).to_json(tmp_path / f"{name}.jsonl")
    return tmp_path


def start(config, recipe, model_dir, data, *arguments, fails=False, timeout=400, by=warm.Popen, **settings):
    """Launch a recipe; returns what it has printed and its output folder. By `subprocess.Popen` just as users do."""
    output = data / "out"
    settings = {"model_name_or_path": model_dir, "dataset_name": data, "output_dir": output, **settings}
    command = [*ACCELERATE, "--config_file", str(REPOSITORY / "accelerate_configs" / config)]
    command += ["--num_processes", "2", str(REPOSITORY / "recipes" / recipe)]
    command += [str(item) for name, value in settings.items() for item in (f"--{name}", value)] + list(arguments)
    failed, printed, errors = run_launcher(command, data, dict(os.environ), timeout, by)
    assert bool(failed) == fails and "still running" not in failed, failed + printed[-3000:] + errors[-6000:]
    return printed + errors, output


def train(config, recipe, model_dir, data, *arguments, rows="pairs", **settings):
    """Two epochs of 8 rows, 2 on each of 2 processes: 4 steps, where a process that thinks it is alone makes 8."""
    if config.startswith("zero"):
        pytest.importorskip("deepspeed", reason="needs the extra trl_ext[deepspeed]")
    printed, output = start(
        config, recipe, model_dir, data, *arguments, dataset_name=data / f"{rows}.jsonl", report_to="none",
        timeout=1200 if "offload" in config else 400,  # DeepSpeed compiles its optimiser, once on a machine
        per_device_train_batch_size=2, num_train_epochs=2, logging_steps=1, learning_rate=1e-3, **settings,
    )  # fmt: skip
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["global_step"] == 4 and state["num_train_epochs"] == 2
    assert json.loads((output / "all_results.json").read_text())["train_loss"] > 0
    assert printed.count("Model, all_results.json and") == 1
    return output


@without_accelerator
def test_slic_on_two_processes_of_a_cpu(model_dir, data):
    output = train("cpu.yaml", "slic.py", model_dir, data)
    assert (output / "model.safetensors").is_file()


@without_accelerator
@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "recipe", "rows", "arguments"),
    [
        ("ddp.yaml", "rrhf.py", "ranked", ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"]),
        ("zero2.yaml", "train_click.py", "pairs", []),
        ("zero3.yaml", "spin.py", "pairs", ["--beta", "1.0"]),
        ("zero3_offload.yaml", "slic.py", "pairs", []),
        ("zero2.yaml", "dpo.py", "pairs", []),
        ("zero3.yaml", "orpo.py", "pairs", []),
        ("zero3.yaml", "kto.py", "pairs", ["--per_device_train_batch_size", "4"]),  # a pair is two of its rows
        ("zero3.yaml", "reward.py", "pairs", []),
        ("zero1.yaml", "best_of_n.py", "ranked", []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_recipe_on_two_processes_of_a_cpu(config, recipe, rows, arguments, model_dir, data):
    if "offload" in config and not shutil.which(get_cxx_compiler()):
        pytest.skip("DeepSpeed compiles its optimiser for the CPU: needs a C++ compiler")
    as_users_do = (config, recipe) in (("ddp.yaml", "rrhf.py"), ("zero3.yaml", "spin.py"))
    by = subprocess.Popen if as_users_do else warm.Popen
    train(config, recipe, model_dir, data, *arguments, rows=rows, by=by)


@without_accelerator
@pytest.mark.slow
def test_candidates_are_sampled_by_two_processes_of_a_cpu(model_dir, data):
    """The one recipe that has no training arguments."""
    reward = f"{REWARDS}:vowels"
    _, output = start(
        "cpu.yaml", "sample_and_rank.py", model_dir, data, dataset_name=data / "pairs.jsonl", num_candidates=3,
        max_new_tokens=4, rewards=reward,
    )  # fmt: skip
    assert len(read_jsonl(output / "candidates.jsonl")) == 8


@without_accelerator
@pytest.mark.slow
def test_a_launch_with_fsdp_on_a_cpu_says_what_to_do(model_dir, data):
    printed, output = start(
        "fsdp2.yaml", "slic.py", model_dir, data, dataset_name=data / "pairs.jsonl", report_to="none", fails=True
    )
    assert "A launch with FSDP (distributed_type: FSDP) needs GPUs" in printed
    assert not output.exists()
