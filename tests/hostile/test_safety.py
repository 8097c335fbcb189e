"""What somebody else's models, checkpoints, config files and run folders cannot do: run code, or be taken for ours."""

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
import yaml
from datasets import Dataset, Image
from peft import LoraConfig
from safetensors.torch import load_file
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from tests.support import warm
from tests.support.data import PAIRS, REPOSITORY
from tests.support.stage_functions import look_around
from trl_ext import SLiCConfig, SLiCTrainer, SPINConfig, SPINTrainer
from trl_ext.cli.parse import parse_recipe_args
from trl_ext.data.load import load_datasets, load_prompts
from trl_ext.methods.spin.rows import sft_rows
from trl_ext.runs.config import RoundsConfig
from trl_ext.runs.evaluation import answer_logps
from trl_ext.runs.manifest import ManifestError, read_manifest
from trl_ext.runs.run import Run
from trl_ext.runs.settings import local_model
from trl_ext.runs.stages import merge_stage
from trl_ext.runtime.checkpoints import SEAL
from trl_ext.runtime.models import context_window, load_causal_lm, load_tokenizer
from trl_ext.runtime.settings import has_type
from trl_ext.runtime.trust import UnsafeFileError, refuse_code_in_deepspeed, weights_only
from trl_ext.sampling.candidates import sample_candidates
from trl_ext.sampling.config import SamplingConfig
from trl_ext.scoring.build import build_scorers, check_scorers
from trl_ext.scoring.functions import FunctionScorer
from trl_ext.scoring.score import score_rows

PROMPTS = [{"prompt": "a? "}, {"prompt": "b? "}]
SFT = [{"prompt": f"{number}? ", "completion": str(number)} for number in range(8)]


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def plant(file: Path, marker: Path, zipped: bool = True) -> None:
    """Put a pickle that runs code in the place of a file."""
    torch.save({"x": Malicious(marker)}, file, _use_new_zipfile_serialization=zipped)


def test_the_pickle_that_is_planted_does_run_code(tmp_path):
    for zipped in (True, False):
        plant(tmp_path / "x.pt", tmp_path / "marker", zipped)
        torch.load(tmp_path / "x.pt", weights_only=False)
        assert (tmp_path / "marker").exists()
        (tmp_path / "marker").unlink()


# Code that comes with a model

CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "foreign"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
def generate(*args, **kwargs):
    raise RuntimeError
"""


def bring_code(folder: Path, marker: Path, needed: bool) -> None:
    """Let a model's folder bring Python files for everything; `needed`: nothing can be loaded without them."""
    code = CODE.format(marker=str(marker))
    (folder / "custom_generate").mkdir()
    for file in ("foreign.py", "custom_generate/generate.py"):
        (folder / file).write_text(code)
    names = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "foreign.Config", **dict.fromkeys(names, "foreign.Model")}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["foreign.Tokenizer", "foreign.Tokenizer"]}
    if needed:
        config |= {"model_type": "foreign", "architectures": ["Model"]}
        settings["tokenizer_class"] = "Tokenizer"
        settings["auto_map"]["AutoProcessor"] = "foreign.Processor"
        (folder / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "foreign.Processor"}}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


@pytest.fixture(params=[True, False], ids=["needed", "not needed"])
def with_code(request, model_dir, tmp_path, marker):
    """A model's folder with code, and whether it cannot be loaded without."""
    shutil.copytree(model_dir, tmp_path / "foreign")
    bring_code(tmp_path / "foreign", marker, request.param)
    return str(tmp_path / "foreign"), request.param


def adapter_on(base: str, folder: Path) -> Path:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    clean = Path(base).with_name("clean")
    shutil.copytree(base, clean)
    for name in ("config.json", "tokenizer_config.json"):
        content = {k: v for k, v in json.loads((clean / name).read_text()).items() if k != "auto_map"}
        content |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} if name == "config.json" else {}
        content.pop("tokenizer_class", None)
        (clean / name).write_text(json.dumps(content))
    (clean / "processor_config.json").unlink(missing_ok=True)
    model = AutoModelForCausalLM.from_pretrained(clean)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(folder)
    AutoTokenizer.from_pretrained(clean).save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    return folder


