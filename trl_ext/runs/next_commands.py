"""The commands that a recipe prints at its end: what to do with what it has made."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runtime.signals import LAUNCHER_VARIABLES
from .manifest import without_secrets

Commands = list[tuple[str, str]]  # what each is for, and the command
LONGEST_PROMPT = 60  # characters shown of a prompt


def print_next(commands: Commands) -> None:
    """Print commands, each behind what it is for, so that the lines can be pasted into a shell as they are."""
    if commands:
        print("\nNext:", *(f"# {purpose}\n{command}" for purpose, command in commands), sep="\n", flush=True)


def is_recipe() -> bool:
    """Whether this process was started as a recipe, whose command line can be repeated."""
    return hasattr(sys.modules["__main__"], "DATACLASSES")


def recipe_name() -> str:
    """Name of the recipe that was started."""
    return Path(sys.argv[0]).stem


def recipe_command(recipe: str, **options: Any) -> str:
    """
    A command that starts a recipe as this one was started.

    Args:
        recipe (`str`): its name.
        **options: its options; a list stands for several values, `None` for an option that is not given.
    """
    script = str(Path(sys.argv[0]).with_name(f"{recipe}.py"))
    return shlex.join([*_launcher(), script, *_words(options)])


def same_command(**options: Any) -> str:
    """The command line of this recipe with other values of some options."""
    kept, is_replaced = [], False
    for word in without_secrets(sys.argv[1:]):
        if word.startswith("--"):
            is_replaced = word[2:].partition("=")[0].replace("-", "_") in options
        if not is_replaced:
            kept.append(word)
    return shlex.join([*_launcher(), sys.argv[0], *kept, *_words(options)])


def _words(options: dict[str, Any]) -> list[str]:
    words = []
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def _launcher() -> list[str]:
    """The words in front of the recipe: `python`, or `accelerate launch` with its own options where they are known."""
    if not LAUNCHER_VARIABLES & set(os.environ):
        return ["python"]
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
        return ["accelerate", "launch", *words[words.index("launch") + 1 : words.index(sys.argv[0])]]
    except (OSError, ValueError):  # not on Linux, or started in another way
        return ["accelerate", "launch"]


def folder_beside(folder: str | Path, suffix: str) -> str:
    """A folder next to another one: `runs/slic-rrhf` next to `runs/slic`."""
    folder = Path(folder)
    return str(folder.with_name(f"{folder.name}-{suffix}"))


def generate_command(model: str | Path, prompt: str | Sequence[dict] = "Hello", max_new_tokens: int = 128) -> str:
    """
    A command that lets a model answer.

    Args:
        model (`str` or `Path`): its folder.
        prompt (`str` or `Sequence[dict]`): text or messages; what is long, or has several messages, is replaced.
        max_new_tokens (`int`, defaults to 128): longest answer.
    """
    if isinstance(prompt, str):
        shown: Any = _short(prompt)
    else:
        shown = [{"role": "user", "content": _short(str(prompt[-1].get("content")) if len(prompt) == 1 else "")}]
    code = (
        f"from transformers import pipeline; print(pipeline('text-generation', {str(model)!r})({shown!r}, "
        f"max_new_tokens={max_new_tokens})[0]['generated_text'])"
    )
    return f'python -c "{code}"' if not set('"$`\\!') & set(code) else f"python -c {shlex.quote(code)}"


def _short(text: str) -> str:
    is_plain = 0 < len(text) <= LONGEST_PROMPT and text.isprintable() and not set("'\"$`\\!") & set(text)
    return text if is_plain else "Hello"


def after_rounds(rounds: Any) -> Commands:
    """What to do after rounds of sampling and training, a [`Rounds`]."""
    if not is_recipe():
        return []
    commands: Commands = []
    folder, ranked = rounds.run.folder, rounds.run.path("round-1", "ranked", "ranked.jsonl")
    if ranked.is_file():
        other = "rrhf" if recipe_name() != "rrhf" else "slic"
        command = recipe_command(
            other, model_name_or_path=rounds.model, dataset_name=ranked, output_dir=folder_beside(folder, other)
        )
        commands.append((f"train with {other}.py on the answers sampled in round 1", command))
        if rounds.stopped is None:
            number = rounds.config.num_rounds + 1
            command = same_command(num_rounds=number, resume_from_checkpoint="true")
            commands.append((f"sample, rank and train once more, round {number}", command))
    command = generate_command(rounds.model_to_take, rounds.first_prompt, rounds.sampling.max_new_tokens)
    return [*commands, ("let the model answer", command)]


def after_self_play(game: Any) -> Commands:
    """What to do after the iterations of SPIN, a [`SelfPlay`]."""
    if not is_recipe():
        return []
    folder, commands = game.run.folder, []
    pairs = game.run.path("iteration-0", "generated", "pairs.jsonl")
    if pairs.is_file():
        command = recipe_command(
            "dpo", model_name_or_path=game.model, dataset_name=pairs, output_dir=folder_beside(folder, "dpo")
        )
        commands.append(("train with dpo.py on the pairs of iteration 0", command))
    if game.stopped is None:
        number = game.config.num_iterations
        command = same_command(num_iterations=number + 1, resume_from_checkpoint="true")
        commands.append((f"train once more against the model as it is, iteration {number}", command))
    command = generate_command(game.model_to_take, game.rows[0]["prompt"], game.config.max_new_tokens)
    return [*commands, ("let the model answer", command)]


def after_training(script_args: Any, model: str, output_dir: str, columns: Sequence[str]) -> Commands:
    """
    What to do after one training.

    Args:
        script_args (`ScriptArguments`): with the dataset.
        model (`str`): what was trained.
        output_dir (`str`): where the result is.
        columns (`Sequence[str]`): of the dataset.
    """
    if not is_recipe():
        return []
    split = script_args.dataset_train_split
    data = {
        "dataset_name": script_args.dataset_name,
        "dataset_config": script_args.dataset_config,
        "dataset_train_split": None if split == "train" else split,
    }
    commands: Commands = []
    if recipe_name() == "reward":
        if Path(output_dir, "adapter_config.json").is_file():  # has to be merged before it is a reward
            return []
        command = recipe_command(
            "sample_and_rank", model_name_or_path=model, **data, rewards=output_dir,
            output_dir=folder_beside(output_dir, "ranked"),
        )  # fmt: skip
        return [("sample answers, and rank them with this reward model", command)]
    if data["dataset_name"] and ({"chosen", "rejected"} <= set(columns) or {"completions", "scores"} <= set(columns)):
        other = "dpo" if recipe_name() != "dpo" else "slic"
        command = recipe_command(other, model_name_or_path=model, **data, output_dir=folder_beside(output_dir, other))
        commands.append((f"train with {other}.py on the same data", command))
    command = same_command(
        model_name_or_path=output_dir, output_dir=folder_beside(output_dir, "2"), resume_from_checkpoint=None
    )
    commands.append(("train the result once more on the same data", command))
    prompt = [{"role": "user", "content": "Hello"}] if has_template(output_dir) else "Hello"
    return [*commands, ("let the model answer", generate_command(output_dir, prompt))]


def after_ranking(model: str, output_dir: str | Path) -> Commands:
    """What to do after sampling and ranking: train on what is in the folder."""
    folder, commands = Path(output_dir), []
    for recipe, file in (("rrhf", "ranked.jsonl"), ("best_of_n", "ranked.jsonl"), ("slic", "pairs.jsonl")):
        if is_recipe() and (folder / file).is_file():
            output = folder_beside(folder, recipe)
            command = recipe_command(recipe, model_name_or_path=model, dataset_name=folder / file, output_dir=output)
            commands.append((f"train with {recipe}.py on {file}", command))
    return commands


def has_template(folder: str | Path) -> bool:
    """Whether the tokenizer in a folder has a chat template."""
    config = Path(folder, "tokenizer_config.json")
    return any(Path(folder).glob("*.jinja")) or (config.is_file() and '"chat_template"' in config.read_text())


def after_comparison(config: Any, results: Sequence[Any], recipes: dict[str, str | None]) -> Commands:
    """
    What to do after a comparison.

    Args:
        config ([`ComparisonConfig`]): its settings.
        results (`Sequence`): a [`MethodResult`] for each method and seed.
        recipes (`dict`): name of each method's recipe, `None` for the model that all start from.
    """
    trained = [one for one in results if one.status == "done" and recipes.get(one.method) is not None]
    if not is_recipe() or not trained:
        return []
    best = max(trained, key=lambda one: sum(one.scores["reward"]) / len(one.scores["reward"]))
    folder = Path(config.output_dir, f"seed-{best.seed}", best.method)
    files = sorted(folder.glob("**/model/config.yaml"))
    commands: Commands = []
    if files:
        output = folder_beside(config.output_dir, best.method)
        command = recipe_command(recipes[best.method], config=files[-1], output_dir=output)
        commands.append((f"train {best.label}, the highest reward here, alone, with the settings it had", command))
    seeds = [*config.seeds, max(config.seeds) + 1]
    command = same_command(seeds=seeds, resume_from_checkpoint="true")
    commands.append((f"add seed {seeds[-1]}", command))
    if files:
        merged = files[-1].parents[1] / "merged"
        model = merged if merged.is_dir() else files[-1].parent
        prompt = best.examples[0]["prompt"] if best.examples and not has_template(model) else "Hello"
        prompt = [{"role": "user", "content": prompt}] if has_template(model) else prompt
        commands.append((f"let the model of {best.label} answer", generate_command(model, prompt)))
    return commands
