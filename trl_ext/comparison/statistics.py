"""
The figures of a comparison: means, win rates, length-controlled win rates, perplexities, with 95 % intervals.

**What an interval covers.** With one seed, other prompts: what would come out for this one training run if it were
asked other prompts of the same kind. With two seeds or more, other prompts and other training runs: seeds and prompts
are drawn with replacement independently of each other, and the figure is computed anew for each draw (the pigeonhole
bootstrap; Owen 2007, Annals of Applied Statistics 1 (2), pp. 386-411). The reason: a reader wants to know whether a
method is better, and not only whether one run of it is. Where seeds have different prompts, each set of prompts is
drawn by itself.

**How far to trust it.** Few seeds say little about training runs that were not made. Simulated, with 200 prompts and 1
as the standard deviation of what is not due to prompt or seed, "95 %" intervals contained the truth in 99 % of cases
where seeds did not differ (they are too wide then); where they differed by a standard deviation of 0.1, in 92 % with 2
seeds, 94 % with 3, 96 % with 5; where they differed by 0.3, in only 73 %, 81 % and 87 %. And what was never seen is
never drawn: where all values are equal, as when all pairs are won, the interval is a single point.

Comparisons are paired: only answers to the same prompt with the same seed are set against each other. Draws are the
same for all methods with the same seeds, and from run to run.

Rows are seeds and columns are prompts throughout; NaN is a missing value and is left out.
"""

import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from ..runs.intervals import LEVEL, outcomes

DRAWS = 2000


# each draw is a fit of its own there
LENGTH_CONTROL_DRAWS = 500


# of the length-controlled win rate, on the sum of log-likelihoods
RIDGE = 0.1


@dataclass(frozen=True)
class Estimate:
    """
    A figure with its interval.

    Attributes:
        value (`float`): the figure; NaN where nothing was measured.
        low, high (`float`): its 95 % interval; see the module's docstring for what it covers.
        num_seeds, num_values (`int`): training runs, and values (one per run and prompt), that it comes from.
    """

    value: float
    low: float
    high: float
    num_seeds: int
    num_values: int

    def lies_off(self, value: float) -> bool:
        """Whether the whole interval is on one side of `value`. NaN is on no side."""
        return self.low > value or self.high < value


MISSING = Estimate(math.nan, math.nan, math.nan, 0, 0)


def direction(estimate: Estimate, value: float) -> int:
    """1 if the whole interval is above `value`, -1 if it is below, 0 if neither."""
    return (1 if estimate.low > value else -1) if estimate.lies_off(value) else 0


def mean_interval(rows: Sequence[Sequence[float]], prompts_keys: Sequence[Hashable] | None = None) -> Estimate:
    """
    Mean over all seeds and prompts.

    Args:
        rows (`Sequence[Sequence[float]]`): one per seed, with one value per prompt.
        prompts_keys (`Sequence`, *optional*): for each row what prompts it has. Rows with equal keys have the same
            ones; by default all have.

    Raises:
        ValueError: rows with the same prompts differ in length.
    """
    values = [np.asarray(row, dtype=float) for row in rows]
    return ratio_interval(values, [np.where(np.isnan(row), np.nan, 1.0) for row in values], prompts_keys)


def ratio_interval(
    numerators: Sequence[Sequence[float]],
    denominators: Sequence[Sequence[float]],
    prompts_keys: Sequence[Hashable] | None = None,
) -> Estimate:
    """
    Sum of `numerators` over sum of `denominators`, such as nats over tokens. A mean of ratios would give a short
    answer the weight of a long one.

    Raises:
        ValueError: rows with the same prompts differ in length, or numerators and denominators do.
    """
    ratios = _Ratios(numerators, denominators, prompts_keys)
    return ratios.estimate(ratios.value, ratios.drawn)


def perplexity_interval(
    nll: Sequence[Sequence[float]],
    lengths: Sequence[Sequence[float]],
    prompts_keys: Sequence[Hashable] | None = None,
) -> Estimate:
    """exp of nats per token, over all answers together, as in [`~trl_ext.runs.evaluation.perplexity`]."""
    return _exponential(ratio_interval(nll, lengths, prompts_keys))


def perplexity_ratio_interval(
    nll_a: Sequence[Sequence[float]],
    lengths_a: Sequence[Sequence[float]],
    nll_b: Sequence[Sequence[float]],
    lengths_b: Sequence[Sequence[float]],
    prompts_keys: Sequence[Hashable] | None = None,
) -> Estimate:
    """The perplexity of a over that of b on the same seeds and prompts: 1 where they are equal."""
    a, b = _Ratios(nll_a, lengths_a, prompts_keys), _Ratios(nll_b, lengths_b, prompts_keys)
    return _exponential(a.estimate(a.value - b.value, a.drawn - b.drawn))


