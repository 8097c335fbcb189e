"""
What every recipe reaches on the playground: its shipped config, run as without options.

    python benchmarks/playground.py                                    # what has no row yet
    python benchmarks/playground.py --recipes slic rrhf --seeds 1 2 3  # of these

A recipe with a seed is finished when `benchmarks/results/playground.csv` has its rows, one for each model, and is not
run again; delete the rows to measure anew. The SFT model that all recipes start from is trained once for each seed.
Runs are kept in `runs/playground/`. Seed 42 is the seed with which the shipped values were chosen: its rows show what
the configs say, and no claim rests on them. `tests/docs/test_playground_figures.py` holds the rows of the other seeds
to BOUNDS, and `tests/runs/test_playground_runs.py` fresh runs.
"""

import argparse
import csv
import fcntl
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import REPOSITORY, RESULTS, append, circumstances

from trl_ext.methods import METHODS

FILE = RESULTS / "playground.csv"
RUNS = REPOSITORY / "runs" / "playground"
TUNED_WITH = 42
SEEDS = (1, 2, 3, TUNED_WITH)
LABELS = {method.recipe: method.label for method in METHODS.values()}
RECIPES = tuple(LABELS)
# what training logs about the order of answers: the share of pairs that are ordered rightly
ORDERED = ("rewards/accuracies", "accuracy")

# Of each recipe's last model, for any seed that tuned nothing: figure -> (least, most), None where there is no bound.
# Chosen from the rows of seeds 1, 2 and 3, below what the least of them reached by several times their spread, as
# another kernel or thread count gives another run. `ordered_rise` is `ordered_last` less `ordered_first`.
BOUNDS: dict[str, dict[str, tuple[float | None, float | None]]] = {
    "slic": {
        "gain": (0.16, None),
        "decided": (0.9, None),
        "win_rate": (0.8, None),
        "ordered_last": (0.8, None),
        "ordered_rise": (0.15, None),
        "accuracy": (0.94, None),
        "perplexity": (None, 1.6),
    },
    "rrhf": {
        "gain": (0.22, None),
        "decided": (0.93, None),
        "win_rate": (0.85, None),
        "ordered_last": (0.9, None),
        "ordered_rise": (0.12, None),
        "accuracy": (0.94, None),
        "perplexity": (None, 1.7),
    },
    "train_click": {
        "reward": (0.98, None),
        "gain": (0.45, None),
        "decided": (0.98, None),
        "ordered_last": (0.95, None),
        "ordered_rise": (0.15, None),
        "accuracy": (0.91, None),
        "perplexity": (None, 1.6),
    },
    "dpo": {
        "gain": (0.07, None),
        "decided": (0.78, None),
        "win_rate": (0.68, None),
        "ordered_last": (0.9, None),
        "ordered_rise": (0.05, None),
        "accuracy": (0.85, None),
        "perplexity": (None, 1.8),
    },
    "ipo": {
        "gain": (0.02, None),
        "ordered_last": (0.85, None),
        "ordered_rise": (0.04, None),
        "accuracy": (0.6, None),
        "perplexity": (None, 2.6),
    },
    "orpo": {
        "gain": (0.0, None),
        "ordered_last": (0.97, None),
        "ordered_rise": (0.08, None),
        "accuracy": (0.7, None),
        "perplexity": (None, 3.6),
    },
    "kto": {
        "gain": (0.11, None),
        "decided": (0.8, None),
        "win_rate": (0.7, None),
        "accuracy": (0.89, None),
        "perplexity": (None, 1.8),
    },
    "best_of_n": {
        "gain": (0.11, None),
        "decided": (0.85, None),
        "win_rate": (0.72, None),
        "accuracy": (0.87, None),
        "perplexity": (None, 1.6),
    },
    "reward": {
        "accuracy": (0.92, None),
        "ordered_last": (0.9, None),
        "ordered_rise": (0.0, None),
    },
}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """
    The figures of a finished run, a row for each model.

    Returns:
        `list[dict]`: `model`; `reward`, of the recipe's own reward: for `train_click` the share of polite answers,
            for `spin` that of right digits; `gain` over the SFT model on the same prompts with its 95 % interval from
            `gain_low` to `gain_high`; prompts `won`, `tied` and `lost` against it, `win_rate` with a tie as half a
            win, and `decided`, wins among prompts without a tie; `accuracy`, the share of right digits, for `reward`
            of held-out pairs ordered rightly; `perplexity` under the SFT model; `kl` to it in nats per answer;
            `ordered_first` and `ordered_last`, the share of training pairs ordered rightly at the first and the last
            log. What a recipe has not is None.
    """
    judged = folder / "watched" / "judged" / "manifest.json"
    if judged.is_file():  # a reward model answers nothing
        return [_row("reward", accuracy=_figures(judged)["accuracy"], **_ordered(folder / "reward" / "model"))]
    report = next(file for file in (folder / "rounds.json", folder / "spin.json") if file.is_file())
    models = json.loads(report.read_text())["models"]
    found, first = [], _rewards(folder / "start")
    for name, figures in models.items():
        accuracy = figures["reward"] if report.name == "spin.json" else figures.get("judge")
        row = {"reward": figures["reward"], "accuracy": accuracy}
        row |= {key: figures.get(key) for key in ("perplexity", "kl")}
        if name != "start":
            row |= _over(_rewards(folder / name), first)
        found.append(_row(name, **row, **_ordered(folder / name / "model")))
    return found


