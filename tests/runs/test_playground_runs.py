"""
The playgrounds as the README has them, each run once, with its figures held to bounds; and a claim tried on one.

They run with a seed that tuned nothing. The recipe of the first command runs whole; the others begin with what it has
made and they would have made themselves: the SFT model, its answers to the watched prompts, the candidates.
"""

import csv
import dataclasses
import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from tests.support import warm
from tests.support.data import REPOSITORY
from tests.support.printed_commands import printed_commands
from tests.support.processes import stages_are_numbered
from tests.support.recipes import RECIPES, recipe_module
from trl_ext.cli.parse import given_options, parse_recipe_args
from trl_ext.cli.start import start_playground, start_rounds
from trl_ext.comparison.arguments import parse_comparison_args
from trl_ext.comparison.results import ComparisonResults
from trl_ext.comparison.seed_run import SeedRun
from trl_ext.data.rows import RowOptions
from trl_ext.runs.run import Run
from trl_ext.runtime.run_lock import release_folder

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
sys.path.insert(0, str(REPOSITORY / "benchmarks" / "claims"))

import on_playground
import playground as figures
import slic_beats_sft
from claim import main

pytestmark = pytest.mark.slow

PRINTED = {one.command for one in printed_commands()}
# stages of the first run, by their names in others
CANDIDATES = "round-1/candidates"
MADE = {
    "sft": "sft",
    "start/evaluation": "start/evaluation",
    CANDIDATES: CANDIDATES,
    "candidates/candidates": CANDIDATES,
}
MODELS = {"rrhf": ["start", "best-of-n", "round-1", "round-2"], "rl": ["start", "trained"]}
ROWS = {
    "best_of_n": RowOptions(min_completions=1),
    "rrhf": RowOptions(min_completions=1),
    "train_click": RowOptions(min_completions=1, reference=True),
}


def play(recipe, *more):
    """Run what is printed, with options behind it; returns what it prints."""
    command = f"accelerate launch recipes/{recipe}.py"
    assert command in PRINTED
    words = [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(command)[2:], *map(str, more)]
    done = warm.run(words, capture_output=True, text=True, timeout=1800, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def first_playground(tmp_path_factory):
    """The folder of a finished run of the first command, and what it printed."""
    folder = tmp_path_factory.mktemp("playground") / "slic"
    return folder, play("slic", "--seed", 1, "--output_dir", folder)


def copied_stage(folder: Path, *, source: Path, **arguments):
    """What a stage of another run has made."""
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
    return json.loads((source / "manifest.json").read_text())["figures"]


@pytest.fixture
def share(first_playground, monkeypatch):
    """`share(names)`: from then on, stages of these names are copied from the first run, not run."""
    first, _ = first_playground
    stage = Run.stage

    def share(names):
        def copied(run, name, function, *, inputs=None, **arguments):
            if name not in names:
                return stage(run, name, function, inputs=inputs, **arguments)
            source = first / MADE[name]
            found = stage(run, name, copied_stage, inputs=inputs, source=source, **arguments)
            before, now = (json.loads((one / "manifest.json").read_text()) for one in (source, run.path(name)))
            assert now["inputs"] == before["inputs"], f"{name} would have been made of something else"
            for key in ("config", "playground", "mix_in", "load", "rewards", "judge"):
                assert now["arguments"].get(key) == before["arguments"].get(key), f"{name} would have another {key}"
            return found

        monkeypatch.setattr(Run, "stage", copied)

    return share


def begin(recipe, *arguments):
    """Begin a recipe's playground as the recipe does, as far as it is what the first one has made."""
    module = recipe_module(recipe)
    parse = parse_comparison_args if recipe == "compare" else parse_recipe_args
    parsed = parse(module.DATACLASSES, module.PLAYGROUND_CONFIG, list(arguments))
    if recipe == "compare":  # whose prompts have a reference
        SeedRun(parsed, REPOSITORY / "recipes", 1, given_options(arguments, module.PLAYGROUND_CONFIG))
        return
    is_round = recipe not in ("rl", "reward")
    rounds = (
        start_rounds(parsed, rows=ROWS.get(recipe, RowOptions()))
        if is_round
        else start_playground(parsed, num_stages=7)
    )
    if recipe in ("train_click", "rrhf"):  # likewise, and another reward; fewer candidates
        return
    if recipe != "reward":
        rounds.evaluate("start", rounds.model)
    rounds.make_candidates("round-1" if is_round else "candidates", rounds.model)


def play_on(recipe, share, folder):
    """Begin a playground with what the first one has made, and run what is printed; returns what it prints."""
    share(MADE)
    words = ["--output_dir", str(folder)]
    words += ["--seeds", "1", "--methods", "dpo"] if recipe == "compare" else ["--seed", "1"]
    begin(recipe, *words)
    release_folder(folder / "seed-1" if recipe == "compare" else folder)  # as if this process had ended
    stamps = {file: file.stat().st_mtime_ns for file in folder.rglob("manifest.json")}
    assert any(file.parent.name == "sft" for file in stamps)
    printed = play(recipe, *words, "--resume_from_checkpoint", "true")
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in stamps.items()), "a stage was run again"
    return printed