def difference_interval(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], prompts_keys: Sequence[Hashable] | None = None
) -> Estimate:
    """Mean of `a - b` over the same seeds and prompts; a pair with a missing value is left out."""
    with np.errstate(invalid="ignore"):  # of two infinities
        return mean_interval([one - other for one, other in _paired(a, b)], prompts_keys)


def win_rate(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], prompts_keys: Sequence[Hashable] | None = None
) -> Estimate:
    """
    Share of pairs whose answer by a has the higher score, 0 to 1. Ties count half.

    Args:
        a, b (`Sequence[Sequence[float]]`): scores, one row per seed and one value per prompt; row by row and value by
            value they belong to the same seed and prompt. A pair with a missing value is left out.
        prompts_keys (`Sequence`, *optional*): as in [`mean_interval`].

    Raises:
        ValueError: a and b differ in shape.
    """
    return mean_interval(_outcomes(a, b), prompts_keys)


def length_controlled_win_rate(
    a: Sequence[Sequence[float]],
    b: Sequence[Sequence[float]],
    lengths_a: Sequence[Sequence[float]],
    lengths_b: Sequence[Sequence[float]],
    prompts_keys: Sequence[Hashable] | None = None,
) -> Estimate:
    """
    What the win rate of a over b would be if their answers were equally long, 0 to 1.

    A logistic regression of the outcome (1, 0, and 1/2 for a tie) on the difference in length, after AlpacaEval-LC
    (Dubois et al. 2024, https://arxiv.org/abs/2404.04475), without its term for how difficult a prompt is, which takes
    other models' answers:

        P(a wins) = sigmoid(theta + phi * tanh((length_a - length_b) / std of that difference))

    and the figure is `sigmoid(theta)`. A ridge of [`RIDGE`]`/2 * (theta² + phi²)` on the sum of log-likelihoods keeps
    both finite when one side wins all pairs, or all in which it is longer: with 100 pairs, all won at equal length,
    the figure is 99.5 % instead of 100. The std stays that of all pairs in the draws for the interval. Where the
    answers of each pair are equally long, this is the win rate but for the ridge. Where all differ by the same number
    of tokens, length and method cannot be told apart, and the figure is NaN.

    Args:
        a, b, prompts_keys: as in [`win_rate`].
        lengths_a, lengths_b (`Sequence[Sequence[float]]`): tokens of the same answers.

    Raises:
        ValueError: shapes differ.
    """
    outcomes = _outcomes(a, b)
    longer = [one - other for one, other in _paired(lengths_a, lengths_b)]
    if [len(row) for row in outcomes] != [len(row) for row in longer]:
        raise ValueError(
            f"Scores and lengths must be of the same answers, got {[len(row) for row in outcomes]} scores and "
            f"{[len(row) for row in longer]} lengths."
        )
    known = np.isfinite(np.concatenate([*outcomes, []])) & np.isfinite(np.concatenate([*longer, []]))
    won, difference = np.concatenate([*outcomes, []])[known], np.concatenate([*longer, []])[known]
    if not len(won):
        return MISSING
    spread = float(difference.std())
    if spread == 0 and difference.any():
        return MISSING
    by_length = np.tanh(difference / spread) if spread else np.zeros_like(difference)
    draws = _draws(tuple(prompts_keys or [0] * len(outcomes)), tuple(len(row) for row in outcomes))
    weights = np.concatenate([one[:LENGTH_CONTROL_DRAWS] for one in draws], axis=1)[:, known]
    thetas = _logistic_intercepts(won, by_length, np.vstack([np.ones(len(won)), weights]))
    rates = 1 / (1 + np.exp(-thetas))
    used = [row for row in _split(known, outcomes) if row.any()]
    return _estimate(float(rates[0]), rates[1:], len(used), len(won))


