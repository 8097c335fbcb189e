"""A report of the scores of candidates, before anything is ranked."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..data.row_error import RowError
from ..data.rows import check_scores
from .candidate_rows import _check_row, _check_rows

# columns of the prompt that a trainer reads
CARRIED_COLUMNS = ("reference", "reference_is_cut", "tools", "chat_template_kwargs")


@dataclass(frozen=True)
class ScoreReport:
    """
    How scores are distributed. `print()` it, or call [`~ScoreReport.print`] with a console of your own.

    Attributes:
        num_prompts, num_completions (`int`): how many there are.
        mean, std, min, lower_quartile, median, upper_quartile, max (`float`): over all completions; `std` with the
            number of completions as its denominator.
        mean_of_best, mean_of_worst (`float`): over prompts, of the best and of the worst completion's score.
        all_equal (`float`): share of prompts whose scores are all equal, so that there is nothing to rank.
        histogram (`list[int]`): completions in each of 10 bins of equal width.
        bin_edges (`list[float]`): 11 edges. A bin includes its lower edge, the last one both.
    """

    num_prompts: int
    num_completions: int
    mean: float
    std: float
    min: float
    lower_quartile: float
    median: float
    upper_quartile: float
    max: float
    mean_of_best: float
    mean_of_worst: float
    all_equal: float
    histogram: list[int]
    bin_edges: list[float]

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=79)
        self.print(console)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())

    def print(self, console: Console | None = None) -> None:
        """Print the figures and a small histogram, by default to the terminal."""
        console = console or Console()
        console.print(f"Scores of {self.num_completions} completions to {self.num_prompts} prompts", highlight=False)
        figures = Table(box=None, pad_edge=False)
        names = ("mean", "std", "min", "25 %", "50 %", "75 %", "max", "best", "worst", "all equal")
        values = (
            self.mean, self.std, self.min, self.lower_quartile, self.median, self.upper_quartile, self.max,
            self.mean_of_best, self.mean_of_worst,
        )  # fmt: skip
        for name in names:
            figures.add_column(name, justify="right")
        figures.add_row(*(f"{value:.3g}" for value in values), f"{self.all_equal:.1%}")
        console.print(figures)
        bars = Table.grid(padding=(0, 1))
        for justify in ("right", "right", "left"):
            bars.add_column(justify=justify)
        for count, lower in zip(self.histogram, self.bin_edges, strict=False):
            # something is shown where there is something
            length = max(round(40 * count / max(self.histogram)), int(count > 0))
            bars.add_row(f"{lower:.3g}", str(count), "█" * length)
        console.print(bars)


def _check_scored_row(row: Mapping[str, Any]) -> None:
    _check_row(row)
    if row.get("scores") is None:
        raise RowError("missing", "scores", "is missing; `score_rows` adds it")
    check_scores(row["scores"], "scores", len(row["completions"]))


def score_report(rows: Sequence[Mapping[str, Any]]) -> ScoreReport:
    """
    Describe the scores of all rows.

    Args:
        rows (`Sequence[dict]`): with `scores`; of all processes, as [`~trl_ext.scoring.score.score_rows`] returns
        them.

    Returns:
        [`ScoreReport`]: each completion counts once in the distribution, each prompt once in the means of the best and
        worst and in the share of equals.

    Raises:
        ValueError: no rows, no scores, or a score that is not a finite number.
    """
    _check_rows(rows, _check_scored_row)
    lists = [row["scores"] for row in rows]
    scores = np.array([score for scores in lists for score in scores], dtype=np.float64)
    if not len(scores):
        raise ValueError(f"One of the {len(rows)} rows must have a completion, got none. Check the sampling.")
    low, high, step = scores.min(), scores.max(), 20 * np.spacing(np.abs(scores).max())
    around = max(0.5, step) if high - low < step else 0.0  # room for ten bins about equal scores, however large
    histogram, edges = np.histogram(scores, bins=10, range=(low - around, high + around))
    return ScoreReport(
        num_prompts=len(rows),
        num_completions=len(scores),
        mean=scores.mean().item(),
        std=scores.std().item(),
        **dict(
            zip(
                ("min", "lower_quartile", "median", "upper_quartile", "max"),
                np.quantile(scores, (0, 0.25, 0.5, 0.75, 1)).tolist(),
                strict=True,
            )
        ),
        mean_of_best=fmean(max(scores) for scores in lists if scores),
        mean_of_worst=fmean(min(scores) for scores in lists if scores),
        all_equal=fmean(len(set(scores)) <= 1 for scores in lists),
        histogram=histogram.tolist(),
        bin_edges=edges.tolist(),
    )
