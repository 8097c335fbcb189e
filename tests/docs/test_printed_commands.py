"""
Every command that the project prints is tried, by its kind (`KINDS`): run as printed, here or by another test; or read
by its recipe's own parser and taken as far as the built trainer, with small stand-ins for models and data of the Hub.
"""

import argparse
import configparser
import functools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Trainer

from tests.support.data import PAIRS, REPOSITORY, read_jsonl
from tests.support.printed_commands import KINDS, RUN, commands_of, kind_of, printed_commands
from tests.support.recipes import RECIPES, recipe_module
from trl_ext import SPINTrainer
from trl_ext.cli.main import recipes, split_options
from trl_ext.cli.options import options_of, recipe_dataclasses
from trl_ext.cli.parse import parse_recipe_args
from trl_ext.runs.run import Run

PRINTED = printed_commands()
COMMANDS = {kind: sorted({one.command for one in PRINTED if kind_of(one.command) == kind}) for kind in KINDS}
CLAIMS = sorted(
    file.stem for file in (REPOSITORY / "benchmarks" / "claims").glob("*.py") if "\nCLAIM = " in file.read_text()
)
RECIPE = re.compile(r"recipes/(\w+)\.py(?= |$)(.*)")


@functools.cache
def options_of_recipe(name) -> set[str]:
    return set(options_of(*recipe_dataclasses(REPOSITORY / "recipes" / f"{name}.py")))


def launched(command: str) -> tuple[str, list[str]]:
    """The recipe that a command launches, and its options as far as they are printed."""
    if command.startswith("trl-ext "):
        _, recipe, *words = shlex.split(command)
        launcher, words = split_options(words, dict.fromkeys(options_of_recipe(recipes()[recipe].stem)))
        launch_command_parser().parse_args([*launcher, "recipe.py"])
        return recipes()[recipe].stem, words
    match = RECIPE.search(command)
    return match[1], [word for word in shlex.split(match[2]) if word != "..."]


def test_every_printed_command_is_tried():
    assert len(PRINTED) > 80 and len(COMMANDS["recipe"]) > 40
    for one in PRINTED:
        assert kind_of(one.command), (
            f"{one.where} prints `{one.command}`, which no test tries. Give it a kind in KINDS of "
            "tests/support/printed_commands.py, and a test that tries this kind."
        )
    assert set(COMMANDS["run"]) == set(RUN), "nobody prints it"
    for command in (*COMMANDS["playground"], *COMMANDS["help"]):
        assert RECIPE.search(command)[1] in {*RECIPES, "NAME"}, command


# Recipes, as far as the trainer

# added to what is printed, where the recipe has the option: no GPU here, and little time. All that is changed.
CHANGED = {"bf16": "False"}
# likewise, where prompts are answered; `--seeds` for the comparison
CHANGED_WHERE_SAMPLED = {"num_watched_prompts": "2", "max_new_tokens": "4", "seeds": "1"}

MODELS = (
    "MODEL", "Qwen/Qwen2.5-0.5B-Instruct", "alignment-handbook/zephyr-7b-sft-full", "path/to/alpaca-7b", "gpt2-large",
    "cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr",
)  # fmt: skip
REWARD_MODELS = ("path/to/reward-model", "runs/reward", "cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr")


def chat(*texts):
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