def trained(name, folder, **settings):
    args = SLiCConfig(str(folder / "out"), use_cpu=True, report_to="none", **settings)
    SLiCTrainer(model=name, args=args, train_dataset=Dataset.from_list(PAIRS))


def played(name, folder, model_dir, ref_model=False):
    config = {"use_cpu": True, "report_to": "none", "max_steps": 1, "num_watched_prompts": 0, "bf16": False}
    args = SPINConfig(str(folder / "out"), **config)
    if ref_model:
        rows, args = Dataset.from_list(PAIRS), SPINConfig(str(folder / "out"), **config, reference="initial")
        SPINTrainer(model=model_dir, ref_model=name, args=args, train_dataset=rows).train()
    else:
        SPINTrainer(model=name, args=args, train_dataset=Dataset.from_list(SFT))


ROUTES = {
    "trainer": lambda name, folder, model: trained(name, folder),
    "config for prefix sharing": lambda name, folder, model: trained(name, folder, prefix_sharing=True),
    "config for parts": lambda name, folder, model: trained(name, folder, max_completions_per_forward=2),
    "reference by name": lambda name, folder, model: played(name, folder, model, ref_model=True),
    "self-play": lambda name, folder, model: played(name, folder, model),
    "sampling": lambda name, folder, model: sample_candidates(
        name, PROMPTS, SamplingConfig(max_new_tokens=2), folder / "sampled"
    ),
    "weights for sampling": lambda name, folder, model: load_causal_lm(name),
    "window": lambda name, folder, model: context_window(name),
    "tokenizer": lambda name, folder, model: load_tokenizer(name),
    "evaluation": lambda name, folder, model: answer_logps(name, [{"prompt": "a ", "completions": ["b"]}]),
    "reward model": lambda name, folder, model: build_scorers([name]),
    "judge": lambda name, folder, model: build_scorers(judge=name),
    "check of a judge": lambda name, folder, model: check_scorers(judge=name),
    "merged adapter": lambda name, folder, model: merge_stage(
        folder, adapter=adapter_on(name, folder / "adapter"), trust_remote_code=False
    ),
    "sampling from an adapter": lambda name, folder, model: load_causal_lm(adapter_on(name, folder / "adapter")),
}


@pytest.mark.parametrize("route", ROUTES)
def test_code_that_comes_with_a_model_is_not_run(route, with_code, tmp_path, marker, model_dir):
    name, needed = with_code
    try:
        ROUTES[route](name, tmp_path, model_dir)
        problem = None
    except (ValueError, OSError) as error:
        problem = str(error)
    assert not marker.exists()
    if needed:
        assert problem is not None and "trust_remote_code" in problem
        setting = "reward_trust_remote_code" if route in ("reward model", "judge", "check of a judge") else None
        setting = setting or "trust_remote_code"
        assert f"set `{setting}=True` (on the command line `--{setting} true`)" in problem
    elif route != "reward model":  # the model has no head for scores
        assert problem is None


def test_it_is_run_where_it_is_trusted(with_code, marker, tmp_path, monkeypatch):
    """That the folder brings code which would run: without this the test above shows nothing."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    load_tokenizer(with_code[0], trust_remote_code=True)
    assert marker.exists()


def test_vllm_is_told_not_to_trust(model_dir, tmp_path):
    """An interpreter that only writes down what it is told."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nread line; echo "$line" > {tmp_path}/told.json; exit 3\n')
    python.chmod(0o755)
    config = SamplingConfig(sampling_engine="vllm", vllm_python=str(python))
    with pytest.raises(RuntimeError, match="exit status 3"):
        sample_candidates(model_dir, PROMPTS, config, tmp_path / "sampled")
    assert json.loads((tmp_path / "told.json").read_text())["llm"]["trust_remote_code"] is False


def test_code_of_a_hub_model_is_not_even_downloaded(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append(k) or str(tmp_path))
    local_model(ModelConfig(model_name_or_path="some/model"))
    assert all("*.py" not in call["allow_patterns"] for call in asked) and len(asked) == 2


# Pickles

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
        UnsafeFileError, match=f"{file} holds more than tensors and plain values: it names 'posix.system'.*Go on"
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


