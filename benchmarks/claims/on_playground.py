"""
What the claims that are tried on the playground share: the models and data of `recipes/compare.py`, with its settings,
and measures of answers.

All of a seed's methods train from the same SFT model; the scored answers of that model are sampled once. Everything is
kept in `runs/claims/playground/seed-N/`, and what is finished is not made again.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from claim import REPOSITORY, RUNS

sys.path.insert(0, str(REPOSITORY))

from trl_ext.cli.options import recipe_dataclasses
from trl_ext.cli.parse import given_options
from trl_ext.comparison.arguments import parse_comparison_args
from trl_ext.comparison.results import MethodResult
from trl_ext.comparison.seed_run import SeedRun
from trl_ext.playground.task import TONES
from trl_ext.runs.intervals import wins

RECIPES = REPOSITORY / "recipes"
PLAYGROUND = RECIPES / "configs" / "compare_playground.yaml"
FOLDER = RUNS / "playground"
# whose values in the playground's config count in every claim, tried or not; later ones count where they are tried
FIRST_METHODS = {
    "all", "best_of_n", "slic_direct", "slic_sample_rank", "rrhf", "rrhf_two_rounds", "spin", "click", "dpo", "ipo",
    "orpo", "kto",
}  # fmt: skip


def settings(**methods: dict[str, Any]) -> dict[str, Any]:
    """All that determines a comparison's result: the playground's values, and the options of the methods tried."""
    values = yaml.safe_load(PLAYGROUND.read_text(encoding="utf-8"))
    values["num_checkpoints"] = 0
    del values["output_dir"], values["seeds"]
    used = {of.get("method", name) for name, of in methods.items()}
    used |= {"reward_model"} if "rl" in used else set()
    values["settings"] = {name: of for name, of in values["settings"].items() if name in used | FIRST_METHODS}
    return {"playground": values, "methods": methods}


@dataclass
class Compared:
    """
    Attributes:
        results (`dict[str, MethodResult]`): by method; `"sft"` is the model that all start from. `scores["reward"]`
            and `scores["judge"]` (1 for the right digits) have a value for each of the same held-out prompts, as do
            `lengths`, `kl` and `nll` of `measured`; `curve` has the log-probabilities over training.
        game ([`SeedRun`]): for its data: `game.rounds.model`, the SFT model; `game.rounds.prompts`;
            `game.rounds.watched`, the held-out prompts; `game.rounds.make_candidates("candidates",
            game.rounds.model)`, the scored answers.
    """

    results: dict[str, MethodResult]
    game: SeedRun


def arguments_of(seed: int, methods: dict[str, dict[str, Any]], folder: Path) -> list[str]:
    """The command line of `recipes/compare.py` that compares methods with the options given, on the playground."""
    arguments = ["--output_dir", str(folder), "--seeds", str(seed), "--methods", "sft", *methods]
    arguments += ["--settings", json.dumps(methods), "--num_checkpoints", "0", "--resume_from_checkpoint", "true"]
    return [*arguments, "--disable_tqdm", "true"]


def compare(
    seed: int, of_claim: dict[str, Any], *, on_pairs: dict[str, dict[str, Any]] | None = None, folder: Path = FOLDER
) -> Compared:
    """
    Train and evaluate methods, those that are not finished.

    Args:
        seed (`int`): of data, training and sampling.
        of_claim (`dict`): [`settings`] of the claim. Its `methods` are named and set like the `settings` of
            `recipes/compare.py`: a method's own name, or a new one with `method` and `label`. A name means the same
            options in every claim, as its model is kept under it.
        on_pairs (`dict`, *optional*): further methods, named and set likewise, that are trained on the pairs that no
            model sampled.

    Raises:
        ValueError: the playground's values are others by now than those of the claim.
        RuntimeError: a method failed.
    """
    if of_claim["playground"] != settings(**of_claim["methods"])["playground"]:
        raise ValueError(f"The claim's values are not those of {PLAYGROUND.name}. Run it without changed settings.")
    arguments = arguments_of(seed, {**of_claim["methods"], **(on_pairs or {})}, folder)
    parsed = parse_comparison_args(recipe_dataclasses(RECIPES / "compare.py"), PLAYGROUND, arguments)
    game = SeedRun(parsed, RECIPES, seed, given_options(arguments, PLAYGROUND))
    for name in on_pairs or ():
        game.methods[name] = dataclasses.replace(game.methods[name], data="pairs")
    results = {}
    for result in game.play():
        if result.status != "done":
            raise RuntimeError(f"{result.label}, seed {seed}: {result.error}")
        results[result.method] = result
    return Compared(results, game)


# Measures


def compared(scores: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """
    Prompt by prompt, how often the first answer has the higher score.

    Returns:
        `dict`: shares of all prompts `"won"`, `"tied"` and `"lost"`, and the `"win_rate"`, where a tie is half a win.
    """
    found = wins(scores, others)
    shares = {name: getattr(found, name) / found.num_pairs for name in ("won", "tied", "lost")}
    return {**shares, "win_rate": found.rate}


def broken(answers: Sequence[str]) -> float:
    """Share of answers whose word is none of the task's, such as "glay": the reward takes it for the unfriendliest."""
    return sum(answer.partition(" ")[2] not in TONES for answer in answers) / len(answers)


def answers_of(game: SeedRun, method: str) -> list[str]:
    """The answers of a method to the held-out prompts."""
    return [one["answer"] for one in game.rounds.answers("start" if method == "sft" else method)]