@pytest.mark.parametrize("recipe", sorted({*RECIPES} - {"reward", "compare", "spin", "sample_and_rank"}))
def test_playgrounds_as_the_readme_has_them(recipe, first_playground, tmp_path, request):
    folder, printed = first_playground
    if recipe != "slic":
        folder = tmp_path / recipe
        printed = play_on(recipe, request.getfixturevalue("share"), folder)
    models = json.loads((folder / "rounds.json").read_text())["models"]
    assert list(models) == MODELS.get(recipe, ["start", "round-1"])
    last = list(models.values())[-1]
    assert last["reward"] > models["start"]["reward"] and last["num_answers"] == last["num_prompts"] == 1000
    assert "held-out prompts, one answer each at temperature 1" in printed and stages_are_numbered(printed)
    assert "\nNext:\n#" in printed and (folder / "rounds.png").is_file()
    assert not figures.out_of_bounds(recipe, figures.rows_of(folder))
    if recipe == "rrhf":
        assert models["round-1"]["reward"] > models["best-of-n"]["reward"]
        assert models["round-2"]["reward"] > models["round-1"]["reward"]


def test_the_playground_of_a_reward_model(share, tmp_path):
    printed = play_on("reward", share, tmp_path / "run")
    judged = json.loads((tmp_path / "run" / "watched" / "judged" / "manifest.json").read_text())["figures"]
    assert judged["accuracy"] > 0.5 and judged["num_pairs"] > 100 and "the reward model prefers the best" in printed
    assert not figures.out_of_bounds("reward", figures.rows_of(tmp_path / "run"))


def test_the_playground_of_a_comparison(share, tmp_path):
    play_on("compare", share, tmp_path / "run")
    found = {result.method: result for result in ComparisonResults.load(tmp_path / "run" / "comparison.json").results}
    assert list(found) == ["sft", "dpo"] and found["dpo"].status == "done" and found["dpo"].measured["updates"] == 50
    assert (tmp_path / "run" / "comparison.html").is_file()


def test_the_playground_of_spin(tmp_path):
    printed = play("spin", "--output_dir", tmp_path / "spin", "--num_iterations", "1")
    models = json.loads((tmp_path / "spin" / "spin.json").read_text())["models"]
    assert list(models) == ["start", "iteration-0", "control-0"] and "SFT" in printed
    assert (tmp_path / "spin" / "spin.png").is_file()


def test_a_claim_on_the_playground_runs_as_it_is(share, tmp_path, monkeypatch):
    """With two updates and two answers to a prompt: the script with all its methods, from SFT model to figure."""
    share(["sft"])
    values = yaml.safe_load(on_playground.PLAYGROUND.read_text()) | {"max_steps": 2, "num_candidates": 2}
    monkeypatch.setattr(on_playground, "PLAYGROUND", tmp_path / "compare_playground.yaml")
    on_playground.PLAYGROUND.write_text(yaml.safe_dump(values))
    monkeypatch.setattr(on_playground.compare, "__kwdefaults__", {"on_pairs": None, "folder": tmp_path / "runs"})
    claim = dataclasses.replace(
        slic_beats_sft.CLAIM, settings=on_playground.settings(best_of_n={}, slic_direct={}, slic_sample_rank={})
    )
    main(claim, ["--seeds", "1"], runs=tmp_path / "kept", results=tmp_path / "results")
    with (tmp_path / "results" / "slic_beats_sft.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(slic_beats_sft.PAPER)
    assert len({row["reward"] for row in rows.values()}) > 2 and float(rows["sft"]["accuracy"]) > 0.5
    assert (tmp_path / "results" / "slic_beats_sft.png").is_file()