def test_deepspeed_configs_cannot_import(tmp_path, model_dir):
    code = {"torch_autocast": {"enabled": True, "lower_precision_safe_modules": ["foreign.Module"]}}
    (tmp_path / "ds.json").write_text(json.dumps(code))
    for config in (code, str(tmp_path / "ds.json"), json.dumps(code)):
        with pytest.raises(ValueError, match="names 'foreign.Module', which DeepSpeed would import"):
            refuse_code_in_deepspeed(config)
    for config in (None, "gone.json", {}, {"torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Linear"]}}):
        refuse_code_in_deepspeed(config)


# Config files

DATACLASSES = (ScriptArguments, SLiCConfig, ModelConfig, DatasetMixtureConfig, SamplingConfig, RoundsConfig)
BASE = {"model_name_or_path": "model", "dataset_name": "data", "output_dir": "out", "num_rounds": 1, "bf16": False}


def parse(folder, values, *arguments):
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False) if isinstance(values, dict) else values)
    playground = REPOSITORY / "recipes" / "configs" / "slic_playground.yaml"
    return parse_recipe_args(DATACLASSES, playground, ["--config", str(file), *arguments])


def test_a_config_file_may_name_what_the_command_line_may(tmp_path, monkeypatch):
    values = {
        "rewards": ["mine.py:score", "package.module:f", "org/reward-model"],
        "judge": "a.py:b",
        "sampling_engine": "vllm",
        "vllm_python": "/x/python",
        "vllm_args": {"worker_cls": "a.b", "seed": 1},
        "trust_remote_code": True,
        "reward_trust_remote_code": True,
        "attn_implementation": "somebody/kernel",
        "model_init_kwargs": {"trust_remote_code": True, "dtype": "float32"},
    }
    monkeypatch.setenv("TRL_EXT_TEST", "before")
    parsed = parse(tmp_path, {**BASE, **values, "env": {"TRL_EXT_TEST": 5}})
    found = {name: getattr(part, name) for part in parsed[::-1] for name in values if hasattr(part, name)}
    assert found == values and os.environ["TRL_EXT_TEST"] == "5"


@pytest.mark.parametrize("variables", ["A=1", ["A"], {1: 2}, {"A=B": 1}, {"A": "\0"}, {"": 1}, None])
def test_odd_environment_variables_of_a_config_file_are_refused(variables, tmp_path):
    with pytest.raises(TypeError, match="has env: .* values by names of environment variables"):
        parse(tmp_path, {**BASE, "rewards": ["a:b"], "env": variables})


def test_the_command_line_wins_over_the_file(tmp_path):
    """Over the same option, and over the option that it excludes."""
    values = {
        "rewards": ["a:b"],
        "reward_weights": [2.0],
        "datasets": [{"path": "mixed"}],
        "seed": 1,
        "use_peft": True,
    }
    values = {**{key: value for key, value in BASE.items() if key != "dataset_name"}, **values}
    words = ["--dataset_name", "mine.jsonl", "--ranker", "c:d", "--seed", "2", "--use_peft", "false"]
    script, training, model, mixture, _, rounds = parse(tmp_path, values, *words)
    assert (script.dataset_name, mixture.datasets) == ("mine.jsonl", [])
    assert (rounds.ranker, rounds.rewards, rounds.reward_weights) == ("c:d", None, None)
    assert (training.seed, model.use_peft) == (2, False)
    del values["rewards"], values["reward_weights"]
    assert parse(tmp_path, {**values, "ranker": "c:d"}, "--rewards", "a:b")[-1].ranker is None


