"""
SLiC-HF against the SFT model it starts from, against going on with SFT, and its two kinds of data against each other.

    python benchmarks/claims/slic_beats_sft.py    # about five minutes a seed on two cores

On the playground (`trl_ext/playground/`): a model of 0.6 M parameters reads numbers, and is to be friendlier about
it. All methods train 50 updates of 32 prompts from the same SFT model, with the values of `compare_playground.yaml`,
which were chosen by the reward with seed 42. What is trained on:

- SFT on positives: the chosen answers of pairs that no model sampled. Both answers of a pair have the right digits;
  their tones are drawn like those of the SFT's examples, and the friendlier one is chosen.
- best-of-n: the best of 8 answers of the SFT model, by the reward.
- SLiC-HF direct: the same pairs. It never sees wrong digits.
- SLiC-HF sample-rank: the same 8 answers, all pairs of unequal reward. Digits may be wrong.

y_ref of direct is one of the SFT's examples, that of sample-rank the best of the 8 answers: the paper's table has both
for sample-rank, of which the figures beside ours are those with the best answer.

Otherwise than in the paper, the reward that decides a comparison is the playground's own, by which best-of-n and
sample-rank are trained too, and no ranker learned from the pairs. It is exact. Two answers may be equally good, which
the paper's ranker never says: a tie is half a win, and the shares of ties stand in the .csv. Answers are sampled at
temperature 1, not searched for with beams.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import on_playground
from claim import Claim, Expectation, main
from on_playground import answers_of, broken, compared

from trl_ext.playground.task import Playground, friendly_number_reward
from trl_ext.runtime.jsonl import read_jsonl

POSITIVES = "sft_on_positives"
# method -> its name in the figure, and the paper's share of wins over the human reference and words, table 1
PAPER = {
    "sft": ("SFT", 0.4496, 23.57),
    POSITIVES: ("SFT on positives", 0.5165, 31.22),
    "best_of_n": ("best-of-8 SFT", 0.6543, 28.26),
    "slic_direct": ("SLiC-HF direct", 0.8292, 41.03),
    "slic_sample_rank": ("SLiC-HF sample-rank", 0.8551, 37.50),
}


def reference_rewards(seed: int, prompts: Sequence[str]) -> list[float]:
    """Rewards of the task's own answers to the held-out prompts: right digits, in a tone like the examples'."""
    rows = Playground(seed=seed).rows("held_out", reference=True)
    if [row["prompt"] for row in rows] != list(prompts):
        raise RuntimeError(f"Seed {seed}: the held-out prompts are not those of the playground.")
    return friendly_number_reward([row["reference"] for row in rows], [row["answer"] for row in rows])


def run(seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train, and compare the answers to the held-out prompts."""
    further = {POSITIVES: {"method": "best_of_n", "label": PAPER[POSITIVES][0]}}  # with the options of best-of-n
    found = on_playground.compare(seed, settings, on_pairs=further)
    references = reference_rewards(seed, [row["prompt"] for row in read_jsonl(found.game.rounds.watched)])
    rows = []
    for method in PAPER:
        result = found.results[method]
        rewards = result.scores["reward"]
        row = {"method": method, "reward": fmean(rewards), "accuracy": fmean(result.scores["judge"])}
        row["broken"] = broken(answers_of(found.game, method))
        for name, others in (("reference", references), ("sft", found.results["sft"].scores["reward"])):
            row |= {f"{key}_{name}": value for key, value in compared(rewards, others).items()}
        row |= {
            name: fmean(result.measured[key]) for name, key in (("tokens", "lengths"), ("kl", "kl"), ("nll", "nll"))
        }
        rows.append({key: value if key == "method" else float(f"{value:.6g}") for key, value in row.items()})
    return {"rows": rows}


def figure_of(result: dict[str, Any], method: str, name: str) -> float:
    """A figure of a method in a seed's result."""
    return next(row[name] for row in result["rows"] if row["method"] == method)


