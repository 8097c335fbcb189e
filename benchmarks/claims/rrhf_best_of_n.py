"""
RRHF as a learner of the best of n: whether its test reward follows the mean of its candidates' maximum, and what a
second round adds.

    python benchmarks/claims/rrhf_best_of_n.py    # about five minutes per seed on two cores

On the playground RRHF is trained from one SFT model on sets of candidates that differ in how many were sampled, how
warm, from which model, and whether the two answers of a preference data set are among them. Updates, prompts in each
and learning rate are the same for all, those of the comparison (`recipes/configs/compare_playground.yaml`), tried with
another seed. The trained models answer prompts that no training has seen, once each.

Departs from the paper in the model (0.6 M parameters that read numbers, for LLaMA-7B on dialogues), in the reward (a
program, the same in training and test, as the paper's reward model is), and in the sampling: the paper's D, DP and
IP-n are made by diverse beam search, ours by sampling at temperature 1, which the paper has as SP.
"""

from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from claim import Claim, Expectation, main
from on_playground import compare, settings

from trl_ext.comparison.methods import METHODS
from trl_ext.comparison.seed_run import SeedRun
from trl_ext.playground.task import preference_rows
from trl_ext.runs.evaluation import perplexity
from trl_ext.runs.rounds import replaced
from trl_ext.runs.stages import rank_stage, sample_stage
from trl_ext.runtime.jsonl import as_jsonl, read_jsonl

# candidates, by name: what the figure calls them, the model they are sampled from and that training starts from, how
# many are sampled, their temperature, whether the pair joins them, and the set they are taken from instead
SETS = {
    "P": {"label": "the pair", "number": 0, "pair": True},
    "D2": {"label": "2 sampled", "number": 2},
    "D4": {"label": "4 sampled", "number": 4},
    "D8": {"label": "8 sampled", "number": 8},
    "D8-cool": {"label": "8 sampled, T = 0.5", "number": 8, "temperature": 0.5},
    "IP-1": {"label": "4 sampled + the pair (IP-1)", "number": 4, "pair": True},
    "IP-2": {"label": "second round (IP-2)", "number": 4, "pair": True, "model": "IP-1"},
    "IP-1-longer": {"label": "IP-1, twice the updates", "model": "IP-1", "candidates": "IP-1"},
}
# in its candidates no other than IP-1, so no point of its own in what is asked of all sets
CONTROL = "IP-1-longer"


def candidates(game: SeedRun, name: str, model: Path, of: dict[str, Any]) -> Path:
    """Scored answers to the training prompts: a file of ranked rows."""
    rounds = game.rounds
    rows = preference_rows(read_jsonl(rounds.prompts), game.seed)
    kept = {
        "prompts.jsonl": as_jsonl(rows),
        "pairs.jsonl": as_jsonl([{**row, "completions": [row["chosen"], row["rejected"]]} for row in rows]),
    }
    folder = rounds.run.keep("rrhf/with-pair", kept)
    if of["number"]:
        temperature = of.get("temperature", rounds.sampling.temperature)
        draw = int("model" in of)  # other random numbers for the second round
        sampling = {"num_candidates": of["number"], "temperature": temperature, "sampling_seed": game.seed + draw}
        rounds.run.stage(
            f"rrhf/{name}/candidates",
            sample_stage,
            inputs={"model": model, "prompts": folder / "prompts.jsonl"},
            config=replaced(rounds.sampling, **sampling),
            mix_in=("chosen", "rejected") if of.get("pair") else (),
            load=rounds.load,
        )
        answers = rounds.run.path("rrhf", name, "candidates", "candidates.jsonl")
    else:
        answers = folder / "pairs.jsonl"
    rounds.run.stage(
        f"rrhf/{name}/ranked",
        rank_stage,
        inputs={"candidates": answers},
        config=rounds.config,
        seed=game.seed,
        min_completions=1,
    )
    return rounds.run.path("rrhf", name, "ranked", "ranked.jsonl")