@pytest.mark.parametrize("arguments", [["--config=a.yaml", "--config", "b.yaml"], ["--config", "a", "--config", "a"]])
def test_a_second_config_file_is_refused(arguments):
    with pytest.raises(ValueError, match="`--config` is given more than once"):
        parse_recipe_args(DATACLASSES, "playground.yaml", arguments)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("a: [", ValueError, "config.yaml cannot be read as YAML"),
        ("- a\n- b", ValueError, "has to hold one `name: value` per line"),
        ("", ValueError, "holds None, and it has to hold"),
        ("1: 2", ValueError, "has to hold one `name: value` per line"),
        ("x: !!python/object/apply:os.system [touch marker]", ValueError, "cannot be read as YAML"),
        ("seed: !!bool x", ValueError, "cannot be read as YAML"),
        ('seed: 1\naccelerator_config: "\\ud800"', ValueError, "Line 2 of the config file .* half of a character"),
        ("reward: [a]", ValueError, "Unknown option 'reward' in .*Did you mean `rewards`"),
        ("seed: [1]", TypeError, r"has seed: \[1\], and it has to be int"),
        ("learning_rate: {a: 1}", TypeError, "has learning_rate: .* has to be float"),
        ("rewards: [1]", TypeError, r"has rewards: \[1\]"),
        ("dataset_name: 5", TypeError, "has dataset_name: 5, and it has to be str"),
        ("delta:", TypeError, "has delta: None, and it has to be float"),
    ],
)
def test_odd_config_files_are_refused_by_name(content, error, message, tmp_path):
    with pytest.raises(error, match=message):
        parse(tmp_path, content)
    with pytest.raises(FileNotFoundError, match="'gone.yaml' is not there"):
        parse_recipe_args(DATACLASSES, "playground.yaml", ["--config", "gone.yaml"])


def test_types():
    assert has_type(1, float) and has_type(None, int | None) and has_type(["a"], list[str] | None)
    assert not has_type(True, int) and not has_type(1.5, int) and not has_type([1], list[str])
    assert not has_type("a", float) and not has_type(None, str) and has_type({"a": 1}, dict | str)


# Data


def test_a_dataset_with_code_or_pickles_runs_none(tmp_path, marker):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()")
    (folder / "train.pkl").write_bytes(pickle.dumps(Malicious(marker)))
    for args, mixture in (
        (ScriptArguments(str(folder)), DatasetMixtureConfig()),
        (
            ScriptArguments(),
            DatasetMixtureConfig(datasets=[{"path": "pandas", "data_files": str(folder / "train.pkl")}]),
        ),
    ):
        with pytest.raises(Exception) as refused:  # noqa: B017  (of datasets' own kinds)
            load_datasets(args, mixture, with_eval=False, seed=0)
        assert str(refused.value) and not marker.exists()


def test_what_a_row_says_is_never_a_template_or_a_file(tokenizer, tmp_path, marker):
    """Text of rows goes to the chat template as values."""
    from trl_ext.data.prepare import prepare_row
    from trl_ext.data.rows import RowOptions

    code = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in (1).__class__.__base__.__subclasses__() %}"
    row = {"prompt": [{"role": "user", "content": code}], "chosen": [{"role": "assistant", "content": code}],
           "rejected": [{"role": "assistant", "content": str(tmp_path)}]}  # fmt: skip
    prepared = prepare_row(row, tokenizer, RowOptions())
    assert code in tokenizer.decode(prepared["prompt_ids"])
    # nor may it bring a template of its own
    evil = "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"
    with pytest.raises(ValueError, match="chat_template_kwargs"):
        prepare_row({**row, "chat_template_kwargs": {"chat_template": evil}}, tokenizer, RowOptions())
    assert not marker.exists()


def test_files_that_rows_name_are_not_opened(tmp_path, tokenizer):
    from trl_ext.data.prepare import prepare_dataset
    from trl_ext.data.rows import RowOptions

    (tmp_path / "seen.png").write_text("no image")
    rows = Dataset.from_list([{**row, "seen": str(tmp_path / "seen.png")} for row in PAIRS])
    rows = rows.cast_column("seen", Image())
    assert "seen" not in prepare_dataset(rows, tokenizer, RowOptions(), name="train", keep_columns=True)[0].features
    rows = rows.rename_column("chosen", "spare")
    with pytest.raises(NotImplementedError, match="`chosen` of the train dataset must hold text, .*got .*Image"):
        prepare_dataset(rows.rename_column("seen", "chosen"), tokenizer, RowOptions(), name="train")
    with pytest.raises(NotImplementedError, match="`completion` of the train dataset must hold text, .*got .*Image"):
        sft_rows(rows.rename_column("seen", "completion"), tokenizer, SPINConfig("out"), None, "train")
    rows.remove_columns("prompt").rename_column("seen", "prompt").save_to_disk(tmp_path / "rows")
    with pytest.raises(NotImplementedError, match="`prompt` of the prompt dataset must hold text, .*got .*Image"):
        load_prompts(ScriptArguments(str(tmp_path / "rows")), DatasetMixtureConfig())