FIGURES = (
    "reward", "gain", "gain_low", "gain_high", "won", "tied", "lost", "win_rate", "decided", "accuracy", "perplexity",
    "kl", "ordered_first", "ordered_last",
)  # fmt: skip


def _row(model: str, **figures: Any) -> dict[str, Any]:
    values = {name: figures.get(name) for name in FIGURES}
    return {"model": model} | {key: round(v, 5) if isinstance(v, float) else v for key, v in values.items()}


def _figures(manifest: Path) -> dict[str, Any]:
    return json.loads(manifest.read_text())["figures"]


def _rewards(folder: Path) -> dict[int, float]:
    answers = (folder / "evaluation" / "answers.jsonl").read_text().splitlines()
    return {one["number"]: one["reward"] for one in map(json.loads, answers)}


def _over(rewards: dict[int, float], first: dict[int, float]) -> dict[str, Any]:
    """Gain and wins over the first model."""
    from trl_ext.runs.intervals import paired_difference, wins

    both = sorted(rewards.keys() & first.keys())
    scores, others = [rewards[number] for number in both], [first[number] for number in both]
    gain, found = paired_difference(scores, others), wins(scores, others)
    return {
        "gain": gain.value,
        "gain_low": gain.low,
        "gain_high": gain.high,
        "won": found.won,
        "tied": found.tied,
        "lost": found.lost,
        "win_rate": found.rate,
        "decided": found.won / max(found.won + found.lost, 1),
    }


def _ordered(folder: Path) -> dict[str, float]:
    """Share of pairs ordered rightly at the first and the last log of a training, where it was logged."""
    state = folder / "trainer_state.json"
    history = json.loads(state.read_text())["log_history"] if state.is_file() else []
    logged = [entry[name] for entry in history for name in ORDERED if name in entry]
    return {"ordered_first": logged[0], "ordered_last": logged[-1]} if logged else {}


