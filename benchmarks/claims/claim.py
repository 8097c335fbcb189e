"""
A paper's claim, tried small. What is expected stands in the script before it is run; what came out is kept, whichever
way it went.

A script of this folder makes a [`Claim`] named like itself, calls it CLAIM, and hands it to [`main`]:

    python benchmarks/claims/NAME.py                # all seeds; goes on where an earlier run was cut off
    python benchmarks/claims/NAME.py --seeds 1 2    # these

What a seed gave is kept in `runs/claims/NAME/` and not run again; move the folder away after a change of the code. In
`results/`, `NAME.csv` gets rows of figures, `NAME.json` the outcome; `summary.py` makes the README of them.
"""

import argparse
import csv
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import REPOSITORY, circumstances
from summary import CAME_TRUE, DID_NOT, OPEN

from trl_ext.runs.intervals import mean
from trl_ext.runtime.files import write_atomically

RESULTS = Path(__file__).parent / "results"
RUNS = REPOSITORY / "runs" / "claims"


@dataclass(frozen=True)
class Expectation:
    """What should be seen (`text`), the figure that shows it (`measure`, of a seed's result), and its bounds."""

    text: str
    measure: Callable[[dict[str, Any]], float]
    above: float | None = None
    below: float | None = None

    def __post_init__(self):
        if self.above is None and self.below is None:
            raise ValueError(f"{self.text!r} has no bound, so nothing can contradict it. Set `above` or `below`.")


@dataclass(frozen=True)
class Claim:
    """
    What a paper says, how it is tried, and what should be seen.

    Args:
        name, title, source, paper (`str`): name of the script; heading; paper, section, figure; what it says there.
        settings (`dict`): all that determines a seed's result, in JSON's types.
        seeds (`Sequence[int]`): what is run unless `--seeds` says otherwise.
        run (`Callable`): seed and settings to a result, in JSON's types; its "rows", alike dicts, go to the .csv.
        draw (`Callable`): the results by seed, drawn to a path.
        expectations (`Sequence[Expectation]`): fixed before the run.
        decided_by (`str`): the settings that decided an outcome, and whose choice they were.
        known_beforehand, remarks (`str`): why the outcome was no prediction, if it was none; what to say about it.
        rows_are_older (`str`): set where the code has changed since the rows were made: what changed, and whether it
            can have touched them.
    """

    name: str
    title: str
    source: str
    paper: str
    settings: dict[str, Any]
    seeds: Sequence[int]
    run: Callable[[int, dict[str, Any]], dict[str, Any]]
    draw: Callable[[dict[int, dict[str, Any]], Path], None]
    expectations: Sequence[Expectation]
    decided_by: str
    known_beforehand: str = ""
    remarks: str = ""
    rows_are_older: str = ""


# what the outcome repeats of its claim
TEXTS = ("title", "source", "paper", "decided_by", "known_beforehand", "remarks", "rows_are_older")


def judge(values: Sequence[float], above: float | None, below: float | None) -> dict[str, Any]:
    """
    Mean over the seeds, its 95 % interval (Student's t; none for a single seed), and the outcome: "came true" if the
    interval lies within the bounds, "did not come true" if it lies outside, "open" if a bound cuts it.
    """
    found = mean(values)
    if len(values) < 2:
        return {"mean": found.value, "interval": None, "outcome": OPEN}
    low, high = found.low, found.high
    least, most = -math.inf if above is None else above, math.inf if below is None else below
    outcome = CAME_TRUE if least < low and high < most else DID_NOT if high <= least or low >= most else OPEN
    return {"mean": found.value, "interval": [low, high], "outcome": outcome}


def result_of(claim: Claim, seed: int, folder: Path) -> dict[str, Any]:
    """What a seed gave, and by what: read from `folder`, or run now and kept there."""
    file = folder / f"seed-{seed}.json"
    settings = json.loads(json.dumps(claim.settings))
    if file.exists():
        kept = json.loads(file.read_text())
        if kept["settings"] != settings:
            names = sorted(n for n in {*kept["settings"], *settings} if kept["settings"].get(n) != settings.get(n))
            raise ValueError(
                f"{file} was made with other settings ({', '.join(names)}), and seeds of different settings cannot be "
                f"judged together. Move {folder} away to run all seeds anew, or go back to its settings."
            )
        print(f"seed {seed}: kept", flush=True)
        return kept
    start = time.perf_counter()
    kept = {"settings": settings, "result": claim.run(seed, settings), "made": circumstances()}
    kept["seconds"] = round(time.perf_counter() - start, 1)
    write_atomically(file, json.dumps(kept))
    print(f"seed {seed}: {kept['seconds']} s", flush=True)
    return kept


def main(claim: Claim, argv: Sequence[str] | None = None, *, runs: Path = RUNS, results: Path = RESULTS) -> None:
    """Run the seeds that are missing, judge, and write the results."""
    parser = argparse.ArgumentParser(description=f"{claim.title}. {claim.source}.")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(claim.seeds))
    seeds = parser.parse_args(argv).seeds
    if len(set(seeds)) < len(seeds):
        parser.error(f"--seeds {seeds} counts a seed twice, which would narrow the interval. Give each once.")
    kept = {seed: result_of(claim, seed, runs / claim.name) for seed in seeds}

    outcomes = []
    for expectation in claim.expectations:
        values = [float(f"{expectation.measure(of_seed['result']):.6g}") for of_seed in kept.values()]
        if not all(map(math.isfinite, values)):
            raise ValueError(
                f"{expectation.text!r} measured {values} for seeds {seeds}; only finite figures can be judged. Let "
                "`measure` return one for such a run too."
            )
        bounds = {"above": expectation.above, "below": expectation.below}
        outcomes.append({"text": expectation.text, **bounds, "values": values, **judge(values, **bounds)})
        print(f"{outcomes[-1]['outcome']:<18} {outcomes[-1]['mean']:.4g}  {expectation.text}")
    outcome = {name: getattr(claim, name) for name in TEXTS}
    outcome |= {"settings": claim.settings, "seeds": seeds, "seconds": sum(of["seconds"] for of in kept.values())}
    outcome |= {"made": circumstances(), "expectations": outcomes}

    results.mkdir(parents=True, exist_ok=True)
    with (results / f"{claim.name}.csv").open("w", newline="") as file:
        rows = [{"seed": seed, **row, **of["made"]} for seed, of in kept.items() for row in of["result"]["rows"]]
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    claim.draw({seed: of_seed["result"] for seed, of_seed in kept.items()}, results / f"{claim.name}.png")
    write_atomically(results / f"{claim.name}.json", json.dumps(outcome, indent=1, allow_nan=False) + "\n")