# Manifests


def begun(folder, stages=("one", "two")):
    run = Run(folder, {"seed": 1}, resume=False)
    run.keep("rows", {"train.jsonl": '{"a": 1}\n'})
    for name in stages:
        run.stage(name, look_around, inputs={"rows": folder / "rows" / "train.jsonl"})
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two runs with the same settings and stages."""
    folders = [tmp_path_factory.mktemp("run") / "run" for _ in range(2)]
    for folder in folders:
        begun(folder)
    return folders


@pytest.fixture
def run_folder(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def resume(folder):
    run = Run(folder, {"seed": 1}, resume=True)
    run.keep("rows", {"train.jsonl": "other"})
    return [run.stage(n, look_around, inputs={"rows": folder / "rows" / "train.jsonl"}) for n in ("one", "two")]


def test_what_was_not_touched_is_taken(run_folder):
    figures = [read_manifest(run_folder / name)["figures"] for name in ("one", "two")]
    assert resume(run_folder) == figures
    assert (run_folder / "one" / "calls").read_text() == "x", "not run again"


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


TAMPERING = {
    "figures": (lambda run, other: edit(run / "one/manifest.json", lambda m: m["figures"].update(calls=7)),
                "one/manifest.json was changed after it was written: it does not match its own digest"),
    "a key": (lambda run, other: edit(run / "one/manifest.json", lambda m: m.pop("figures")), "was changed after"),
    "its type": (lambda run, other: (run / "one/manifest.json").write_text("[1]"), "has no digest of itself"),
    "no JSON": (lambda run, other: (run / "one/manifest.json").write_text('{"stage":'), "cannot be read as JSON"),
    "no text": (lambda run, other: (run / "one/manifest.json").write_bytes(b"\xff\xfe\x00"), "cannot be read as JSON"),
    "truncated": (lambda run, other: os.truncate(run / "one/manifest.json", 100), "cannot be read as JSON"),
    "an output": (lambda run, other: (run / "one/calls").write_text("y"), "one/calls holds something else"),
    "its size": (lambda run, other: (run / "one/calls").write_text("xx"), "one/calls has 2 bytes, and stage 'one'"),
    "gone": (lambda run, other: (run / "one/calls").unlink(), "one/calls is gone, which stage 'one'"),
    "kept rows": (lambda run, other: (run / "rows/train.jsonl").write_text('{"a": 2}\n'), "train.jsonl holds"),
    "foreign": (lambda run, other: shutil.copytree(other / "one", run / "one", dirs_exist_ok=True),
                "one/manifest.json belongs to another run: its id is"),
    "of another stage": (lambda run, other: shutil.copytree(run / "two", run / "one", dirs_exist_ok=True),
                         "belongs to another stage, 'two', and was copied to that of 'one'"),
    "foreign run.json": (lambda run, other: shutil.copy(other / "run.json", run / "run.json"), "to another run: its"),
    "settings": (lambda run, other: edit(run / "run.json", lambda m: m["settings"].update(seed=2)),
                 "run.json was changed after it was written"),
    "broken settings": (lambda run, other: (run / "run.json").write_text("{}"), "run.json is damaged or of anoth"),
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERING)
def test_foreign_and_tampered_manifests_are_refused(what, run_folder, finished):
    tamper, message = TAMPERING[what]
    tamper(run_folder, finished[1])
    with pytest.raises(ValueError, match=message) as refused:
        resume(run_folder)
    assert "Put back what was there" in str(refused.value) and "set another `--output_dir`" in str(refused.value)
    called = run_folder / "one" / "calls"
    assert not called.exists() or len(called.read_text()) < 3, "nothing was run"


def test_a_manifest_whose_digest_was_forged_is_refused_by_its_form(run_folder):
    from trl_ext.runtime.files import sealed

    file = run_folder / "one" / "manifest.json"
    content = {k: v for k, v in json.loads(file.read_text()).items() if k != "digest"}
    for wrong in ({"outputs": [1]}, {"outputs": {"calls": 1}}, {"figures": None}, {"run": 5}, {"inputs": "x"}):
        file.write_text(sealed({**content, **wrong}))
        with pytest.raises(ManifestError, match="manifest.json (is damaged|does not say)"):
            resume(run_folder)


def test_checkpoints_of_a_finished_stage_may_go(tmp_path):
    run = Run(tmp_path, {}, resume=False)
    (tmp_path / "one" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "one" / "checkpoint-5" / "optimizer.pt").write_text("x")
    run.stage("one", look_around)
    shutil.rmtree(tmp_path / "one" / "checkpoint-5")
    Run(tmp_path, {}, resume=True).stage("one", look_around)


# Shards of samples


@pytest.fixture(scope="module")
def sampled(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled")
    sample_shards(model_dir, folder)
    return folder


def sample_shards(model, folder, **settings):
    config = SamplingConfig(num_candidates=2, max_new_tokens=4, **settings)
    return sample_candidates(model, PROMPTS, config, folder, shard_size=1, keep_empty=True)[0]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("shards/00000.jsonl", lambda text: text.replace('"index": 0', '"index": 1'), "does not match its digest"),
        ("shards/00000.jsonl", lambda text: text[:40], "cannot be read"),
        ("shards/00000.jsonl", lambda text: "", "does not match its digest"),
        ("shards/00000.jsonl", lambda text: "[[[", "cannot be read"),
        ("sampling.json", lambda text: text.replace("4", "5", 1), "was changed after it was written"),
        ("sampling.json", lambda text: "{}", "no digest of itself"),
    ],
)
def test_tampered_shards_are_refused(file, change, message, sampled, model_dir, tmp_path):
    shutil.copytree(sampled, tmp_path / "sampled")
    before = sample_shards(model_dir, tmp_path / "sampled")
    (tmp_path / "sampled" / file).write_text(change((sampled / file).read_text()))
    with pytest.raises((ValueError, FileExistsError), match=message) as refused:
        sample_shards(model_dir, tmp_path / "sampled")
    assert str(tmp_path / "sampled") in str(refused.value) and "emove" in str(refused.value)
    shutil.rmtree(tmp_path / "sampled")
    assert sample_shards(model_dir, tmp_path / "sampled") == before


def test_shards_of_other_settings_or_prompts_are_refused(sampled, model_dir, tmp_path):
    sample_shards(model_dir, tmp_path / "other", sampling_seed=7)
    for number in (0, 1):
        shutil.copytree(sampled, tmp_path / f"sampled-{number}")
    shutil.copy(tmp_path / "other/shards/00000.jsonl", tmp_path / "sampled-0/shards/00000.jsonl")
    shutil.copy(sampled / "shards/00001.jsonl", tmp_path / "sampled-1/shards/00000.jsonl")
    for number, message in ((0, "sampled with something else"), (1, "holds other prompts than it should")):
        with pytest.raises(ValueError, match=message):
            sample_shards(model_dir, tmp_path / f"sampled-{number}")


def test_tampered_scores_are_refused(tmp_path):
    rows = [{"prompt": "a", "completions": ["b", "cc"]}, {"prompt": "d", "completions": ["e"]}]

    def score():
        scorer = FunctionScorer(
            lambda completions, **kwargs: [float(len(text)) for text in completions], name="length"
        )
        return [row["scores"] for row in score_rows(rows, [scorer], folder=tmp_path, batch_size=1)]

    assert score() == score() == [[1.0, 2.0], [1.0]]
    first, second = sorted(tmp_path.rglob("0000?.json"))
    edit(first, lambda content: content["values"][0][0].reverse())
    with pytest.raises(
        ValueError, match="00000.json was changed after it was written.*remove it to score its rows ag"
    ):
        score()
    shutil.copy(second, first)
    with pytest.raises(ValueError, match="00000.json holds the scores of other rows"):
        score()
    first.unlink()
    assert score() == [[1.0, 2.0], [1.0]]