def last_model(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of a run's last model, controls aside, with `ordered_rise` over all trainings of the run."""
    trained = [row for row in rows if row["model"] != "start" and not row["model"].startswith(("control", "best-of"))]
    first, last = trained[0]["ordered_first"], trained[-1]["ordered_last"]
    return {**trained[-1], "ordered_rise": None if first is None or last is None else last - first}


def out_of_bounds(recipe: str, rows: list[dict[str, Any]]) -> list[str]:
    """What of a run's figures is outside BOUNDS, in words."""
    last = last_model(rows)
    return [
        f"{recipe}: {figure} must be from {least} to {most}, got {last[figure]}"
        for figure, (least, most) in BOUNDS.get(recipe, {}).items()
        if last[figure] is None
        or (least is not None and last[figure] < least)
        or (most is not None and last[figure] > most)
    ]


def read_rows() -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Committed rows by recipe and seed; figures are numbers, or None."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    if FILE.is_file():
        with FILE.open(newline="") as file:
            for row in csv.DictReader(file):
                row |= {name: float(row[name]) if row[name] else None for name in (*FIGURES, "minutes")}
                found.setdefault((row["recipe"], int(row["seed"])), []).append(row)
    return found


def table(rows: dict[tuple[str, int], list[dict[str, Any]]]) -> str:
    """The table of `docs/playground.md`: from the least to the most over the seeds that tuned nothing."""

    def span(of_seeds: list[dict[str, Any]], figure: str, form: str) -> str:
        values = [row[figure] for row in of_seeds]
        if None in values:
            return ""
        least, most = format(min(values), form), format(max(values), form)
        return least if least == most else f"{least} to {most}"

    lines = [
        "| recipe | model | reward | gain over SFT | wins over SFT | of decided | accuracy | perplexity | KL "
        "| pairs in order, first log | last log |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    columns = {
        "reward": ".3f", "gain": "+.3f", "win_rate": ".1%", "decided": ".1%", "accuracy": ".1%", "perplexity": ".2f",
        "kl": ".2f", "ordered_first": ".1%", "ordered_last": ".1%",
    }  # fmt: skip
    for recipe in RECIPES:
        runs = [of_seed for (name, seed), of_seed in sorted(rows.items()) if name == recipe and seed != TUNED_WITH]
        for model in [row["model"] for row in runs[0]] if runs else ():
            if model == "start" and recipe not in ("slic", "spin", "train_click"):
                continue  # the same as the first one's
            of_seeds = [row for of_seed in runs for row in of_seed if row["model"] == model]
            name, _, number = model.rpartition("-") if model[-1].isdigit() else (model, "", "")
            names = {"start": "SFT", "control": "SFT going on", "best-of-n": "best-of-n SFT"}
            name = names.get(name, LABELS[recipe] + (f", {name}" if number else ""))
            cells = [span(of_seeds, figure, form) for figure, form in columns.items()]
            lines.append(f"| `{recipe}.py` | {f'{name} {number}'.strip()} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# Running


def run_recipe(recipe: str, seed: int, folder: Path) -> None:
    """Run a recipe with its shipped config in this process, but for the SFT model, which is shared."""
    from playground import shared_sft  # stages find it under this name

    from trl_ext.runs.run import Run

    stage = Run.stage

    def sharing(run, name, function, **arguments):
        if name != "sft":
            return stage(run, name, function, **arguments)
        return stage(run, name, shared_sft, **arguments)

    Run.stage = sharing
    script = REPOSITORY / "recipes" / f"{recipe}.py"
    sys.argv = [str(script), "--output_dir", str(folder), "--seed", str(seed), "--disable_tqdm", "true"]
    runpy.run_path(str(script), run_name="__main__")


def shared_sft(folder: Path, *, playground: Any) -> dict[str, float]:
    """The playground's SFT model, trained where it was not; a stage."""
    from trl_ext.playground.stages import sft_stage

    name = f"sft-{playground.seed}" + ("" if playground.with_tone else "-without-tone")
    kept = RUNS / name
    RUNS.mkdir(parents=True, exist_ok=True)
    with (RUNS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.is_dir():
            sft_stage(folder, playground=playground)
            partial = kept.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(folder, partial)
            partial.rename(kept)
        else:
            shutil.copytree(kept, folder, dirs_exist_ok=True)
    return {}


def measure(recipe: str, seed: int) -> list[dict[str, Any]]:
    """Run a recipe with a seed in a process of its own; returns its rows."""
    folder = RUNS / f"{recipe}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was cut off
    with (RUNS / f"{recipe}-{seed}.log").open("w") as log:
        words = [sys.executable, __file__, "--only", recipe, "--seeds", str(seed)]
        done = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, cwd=REPOSITORY)
    if done.returncode:
        raise RuntimeError(f"{recipe}, seed {seed}, failed. Read {log.name}.")
    made = list(_manifests(folder))
    minutes = round(sum(manifest["seconds"] for manifest in made) / 60, 2)
    made_by = circumstances()
    del made_by["threads"]  # of this process, not of the recipe's
    made_by["command"] = f"accelerate launch recipes/{recipe}.py --seed {seed}"
    return [{"recipe": recipe, "seed": seed, **row, "minutes": minutes, **made_by} for row in rows_of(folder)]


def _manifests(folder: Path) -> Iterator[dict[str, Any]]:
    for file in folder.rglob("manifest.json"):
        manifest = json.loads(file.read_text())
        if "seconds" in manifest:
            yield manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="print the table of `docs/playground.md`, run nothing")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # the recipe that this process runs
    options = parser.parse_args()
    if options.table:
        print(table(read_rows()), end="")
        return
    RUNS.mkdir(parents=True, exist_ok=True)
    if options.only:
        run_recipe(options.only, options.seeds[0], RUNS / f"{options.only}-{options.seeds[0]}")
        return
    finished = read_rows()
    cells = [(recipe, seed) for recipe in options.recipes for seed in options.seeds if (recipe, seed) not in finished]
    failed = []

    def one(cell: tuple[str, int]) -> None:
        try:
            rows = measure(*cell)
        except RuntimeError as error:
            failed.append(str(error))
            print(error, flush=True)
            return
        append(FILE, rows)  # between two calls of Python's own nothing else is written
        problems = out_of_bounds(cell[0], rows)
        print(
            *cell, {name: value for name, value in last_model(rows).items() if name in FIGURES}, *problems, flush=True
        )

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, cells))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