ROWS = [{**row, "prompt": f"{number}. {row['prompt']}"} for number, row in enumerate(PAIRS)]
CHATS = [
    {"prompt": row["prompt"], **{key: chat(row["prompt"], row[key]) for key in ("chosen", "rejected")}} for row in ROWS
]
RANKED = [
    {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"], "hm"], "scores": [1.0, 0.5, 0.0]}
    for row in ROWS
]
FILES = {
    "pairs.jsonl": [{**row, "reference": row["chosen"]} for row in ROWS],
    "prompts.jsonl": [{**row, "reference": row["chosen"]} for row in ROWS],
    "path/to/prompts.jsonl": [{"prompt": row["prompt"], "reference": row["chosen"]} for row in ROWS],
    "ranked.jsonl": RANKED,
    "labelled.jsonl": [
        {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
        for row in ROWS
        for key in ("chosen", "rejected")
    ],
    "data/ranked/ranked.jsonl": RANKED,  # of `sample_and_rank.py`
    "sft.jsonl": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS],
}
DATASETS = {
    "DATA": {"train": ROWS},
    "Dahoas/rm-static": {"train": ROWS, "test": ROWS},
    "HuggingFaceH4/ultrafeedback_binarized": {"train_prefs": CHATS, "test_prefs": CHATS},
    "trl-internal-testing/tldr-preference-sft-trl-style": {"train": CHATS, "validation": CHATS},
}


@pytest.fixture(scope="module")
def stand_ins(model_dir, tmp_path_factory):
    """A folder with all but `FILES` that printed commands and published configs name, under these names."""
    folder = tmp_path_factory.mktemp("printed")
    for name in ("recipes", "accelerate_configs"):
        (folder / name).symlink_to(REPOSITORY / name)
    for name in MODELS:
        shutil.copytree(model_dir, folder / name)
    for name in REWARD_MODELS:
        shutil.copytree(model_dir, folder / name)
        torch.manual_seed(0)  # of the head, so that it is the same whatever test comes before
        model = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=1)
        tokens = torch.arange(model.config.vocab_size)
        ended = torch.stack([tokens, torch.full_like(tokens, model.config.eos_token_id)], dim=1)
        with torch.no_grad():  # scores on both sides of 0.5: about 0 on average, of texts with an end and without
            means = [model.model(ids).last_hidden_state[:, -1].mean(dim=0) for ids in (tokens[:, None], ended)]
            basis = torch.linalg.qr(torch.stack(means, dim=1)).Q
            model.score.weight.sub_(model.score.weight @ basis @ basis.T).mul_(1000)
        model.save_pretrained(folder / name)
    for name, splits in DATASETS.items():
        DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()}).save_to_disk(folder / name)
    ultrachat = folder / "HuggingFaceH4" / "ultrachat_200k" / "data"
    ultrachat.mkdir(parents=True)
    rows = [{"prompt": row["prompt"], "messages": row["chosen"]} for row in CHATS]
    Dataset.from_list(rows).to_parquet(ultrachat / "train_sft-00000-of-00001.parquet")
    (folder / "my_rewards.py").write_text(
        "def score(completions, **columns):\n    return [float(len(set(text))) for text in completions]\n"
    )
    (folder / "my_classifier.py").write_text(
        "def is_clean(completions, **columns):\n    return [float(len(text) % 2) for text in completions]\n"
    )
    (folder / "my.yaml").write_text("model_name_or_path: MODEL\ndataset_name: pairs.jsonl\noutput_dir: runs/mine\n")
    return folder


class BuiltError(RuntimeError):
    """A trainer is about to train."""


@pytest.fixture
def built(monkeypatch):
    """The trainers that are built: each ends its stage when it would begin to train. Stages run in this process."""
    trainers = []

    def train(trainer, *args, **kwargs):
        trainers.append(trainer)
        raise BuiltError

    def stage(run, name, function, *, inputs=None, shards_models=False, title=None, **arguments):
        folder = run.path(name)
        folder.mkdir(parents=True, exist_ok=True)
        figures = function(folder, **(inputs or {}), **arguments)
        (folder / "manifest.json").write_text(json.dumps({"figures": figures, "seconds": 0.0}))
        return figures

    monkeypatch.setattr(Trainer, "train", train)
    monkeypatch.setattr(Run, "stage", stage)
    return trainers


def with_changes(recipe: str, words: list[str]) -> list[str]:
    """The words of a command with those of `CHANGED` behind them, which win."""
    config = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text()) if "--config" in words else {}
    samples = "num_rounds" in config or "--num_rounds" in words or recipe in ("spin", "compare", "sample_and_rank")
    changes = {**CHANGED, **(CHANGED_WHERE_SAMPLED if samples else {})}
    known = options_of_recipe(recipe)
    return [*words, *(word for name, value in changes.items() if name in known for word in (f"--{name}", value))]