def run(seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """
    Train on every set, in the order of `settings["sets"]`.

    Returns:
        `dict`: `"rows"`, of each set what its candidates are like and what the model trained on it is like; `"start"`,
        the reward and the perplexity of the SFT model.
    """
    compared = compare(seed, settings)
    game, sft = compared.game, compared.results["sft"]
    rounds, models, files, rows = game.rounds, {}, {}, []
    for name, of in settings["sets"].items():
        model = models[of["model"]] if "model" in of else Path(rounds.model)
        data = files[of["candidates"]] if "candidates" in of else candidates(game, name, model, of)
        updates = game.config.max_steps
        game.train(f"rrhf/{name}", METHODS["rrhf"], model, data, updates=updates, answers=1)
        models[name], files[name] = rounds.run.path("rrhf", name, "model"), data
        figures = rounds.evaluate(f"rrhf/{name}", models[name])
        scores = [row["scores"] for row in read_jsonl(data)]
        rows.append(
            {
                "set": name,
                "updates": updates * (2 if "model" in of else 1),
                "prompts": len(scores),
                "candidates_per_prompt": fmean(map(len, scores)),
                "mean": fmean(score for of_prompt in scores for score in of_prompt),
                "mean_max": fmean(map(max, scores)),
                "test_reward": figures["reward"],
                "accuracy": figures["judge"],
                "perplexity": figures["perplexity"],
                "kl": figures["kl"],
            }
        )
    nlls, lengths = sft.measured["nll"], sft.measured["lengths"]
    start = perplexity([(-nll, length) for nll, length in zip(nlls, lengths, strict=True)])
    return {"rows": rows, "start": {"reward": fmean(sft.scores["reward"]), "perplexity": start}}


# Measures


def by_set(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {row["set"]: row for row in result["rows"]}


def columns(result: dict[str, Any], *names: str) -> list[list[float]]:
    """Figures of all sets with candidates of their own."""
    return [[row[name] for row in result["rows"] if row["set"] != CONTROL] for name in names]


def rank_correlation(result: dict[str, Any]) -> float:
    """Spearman's, of test reward and mean of the maximum."""
    from scipy.stats import spearmanr

    return float(spearmanr(*columns(result, "mean_max", "test_reward")).statistic)


def slope(result: dict[str, Any]) -> float:
    """Of the least-squares line of the test reward on the mean of the maximum."""
    return float(np.polyfit(*columns(result, "mean_max", "test_reward"), 1)[0])


def distance(result: dict[str, Any], candidate: str = "mean_max") -> float:
    """Of the test reward from a figure of the candidates, mean over the sets."""
    return fmean(abs(reward - of) for of, reward in zip(*columns(result, candidate, "test_reward"), strict=True))


def more(better: str, worse: str, figure: str = "test_reward"):
    """Measures by how much a figure is higher after training on one set than on another."""
    return lambda result: by_set(result)[better][figure] - by_set(result)[worse][figure]


def draw(results: dict[int, dict[str, Any]], path: Path) -> None:
    """Test reward over the mean of the maximum: a point for each seed, and a label at their mean."""
    import matplotlib.pyplot as plt

    colours = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#000000"]
    markers = ["s", "v", "^", "o", "D", "P", "*", "X"]
    figure, axis = plt.subplots(figsize=(7.5, 7.5), layout="constrained")
    found = [by_set(result) for result in results.values()]
    for (name, of), colour, marker in zip(SETS.items(), colours, markers, strict=True):
        x = [rows[name]["mean_max"] for rows in found]
        y = [rows[name]["test_reward"] for rows in found]
        hollow = {"facecolors": "none"} if name == CONTROL else {}
        axis.scatter(x, y, s=30, marker=marker, edgecolors=colour, alpha=0.7, **(hollow or {"color": colour}))
        axis.scatter(
            fmean(x), fmean(y), s=110, marker=marker, edgecolors=colour, **(hollow or {"color": colour}),
            label=of["label"],
        )  # fmt: skip
    every = [row[key] for rows in found for row in rows.values() for key in ("mean_max", "test_reward")]
    start = fmean(result["start"]["reward"] for result in results.values())
    low, high = min(*every, start) - 0.02, max(every) + 0.02
    axis.plot([low, high], [low, high], color="grey", linestyle=":", label="as good as the best candidate")
    axis.axhline(start, color="grey", linewidth=1, label="SFT model")
    axis.set(
        xlim=(low, high), ylim=(low, high), aspect="equal",
        xlabel="mean reward of the best candidate of each prompt",
        ylabel="mean reward on 1000 held-out prompts",
        title=f"RRHF on different candidates, {len(results)} seeds (small) and their mean (large)",
    )  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


CLAIM = Claim(
    name="rrhf_best_of_n",
    title="RRHF learns the best of its candidates",
    source="RRHF (https://huggingface.co/papers/2304.05302), sections 3 and 4, tables 2, 6 and 7",
    paper=(
        "The test reward follows the mean over the prompts of the candidates' highest reward: RRHF is a best-of-n "
        "learner. IP-2, with candidates of the model trained on DP's, has -0.96 after IP-1's -1.02 (and perplexity "
        "14.31 after 14.75), with a mean maximum of -0.77 after -0.95. DP, 4 answers of the first model and the "
        "data set's pair, has -1.03, without the pair -1.08, the pair alone -1.31; the model they start from -1.18."
    ),
    settings={**settings(), "sets": SETS},
    seeds=(1, 2, 3),
    run=run,
    draw=draw,
    expectations=[
        Expectation(
            "Test reward follows the mean maximum. Rank correlation over seven sets of candidates",
            rank_correlation,
            above=0.8,
        ),
        Expectation("Slope of test reward on mean maximum", slope, above=0.5, below=1.5),
        Expectation("They are close. Mean distance of test reward from mean maximum", distance, below=0.1),
        Expectation(
            "The best of n, and not the average candidate. Distance from the mean candidate less that from the "
            "maximum",
            lambda result: distance(result, "mean") - distance(result),
            above=0,
        ),
        Expectation("A second round helps. Test reward, IP-2 less IP-1", more("IP-2", "IP-1"), above=0),
        Expectation(
            "Not in the paper: its new candidates help, not its updates. IP-2 less IP-1 with twice the updates",
            more("IP-2", CONTROL),
            above=0,
        ),
        Expectation(
            "Perplexity under the SFT model stays. IP-2 by IP-1",
            lambda result: by_set(result)["IP-2"]["perplexity"] / by_set(result)["IP-1"]["perplexity"],
            below=1.1,
        ),
        Expectation("The pair helps. 4 sampled and the pair less 4 sampled", more("IP-1", "D4"), above=0),
        Expectation("The pair alone is worse. 4 sampled less the pair", more("D4", "P"), above=0),
        Expectation("Not in the paper: more candidates help. 8 sampled less 2", more("D8", "D2"), above=0),
    ],
    known_beforehand=(
        "In part: the README has the two rounds of `recipes/rrhf.py` with other settings on seeds 42, 1, 2 and 3, in "
        "which the second added 0.12 to 0.13 of reward. That a second round helps was no prediction; why it does, and "
        "everything about other candidates, was not known."
    ),
    remarks=(
        "In every seed the seven sets are in the same order by their maximum and by the reward of the model trained "
        "on them, from 0.67 (2 sampled) to 0.86 (IP-2); the SFT model has 0.60. Eight cool samples and two warm ones "
        "have nearly the same average candidate (0.60), and it is their maximum that the models follow: 0.71 and "
        "0.67, for 0.70 and 0.67.\n\n"
        "The higher the maximum, the more is left: nothing at 2 sampled, 0.03 at IP-1, 0.05 at IP-2. So the slope is "
        "0.78 and not 1. In the paper, too, IP-2 raises the maximum by 0.18 and the reward by 0.06.\n\n"
        "The second round's gain of 0.10 comes from its candidates: the same number of updates on IP-1's old ones "
        "gives 0.01. Perplexity rises by 8 % in it, with an interval across the bound of 10 %; in the first "
        "round it had risen by 17 % over the SFT model's 1.27, and in the paper DP's is 3 % above its start.\n\n"
        "Equal answers to a prompt are left out, so the average candidate is one of different answers: 1.8 of 2, 3.1 "
        "of 4, 4.6 of 8."
    ),
    decided_by=(
        "`rank_weight` 10 and a learning rate of 1e-3 (`compare_playground.yaml`), chosen with seed 42; the paper's "
        "weight is 1. Perplexity is open at this step size."
    ),
)

if __name__ == "__main__":
    main(CLAIM)