def _logistic_intercepts(won: np.ndarray, by_length: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """
    theta of the ridge regression for each row of weights.

    Args:
        won (`np.ndarray`): outcomes from 0 to 1, shape `(N,)`.
        by_length (`np.ndarray`): the regressor, shape `(N,)`.
        weights (`np.ndarray`): how often each pair counts, shape `(fits, N)`.
    """
    # Newton's method with step halving; the objective is strictly concave
    theta, phi = np.zeros(len(weights)), np.zeros(len(weights))

    def objective(theta, phi):
        logits = theta[:, None] + phi[:, None] * by_length
        fit = won * logits - np.logaddexp(0, logits)
        return (weights * fit).sum(1) - RIDGE / 2 * (theta**2 + phi**2)

    reached = objective(theta, phi)
    for _ in range(100):
        chance = 1 / (1 + np.exp(-(theta[:, None] + phi[:, None] * by_length)))
        missed, curvature = weights * (won - chance), weights * chance * (1 - chance)
        slope = missed.sum(1) - RIDGE * theta, missed @ by_length - RIDGE * phi
        h11, h12, h22 = curvature.sum(1) + RIDGE, curvature @ by_length, curvature @ by_length**2 + RIDGE
        determinant = h11 * h22 - h12**2
        step_theta = (h22 * slope[0] - h12 * slope[1]) / determinant
        step_phi = (h11 * slope[1] - h12 * slope[0]) / determinant
        size = np.ones(len(weights))
        for _ in range(40):
            found = objective(theta + size * step_theta, phi + size * step_phi)
            worse = found < reached - 1e-12 * (1 + np.abs(reached))
            if not worse.any():
                break
            size[worse] /= 2
        theta, phi, reached = theta + size * step_theta, phi + size * step_phi, found
        if max(np.abs(step_theta).max(), np.abs(step_phi).max()) < 1e-9:
            break
    return theta


def _outcomes(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> list[np.ndarray]:
    return [outcomes(one, other) for one, other in _paired(a, b)]


def _paired(a, b) -> list[tuple[np.ndarray, np.ndarray]]:
    if [len(row) for row in a] != [len(row) for row in b]:
        raise ValueError(
            "Both sides must have one value for each seed and prompt, in the same order, got "
            f"{[len(row) for row in a]} and {[len(row) for row in b]} values."
        )
    return [(np.asarray(one, dtype=float), np.asarray(other, dtype=float)) for one, other in zip(a, b, strict=True)]


def _split(values: np.ndarray, like: Sequence[np.ndarray]) -> list[np.ndarray]:
    return np.split(values, np.cumsum([len(row) for row in like])[:-1])


class _Ratios:
    """A ratio of sums, as it is and for each draw of seeds and prompts."""

    def __init__(self, numerators, denominators, prompts_keys):
        pairs = _paired(numerators, denominators)
        known = [np.isfinite(above) & np.isfinite(below) for above, below in pairs]
        above = [np.where(one, row, 0.0) for one, (row, _) in zip(known, pairs, strict=True)]
        below = [np.where(one, row, 0.0) for one, (_, row) in zip(known, pairs, strict=True)]
        self.num_values = int(sum(one.sum() for one in known))
        self.num_seeds = sum(bool(one.any()) for one in known)
        self.value, self.drawn = math.nan, np.full(1, math.nan)
        total = sum(row.sum() for row in below)
        if not total:
            return
        self.value = float(sum(row.sum() for row in above) / total)
        draws = _draws(tuple(prompts_keys or [0] * len(pairs)), tuple(len(row) for row, _ in pairs))
        above_drawn = sum(weights @ row for weights, row in zip(draws, above, strict=True))
        below_drawn = sum(weights @ row for weights, row in zip(draws, below, strict=True))
        self.drawn = np.full(DRAWS, math.nan)
        np.divide(above_drawn, below_drawn, out=self.drawn, where=below_drawn != 0)

    def estimate(self, value: float, drawn: np.ndarray) -> Estimate:
        return _estimate(value, drawn, self.num_seeds, self.num_values)


def _exponential(estimate: Estimate) -> Estimate:
    with np.errstate(over="ignore"):
        ends = (float(np.exp(one)) for one in (estimate.value, estimate.low, estimate.high))
        return Estimate(*ends, estimate.num_seeds, estimate.num_values)


def _estimate(value: float, drawn: np.ndarray, num_seeds: int, num_values: int) -> Estimate:
    drawn = drawn[~np.isnan(drawn)]  # draws in which nothing was measured
    if num_values < 2 or not len(drawn):  # one value says nothing of others
        return Estimate(value, math.nan, math.nan, num_seeds, num_values)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), num_seeds, num_values)


@functools.lru_cache(maxsize=2)
def _draws(prompts_keys: tuple[Hashable, ...], sizes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """
    How often each value counts in each draw.

    Returns:
        `tuple[np.ndarray, ...]`: for each seed one of shape `(DRAWS, prompts)`.
    """
    size_of: dict[Hashable, int] = {}
    for key, size in zip(prompts_keys, sizes, strict=True):
        if size_of.setdefault(key, size) != size:
            raise ValueError(
                f"Seeds with the prompts {key!r} must have equally many values, got {size_of[key]} and {size}. Use "
                "NaN for a missing value."
            )
    generator = np.random.default_rng(0)
    num_seeds = len(prompts_keys)
    seeds = generator.multinomial(num_seeds, [1 / num_seeds] * num_seeds, size=DRAWS)
    prompts = {
        key: generator.multinomial(size, [1 / size] * size, size=DRAWS) if size else np.zeros((DRAWS, 0))
        for key, size in size_of.items()
    }
    return tuple((seeds[:, [row]] * prompts[key]).astype(float) for row, key in enumerate(prompts_keys))