@pytest.fixture
def here(stand_ins, tmp_path, monkeypatch):
    """A working directory that looks like the repository, with the stand-ins beside."""
    for entry in stand_ins.iterdir():
        if entry.name in ("runs", "path"):  # which are written to
            shutil.copytree(entry, tmp_path / entry.name)
        else:
            (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(name, rows):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("command", COMMANDS["recipe"], ids=lambda command: launched(command)[0])
def test_printed_recipes_are_read_and_their_trainers_built(command, here, built):
    recipe, words = launched(command)
    if command.startswith("accelerate launch "):
        launcher = launch_command_parser().parse_args(shlex.split(command.removeprefix("accelerate launch ")))
        assert launcher.training_script == f"recipes/{recipe}.py"
        if launcher.config_file is not None:
            load_config_from_file(launcher.config_file)
    words = with_changes(recipe, words or ["--config", "my.yaml"])  # for `...`
    file = words[words.index("--config") + 1] if "--config" in words else None
    named = {*words, *re.findall(r"\S+", "" if file is None else Path(file).read_text())}
    for name in FILES:
        if name in named:
            write_rows(name, FILES[name])
    module = recipe_module(recipe)
    main = module.main
    if recipe == "sample_and_rank":  # which builds none
        main(words)
        assert read_jsonl("data/ranked/ranked.jsonl")
        return
    with pytest.raises(SystemExit if recipe == "compare" else BuiltError):  # a comparison goes on with the next
        main(words)
    parsed = parse_recipe_args(module.DATACLASSES, module.PLAYGROUND_CONFIG, words)
    assert len(built) == (len(parsed[1].methods) if recipe == "compare" else 1)
    config = {} if file is None else yaml.safe_load(Path(file).read_text())
    for trainer in built:
        assert len(trainer.train_dataset) > 0 and trainer.model.num_parameters() > 0
        for name in ("gradient_accumulation_steps", "lr_scheduler_type", "max_length", "num_train_epochs", "optim"):
            if name in config:
                assert getattr(trainer.args, name) == config[name], name


EXAMPLES = {
    f"{page.stem}-{number}": code
    for page in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("**/*.md"))]
    for number, code in enumerate(re.findall(r"```python\n(.+?)```", page.read_text(), re.S))
    if "trainer = " in code
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_printed_examples_build_their_trainers(name, here, monkeypatch):
    code, trainers = EXAMPLES[name], []
    for one in (Trainer, SPINTrainer):
        monkeypatch.setattr(one, "train", lambda trainer, **_: trainers.append(trainer))
    rows = [{"chosen": row["chosen"], "rejected": row["rejected"]} for row in CHATS]
    if "SPIN" in code:
        rows = [{"prompt": f"{n}. {row['prompt']}", "completion": row["chosen"]} for n in range(50) for row in ROWS]
    monkeypatch.setattr("datasets.load_dataset", lambda path, split: Dataset.from_list(rows))
    # a plain `DPOTrainer` wants a GPU for its default of bfloat16
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: "DPOTrainer(" in code)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    exec(compile(code, name, "exec"), {"__name__": "__main__"})
    (trainer,) = trainers
    assert type(trainer).__name__ in code and ("SPIN" in code or len(trainer.train_dataset) > 0)


def test_every_example_is_found():
    assert list(EXAMPLES) == ["README-0", "spin-0", "prefix-sharing-0", "quickstart-0", "quickstart-1"]


def test_trls_reward_script(here, monkeypatch):
    """As the page on reward models prints it, on pairs of the format that `sample_and_rank.py` makes."""
    from trl.scripts.reward import main, make_parser

    file = {
        "model_name_or_path": "MODEL", "output_dir": "reward",
        "datasets": [{"path": "json", "data_files": "pairs.jsonl"}],
        "bf16": False, "max_steps": 1, "report_to": "none",
    }  # fmt: skip
    pairs = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in ROWS]
    write_rows("pairs.jsonl", pairs)
    Path("reward.yaml").write_text(yaml.safe_dump(file))
    main(*make_parser().parse_args_and_config(["--config", "reward.yaml"]))
    assert AutoModelForSequenceClassification.from_pretrained("reward").num_labels == 1


# Other commands


def in_a_shell(command, folder):
    """Run what is printed in a folder that holds a copy of what it works on; returns what it prints."""
    assert command in RUN
    environment = {
        **os.environ, "PYTHONPATH": str(REPOSITORY), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    }  # fmt: skip
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, cwd=folder, env=environment, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pages_that_are_made(tmp_path):
    shutil.copytree(REPOSITORY / "benchmarks" / "claims", tmp_path / "benchmarks" / "claims")
    page = Path("benchmarks/claims/README.md")
    (tmp_path / page).write_text("")
    in_a_shell("python benchmarks/claims/summary.py", tmp_path)
    assert (tmp_path / page).read_text() == (REPOSITORY / page).read_text()


