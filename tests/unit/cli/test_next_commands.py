"""The commands that recipes print at their end can be run as they are."""

import json
import shlex
import sys
from types import SimpleNamespace

import pytest

from tests.support.data import PAIRS, REPOSITORY
from tests.support.recipes import DATACLASSES
from trl_ext.cli.preflight import check_before_imports
from trl_ext.runs import next_commands
from trl_ext.runtime.jsonl import write_jsonl


@pytest.fixture(autouse=True)
def a_recipe(monkeypatch):
    monkeypatch.setattr(next_commands, "is_recipe", lambda: True)
    for variable in next_commands.LAUNCHER_VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def called(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [str(REPOSITORY / "recipes" / words[0]), *words[1:]])


def check(command: str) -> list[str]:
    """Look at a command as the recipe would, or compile its code; returns the words of a recipe's."""
    words = shlex.split(command)
    assert words[0] == "python"
    if words[1] == "-c":
        compile(words[2], "command", "exec")
        return []
    recipe = words[1].rpartition("/")[2].removesuffix(".py")
    check_before_imports(DATACLASSES[recipe], words[2:])
    return words[2:]


def test_after_rounds(model_dir, tmp_path, monkeypatch):
    called(monkeypatch, "slic.py", "--num_rounds=1", "--resume_from_checkpoint", "true", "--hub_token", "secret",
           "--output_dir", str(tmp_path / "run"))  # fmt: skip
    ranked = tmp_path / "run" / "round-1" / "ranked" / "ranked.jsonl"
    ranked.parent.mkdir(parents=True)
    write_jsonl(ranked, [{"prompt": "a", "completions": ["b", "c"], "scores": [1.0, 0.0]}])
    rounds = SimpleNamespace(
        run=SimpleNamespace(folder=tmp_path / "run", path=(tmp_path / "run").joinpath),
        config=SimpleNamespace(num_rounds=1),
        sampling=SimpleNamespace(max_new_tokens=16),
        model=model_dir, model_to_take=model_dir, first_prompt='3 "x"', stopped=None,
    )  # fmt: skip
    purposes, commands = zip(*next_commands.after_rounds(rounds), strict=True)
    assert len(commands) == 3 and "rrhf.py" in purposes[0] and "round 2" in purposes[1]
    words = check(commands[0])
    assert words[words.index("--dataset_name") + 1] == str(ranked) and f"{tmp_path}/run-rrhf" in words
    words = check(commands[1])
    assert words[-4:] == ["--num_rounds", "2", "--resume_from_checkpoint", "true"] and "secret" not in words
    assert words.count("--num_rounds") == 1 and "--num_rounds=1" not in words
    check(commands[2])
    rounds.stopped = "the reward rose while perplexity went up"
    assert len(next_commands.after_rounds(rounds)) == 2  # without another round


def test_after_self_play(model_dir, tmp_path, monkeypatch):
    called(monkeypatch, "spin.py", "--output_dir", str(tmp_path))
    pairs = tmp_path / "iteration-0" / "generated" / "pairs.jsonl"
    pairs.parent.mkdir(parents=True)
    write_jsonl(pairs, PAIRS)
    game = SimpleNamespace(
        run=SimpleNamespace(folder=tmp_path, path=tmp_path.joinpath),
        config=SimpleNamespace(num_iterations=3, max_new_tokens=16),
        model=model_dir, model_to_take=model_dir, rows=[{"prompt": [{"role": "user", "content": "Hi"}]}], stopped=None,
    )  # fmt: skip
    commands = [command for _, command in next_commands.after_self_play(game)]
    assert "--num_iterations 4 --resume_from_checkpoint true" in commands[1] and "'content': 'Hi'" in commands[2]
    for command in commands:
        check(command)


def test_after_one_training(model_dir, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    data = ["--model_name_or_path", model_dir, "--dataset_name", str(tmp_path / "rows.jsonl")]
    script_args = SimpleNamespace(dataset_name=data[-1], dataset_config=None, dataset_train_split="train")
    for recipe, number in (("rrhf.py", 3), ("dpo.py", 3), ("reward.py", 1)):
        called(monkeypatch, recipe, *data, "--beta=0.1", "--learning_rate", "1e-5")
        found = next_commands.after_training(script_args, model_dir, model_dir, ["prompt", "chosen", "rejected"])
        assert len(found) == number
        for _, command in found:
            words = check(command.replace("--beta=0.1 ", ""))
            assert not words or f"{model_dir}-" in words[words.index("--output_dir") + 1]


def test_after_ranking_and_comparing(model_dir, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "ranked.jsonl", [{"prompt": "a", "completions": ["b", "c"], "scores": [1.0, 0.0]}])
    called(monkeypatch, "sample_and_rank.py")
    commands = [command for _, command in next_commands.after_ranking(model_dir, tmp_path)]
    assert len(commands) == 2
    called(monkeypatch, "compare.py", "--seeds", "1", "2", "--output_dir", str(tmp_path))
    config = tmp_path / "seed-1" / "dpo" / "model" / "config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps({"model_name_or_path": model_dir, "dataset_name": str(tmp_path / "ranked.jsonl")}))
    result = {"label": "DPO", "status": "done", "examples": [], "seed": 1}
    results = [
        SimpleNamespace(method="dpo", scores={"reward": [1.0]}, **result),
        SimpleNamespace(method="sft", scores={"reward": [2.0]}, **result),
    ]
    settings = SimpleNamespace(output_dir=str(tmp_path), seeds=[1, 2])
    found = next_commands.after_comparison(settings, results, {"dpo": "dpo", "sft": None})
    assert len(found) == 3 and "--seeds 1 2 3 --resume_from_checkpoint true" in found[1][1]
    for command in (*commands, *(command for _, command in found)):
        check(command)


def test_the_options_of_the_launcher_are_kept(monkeypatch, tmp_path):
    assert next_commands.folder_beside("runs/slic", "rrhf") == "runs/slic-rrhf"
    called(monkeypatch, "slic.py")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # launched, by something whose words are not known
    assert next_commands.same_command().startswith("accelerate launch ")


def test_elsewhere_nothing_is_printed(monkeypatch, capsys):
    monkeypatch.undo()
    assert not next_commands.is_recipe() and next_commands.after_rounds(None) == []
    next_commands.print_next([])
    assert capsys.readouterr().out == ""