def value(method: str, name: str = "win_rate_reference"):
    """Measures a figure of a method."""
    return lambda result: figure_of(result, method, name)


def difference(method: str, other: str, name: str = "win_rate_reference"):
    """Measures by how much a figure is larger for the first method."""
    return lambda result: figure_of(result, method, name) - figure_of(result, other, name)


def worse_slic_over_best_of_n(result: dict[str, Any]) -> float:
    """Wins over the reference, of the SLiC-HF that has fewer of them, minus those of best-of-n."""
    return min(difference(method, "best_of_n")(result) for method in ("slic_direct", "slic_sample_rank"))


def draw(results: dict[int, dict[str, Any]], path: Path) -> None:
    """A row for each method; points are seeds, bars their means, diamonds what the paper has."""
    import matplotlib.pyplot as plt

    panels = [
        ("win_rate_reference", "wins over the task's own answer,\na tie is half a win"),
        ("win_rate_sft", "wins over the SFT model's answer,\na tie is half a win"),
        ("broken", 'answers with a broken word,\nsuch as "glay", share'),
        ("tokens", "length of an answer,\ntokens"),
    ]
    places = {method: len(PAPER) - place for place, method in enumerate(PAPER)}
    colours = {method: "#D55E00" if method.startswith("slic") else "#0072B2" for method in PAPER}
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 4), sharey=True, layout="constrained")
    for axis, (name, title) in zip(axes, panels, strict=True):
        values = {method: [figure_of(result, method, name) for result in results.values()] for method in PAPER}
        if name == "win_rate_sft":
            del values["sft"]
        for method, of_seeds in values.items():
            colour, place = colours[method], places[method]
            axis.plot([fmean(of_seeds)] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=3)
            axis.plot(of_seeds, [place] * len(of_seeds), "o", color=colour, markersize=5, alpha=0.6)
        if name == "win_rate_reference":
            paper = [share for _, share, _ in PAPER.values()]
            axis.plot(paper, list(places.values()), "D", color="black", markersize=8, fillstyle="none")
        if name.startswith("win_rate"):
            axis.axvline(0.8, color="black", linestyle="--", linewidth=1)
            axis.text(0.81, places["sft"], "80 %", ha="left", va="center", fontsize=9)
            axis.axvline(0.5, color="black", linestyle=":", linewidth=1)
            axis.set_xlim(0.38, 1)
            axis.set_xticks([0.4, 0.6, 0.8])
        axis.set_xlabel(title)
        axis.set_yticks(list(places.values()), [label for label, _, _ in PAPER.values()])
        axis.grid(axis="x", alpha=0.3)
    marks = [
        plt.Line2D([], [], color="0.3", linestyle="", marker="o", alpha=0.6, label="a seed"),
        plt.Line2D([], [], color="0.3", linewidth=3, label="mean of the seeds"),
        plt.Line2D([], [], color="black", linestyle="", marker="D", fillstyle="none", label="the paper, on TL;DR"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


CLAIM = Claim(
    name="slic_beats_sft",
    title="SLiC-HF beats SFT in over 80 % of comparisons, and direct is about as good as sample-rank",
    source="SLiC-HF (https://huggingface.co/papers/2305.10425), table 1",
    paper=(
        "Wins of a summary over the human reference, by the ranker: SFT 44.96 %, SFT continued on the preferred "
        "summaries 51.65 %, SFT continued on the best of 8 samples 63.24 % (by the reward model) and 65.43 % (by the "
        "ranker), SLiC-HF direct 82.92 %, SLiC-HF sample-rank 86.21 %; 82.42 % with the reward model. Words: 23.57, "
        "31.22, 27.69 and 28.26, 41.03, 37.96. Length grows, and most with direct, where it does not settle."
    ),
    settings=on_playground.settings(best_of_n={}, slic_direct={}, slic_sample_rank={}),
    seeds=(1, 2, 3),
    run=run,
    draw=draw,
    known_beforehand=(
        "In part. The README has `recipes/slic.py` on the same task, with a regulariser of 3, a learning rate of 1e-3 "
        "and a tournament's pairs; it had 94.5 and 96.9 % of decided wins over SFT then (seeds 1 and 42). What is "
        "tried here is `compare_playground.yaml`, whose regulariser is 0.1; its values were chosen by the mean "
        "reward with seed 42. A comparison with seed 1 existed, and was not looked at for the bounds."
    ),
    remarks=(
        "With these values SLiC-HF's win rate is 60 to 71 % over the SFT model's answers and 59 to 70 % over the "
        "task's own, which is what the paper's figures are of. Best-of-n has more of both (79 to 82 and 76 to 78 "
        "%). In 26 to 33 % of SLiC-HF's answers (SFT: 4 %) the word is broken ('glay'), which counts as the "
        "unfriendliest; mean reward shows that a little (0.73 and 0.71, best-of-n 0.76), accuracy hardly. So this "
        "speaks of a weak regulariser and a large step: with a weight of 1 (slic_regulariser, made afterwards) 10 "
        "to 11 % of the words are broken and the win rate over SFT's answers is 77 to 81 %, at a mean reward of "
        "0.76.\n\n"
        "SFT on positives gains 2.6 times what it does in the paper. All models answer with the same random "
        "numbers, so many comparisons with the SFT model's answers are tied, which pulls the win rate towards one "
        "half: those with the task's own answers say more. Friendlier words are longer, so length says little "
        "here. The share of broken words was added to rows and figure after the first seed; no bound uses it.\n\n"
        "Ties were left out when the expectations were written, and are half a win now, as everywhere in this "
        "project; the bounds are the same."
    ),
    decided_by=(
        "The weak regulariser (0.1, `compare_playground.yaml`) together with the learning rate of 3e-4. Both were "
        "chosen by the mean reward with seed 42, which does not notice a broken word much. With a weight of 1 words "
        "stay whole, see slic_regulariser."
    ),
    expectations=[
        Expectation(
            "SLiC-HF sample-rank beats the SFT model: its wins over the SFT model's answers",
            value("slic_sample_rank", "win_rate_sft"),
            above=0.8,
        ),
        Expectation(
            "SLiC-HF direct beats the SFT model: its wins over the SFT model's answers",
            value("slic_direct", "win_rate_sft"),
            above=0.8,
        ),
        Expectation(
            "SLiC-HF sample-rank: wins over the task's own answers (paper: 0.862)",
            value("slic_sample_rank"),
            above=0.8,
        ),
        Expectation(
            "SLiC-HF direct: wins over the task's own answers (paper: 0.829)", value("slic_direct"), above=0.8
        ),
        Expectation(
            "Direct is about as good: wins of sample-rank over the task's own answers, minus those of direct (paper: "
            "0.033)",
            difference("slic_sample_rank", "slic_direct"),
            above=-0.05,
            below=0.05,
        ),
        Expectation("SFT: wins over the task's own answers (paper: 0.450)", value("sft"), below=0.5),
        Expectation(
            "SFT on positives helps: its wins over the task's own answers, minus those of SFT (paper: 0.067)",
            difference(POSITIVES, "sft"),
            above=0,
        ),
        Expectation(
            "Best-of-n helps more: its wins over the task's own answers, minus those of SFT on positives (paper: "
            "0.138)",
            difference("best_of_n", POSITIVES),
            above=0,
        ),
        Expectation(
            "SLiC-HF helps much more: wins over the task's own answers of the lesser one, minus those of best-of-n "
            "(paper: 0.175)",
            worse_slic_over_best_of_n,
            above=0.1,
        ),
        Expectation(
            "Length grows: tokens of sample-rank minus those of SFT (paper: 14.4 words)",
            difference("slic_sample_rank", "sft", "tokens"),
            above=0,
        ),
        Expectation(
            "It grows most with direct: tokens of direct minus those of sample-rank (paper: 3.1 words)",
            difference("slic_direct", "slic_sample_rank", "tokens"),
            above=0,
        ),
    ],
)

if __name__ == "__main__":
    main(CLAIM)