def test_committed_measurements_are_drawn_and_printed(tmp_path):
    (tmp_path / "benchmarks").symlink_to(REPOSITORY / "benchmarks")
    in_a_shell("python benchmarks/plot.py FOLDER", tmp_path)
    drawn = {file.name: file.stat().st_size for file in (tmp_path / "FOLDER").iterdir()}
    assert set(drawn) == {"prefix_sharing_speed.png", "prefix_sharing_memory.png", "playground.svg"}
    assert min(drawn.values()) > 5000
    table = in_a_shell("python benchmarks/playground.py --table", tmp_path)
    assert table.count("\n") > 8 and table in (REPOSITORY / "docs" / "playground.md").read_text()
    assert "| full, DDP |" in in_a_shell("python benchmarks/scaling.py", tmp_path)


def as_main(command, monkeypatch):
    """Run `python ...` in this process, as `__main__`."""
    program, *words = shlex.split(command)
    assert program == "python"
    is_module = words[0] == "-m"
    monkeypatch.setattr(sys, "argv", words[is_module:])
    if is_module:
        runpy.run_module(words[1], run_name="__main__")
    else:
        monkeypatch.syspath_prepend(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")  # it is imported already
@pytest.mark.parametrize("command", COMMANDS["small model"])
def test_a_small_model(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_main(command, monkeypatch)
    name = command.split()[-1]
    assert AutoModelForCausalLM.from_pretrained(name).num_parameters() > 100_000
    assert AutoTokenizer.from_pretrained(name)("a").input_ids


class ParsedError(Exception):
    """The options of a script are parsed."""


@pytest.mark.parametrize("command", COMMANDS["script"])
def test_options_of_scripts_are_parsed(command, monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_end(parser, *args, **kwargs):
        raise ParsedError(parse_args(parser, *args, **kwargs))

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
    for name in CLAIMS if "NAME" in command else [""]:
        with pytest.raises(ParsedError):
            as_main(command.replace("NAME", name), monkeypatch)


def test_what_the_other_commands_name_is_there():
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    markers = (REPOSITORY / "pyproject.toml").read_text()
    for command in (*COMMANDS["suite"], *COMMANDS["script"]):
        for extra in re.findall(r"\[(\w+)\]", command):
            assert extra in setup["options.extras_require"], command
        for file in re.findall(r"[\w/]+\.(?:py|txt|sbatch)(?= |$)", command.replace("NAME", "claim")):
            assert (REPOSITORY / file).is_file(), command
        for marker in re.findall(r"pytest -m (\w+)", command):
            assert f'"{marker}: ' in markers, command


# The search itself


def test_commands_are_found_wherever_they_stand(tmp_path):
    (tmp_path / "page.md").write_text(
        "Say `pytest -m\nslow`, not `accelerate launch`, `trl sft` or `GRACE=1 sbatch ...`.\n\n"
        "```\npip install x && accelerate launch a.py --b 1 \\\n    --c 'd  e'\npython f.py   # quick\n```\n"
        "    python not_in_a_fence.py\n"
    )
    (tmp_path / "recipe.py").write_text(
        '"""\nDoes it.\n\n    accelerate launch r.py \\\n        --x 1\n    accelerate launch s.py \\\\\n        --y\n'
        '\npython r.py is prose. `--z`\n"""\nx = "    python no.py"\n'
    )
    (tmp_path / "config.yaml").write_text(
        '# `pip install "a[b]"`:\n#\n#   accelerate launch c.py ...\nkey: python v.py\n'
    )
    found = {
        name: [(one.where.partition(":")[2], one.command) for one in commands_of(tmp_path / name, tmp_path)]
        for name in ("page.md", "recipe.py", "config.yaml")
    }
    assert found == {
        "page.md": [
            ("1", "pytest -m slow"),
            ("5", "accelerate launch a.py --b 1 --c 'd e'"),
            ("5", "pip install x"),
            ("7", "python f.py"),
        ],
        "recipe.py": [("4", "accelerate launch r.py --x 1"), ("6", "accelerate launch s.py --y")],
        "config.yaml": [("1", 'pip install "a[b]"'), ("3", "accelerate launch c.py ...")],
    }
