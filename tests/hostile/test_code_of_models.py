"""Code that comes with a model runs only where it is trusted."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from trl import ModelConfig

from tests.support.malicious import PROMPTS, ROUTES
from trl_ext.runs.settings import local_model
from trl_ext.runtime.models import load_tokenizer
from trl_ext.sampling.candidates import sample_candidates
from trl_ext.sampling.config import SamplingConfig

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


@pytest.fixture(params=[True, False], ids=["needed", "not needed"])
def with_code(request, model_dir, tmp_path, marker):
    """A model's folder with code, and whether it cannot be loaded without."""
    shutil.copytree(model_dir, tmp_path / "foreign")
    bring_code(tmp_path / "foreign", marker, request.param)
    return str(tmp_path / "foreign"), request.param


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
    python.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/told; exit 3\n')
    python.chmod(0o755)
    config = SamplingConfig(sampling_engine="vllm", vllm_python=str(python))
    with pytest.raises(RuntimeError, match="exit status 3"):
        sample_candidates(model_dir, PROMPTS, config, tmp_path / "sampled")
    assert "--no-trust-remote-code" in (tmp_path / "told").read_text().split()


def test_code_of_a_hub_model_is_not_even_downloaded(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append(k) or str(tmp_path))
    local_model(ModelConfig(model_name_or_path="some/model"))
    assert all("*.py" not in call["allow_patterns"] for call in asked) and len(asked) == 2
