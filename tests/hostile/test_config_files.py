"""What a config file may name, and the odd ones that are refused."""

import os

import pytest
import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from tests.support.data import REPOSITORY
from trl_ext import SLiCConfig
from trl_ext.cli.parse import parse_recipe_args
from trl_ext.runs.config import RoundsConfig
from trl_ext.runtime.settings import has_type
from trl_ext.sampling.config import SamplingConfig

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
    with pytest.raises(TypeError, match="`env` in the config file .* must be values by names of env"):
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
    with pytest.raises(ValueError, match="`--config` must be given once"):
        parse_recipe_args(DATACLASSES, "playground.yaml", arguments)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("a: [", ValueError, "config.yaml cannot be read as YAML"),
        ("- a\n- b", ValueError, "must hold one `name: value` per line"),
        ("", ValueError, "must hold one `name: value` per line, got None"),
        ("1: 2", ValueError, "must hold one `name: value` per line"),
        ("x: !!python/object/apply:os.system [touch marker]", ValueError, "cannot be read as YAML"),
        ("seed: !!bool x", ValueError, "cannot be read as YAML"),
        ('seed: 1\naccelerator_config: "\\ud800"', ValueError, "Line 2 .* must hold whole characters"),
        ("reward: [a]", ValueError, "Unknown option 'reward' in .*Did you mean `rewards`"),
        ("seed: [1]", TypeError, r"`seed` in the config file .* must be int.*, got \[1\]"),
        ("learning_rate: {a: 1}", TypeError, "`learning_rate` in the config file .* must be float, got"),
        ("rewards: [1]", TypeError, r"`rewards` in the config file .* must be .*, got \[1\]"),
        ("dataset_name: 5", TypeError, "`dataset_name` in the config file .* must be str .*, got 5"),
        ("delta:", TypeError, "`delta` in the config file .* must be float, got None"),
    ],
)
def test_odd_config_files_are_refused_by_name(content, error, message, tmp_path):
    with pytest.raises(error, match=message):
        parse(tmp_path, content)
    with pytest.raises(FileNotFoundError, match="must be a YAML file, got 'gone.yaml', which is not there"):
        parse_recipe_args(DATACLASSES, "playground.yaml", ["--config", "gone.yaml"])


def test_types():
    assert has_type(1, float) and has_type(None, int | None) and has_type(["a"], list[str] | None)
    assert not has_type(True, int) and not has_type(1.5, int) and not has_type([1], list[str])
    assert not has_type("a", float) and not has_type(None, str) and has_type({"a": 1}, dict | str)
