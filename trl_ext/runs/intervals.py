"""
Win rates, means and their 95 % intervals: one convention for reports, comparisons and claims.

- A **tie is half a win**: a win rate is `(won + tied / 2) / all pairs`, of scores of answers to the same prompts.
- A win rate of one run has **Wilson's** interval, which has a width when all pairs are won. Ties vary less than wins
  and losses do, so it is too wide where many pairs are tied, and never too narrow for it.
- Any other mean, over prompts of one run or over runs, has **Student's t** interval. Differences are paired.
- Only a comparison of several runs on several prompts draws both anew, see [`~trl_ext.comparison.statistics`].
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, ttest_1samp

LEVEL = 0.95
TIE_RULE = "a tie is half a win"


@dataclass(frozen=True)
class Mean:
    """
    A mean with its 95 % interval (Student's t).

    Attributes:
        value, low, high (`float`): the mean and its interval, from minus to plus infinity for a single value.
        num_values (`int`): how many values it is of.
    """

    value: float
    low: float
    high: float
    num_values: int

    def __str__(self) -> str:
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


@dataclass(frozen=True)
class Wins:
    """
    How often one model's answers score higher than another's to the same prompts.

    Attributes:
        won, tied, lost (`int`): prompts.
    """

    won: int
    tied: int
    lost: int

    @property
    def num_pairs(self) -> int:
        return self.won + self.tied + self.lost

    @property
    def rate(self) -> float:
        """Win rate, 0 to 1, where a tie is half a win."""
        return (self.won + self.tied / 2) / self.num_pairs

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the win rate."""
        z, n, rate = norm.ppf((1 + LEVEL) / 2), self.num_pairs, self.rate
        middle = rate + z**2 / (2 * n)
        half_width = z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
        shrink = 1 + z**2 / n
        return float((middle - half_width) / shrink), float((middle + half_width) / shrink)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.rate:.1%} ({low:.1%} to {high:.1%}), {self.tied} of {self.num_pairs} tied"


def mean(values: Sequence[float]) -> Mean:
    """
    The mean of values and its interval.

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("`values` must have at least one value, got none.")
    if len(values) == 1:
        return Mean(float(values[0]), -math.inf, math.inf, 1)
    with warnings.catch_warnings():  # equal values make an interval of width 0, which is right
        warnings.filterwarnings("ignore", message="Precision loss occurred", category=RuntimeWarning)
        interval = ttest_1samp(np.asarray(values, dtype=float), 0).confidence_interval(LEVEL)
    return Mean(float(np.mean(values)), float(interval.low), float(interval.high), len(values))


def paired_difference(after: Sequence[float], before: Sequence[float]) -> Mean:
    """
    The mean of `after - before` and its interval.

    Args:
        after, before (`Sequence[float]`): scores of two models on the same prompts, in the same order.

    Raises:
        ValueError: the lists differ in length, or are empty.
    """
    _check_pairs(after, before)
    return mean(np.subtract(after, before))


def wins(scores: Sequence[float], others: Sequence[float]) -> Wins:
    """
    Count wins, ties and losses.

    Args:
        scores, others (`Sequence[float]`): scores of two models on the same prompts, in the same order.

    Raises:
        ValueError: the lists differ in length, or are empty.
    """
    _check_pairs(scores, others)
    found = outcomes(scores, others)
    return Wins(*(int((found == outcome).sum()) for outcome in (1.0, 0.5, 0.0)))


def outcomes(scores: Sequence[float], others: Sequence[float]) -> np.ndarray:
    """Pair by pair 1 for a win, 0.5 for a tie, 0 for a loss, and NaN where a score is missing."""
    scores, others = np.asarray(scores, dtype=float), np.asarray(others, dtype=float)
    found = (1.0 * (scores > others) + (scores >= others)) / 2
    return np.where(np.isnan(scores) | np.isnan(others), np.nan, found)


def _check_pairs(scores: Sequence[float], others: Sequence[float]) -> None:
    if len(scores) != len(others) or not len(scores):
        raise ValueError(
            f"Both sides must have one value for every prompt, got {len(scores)} and {len(others)} values."
        )
