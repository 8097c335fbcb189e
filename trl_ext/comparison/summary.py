"""One method's figures over prompts and seeds."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import numpy as np

from .measures import MEASURES, REWARD, Measure
from .results import ComparisonResults, MethodResult
from .statistics import (
    MISSING,
    Estimate,
    difference_interval,
    length_controlled_win_rate,
    mean_interval,
    win_rate,
)


@dataclass(frozen=True)
class MethodSummary:
    """
    What one method came to over its seeds.

    Attributes:
        method, label (`str`): as in [`~trl_ext.comparison.results.MethodResult`].
        seeds (`tuple[int, ...]`): those that are done.
        failures (`dict[int, str]`): seed to error.
        scores (`dict[str, Estimate]`): scorer to mean score.
        differences (`dict[str, Estimate]`): scorer to mean difference from the base.
        win_rates (`dict[str, Estimate]`): scorer to win rate over the base.
        length_controlled (`dict[str, Estimate]`): scorer to length-controlled win rate over the base.
        figures (`dict[str, Estimate | str]`): what each of the [`MEASURES`] comes to, by its key: an estimate, which
            has no interval where a run has one value, or a text.
        changes (`dict[str, Estimate]`): key of a measure to its change from the base.
        notes (`tuple[str, ...]`): each once.
    """

    method: str
    label: str
    seeds: tuple[int, ...]
    failures: dict[int, str]
    scores: dict[str, Estimate] = field(default_factory=dict)
    differences: dict[str, Estimate] = field(default_factory=dict)
    win_rates: dict[str, Estimate] = field(default_factory=dict)
    length_controlled: dict[str, Estimate] = field(default_factory=dict)
    figures: dict[str, Estimate | str] = field(default_factory=dict)
    changes: dict[str, Estimate] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def summarize(results: Iterable[MethodResult], base: Iterable[MethodResult]) -> MethodSummary:
    """
    Sum one method up.

    Args:
        results (`Iterable[MethodResult]`): of one method, at least one.
        base (`Iterable[MethodResult]`): of the method it is compared with; seeds that only one of them has are not
            compared.
    """
    results = sorted(results, key=lambda result: result.seed)
    done = [result for result in results if result.status == "done"]
    keys = [result.prompts_key for result in done]
    pairs = pairs_of(done, base)
    pair_keys = [one.prompts_key for one, _ in pairs]
    lengths = _both(pairs, lambda one: one.measured.get("lengths"))
    scores: dict[str, dict[str, Estimate]] = {
        "scores": {},
        "differences": {},
        "win_rates": {},
        "length_controlled": {},
    }
    for scorer in dict.fromkeys(scorer for result in done for scorer in result.scores):
        scores["scores"][scorer] = mean_interval(_rows(done, lambda one: one.scores.get(scorer)), keys)  # noqa: B023
        a, b = _both(pairs, lambda one: one.scores.get(scorer))  # noqa: B023
        scores["differences"][scorer] = difference_interval(a, b, pair_keys)
        scores["win_rates"][scorer] = win_rate(a, b, pair_keys)
        scores["length_controlled"][scorer] = length_controlled_win_rate(a, b, *lengths, pair_keys)
    return MethodSummary(
        results[0].method,
        results[0].label,
        tuple(result.seed for result in done),
        {result.seed: result.error or "no reason given" for result in results if result.status != "done"},
        **scores,
        figures={measure.key: _figure(measure, done, keys) for measure in MEASURES},
        changes={measure.key: _change(measure, pairs, pair_keys) for measure in MEASURES if measure.is_compared},
        notes=tuple(dict.fromkeys(note for one in results for note in one.notes)),
    )


def _figure(measure: Measure, done: Sequence[MethodResult], keys: Sequence[str]) -> Estimate | str:
    """What a measure comes to over the seeds of a method."""
    if measure.statistic is not None:
        names = (measure.stored, *measure.statistic.also)
        return measure.statistic.interval(*(_rows(done, lambda one: one.measured.get(name)) for name in names), keys)  # noqa: B023
    values = [one.measured.get(measure.stored) for one in done]
    if any(isinstance(value, str) for value in values):
        return ", ".join(dict.fromkeys(value for value in values if value))
    return replace(MISSING, value=_mean(values), num_seeds=len(done))


def _change(measure: Measure, pairs: Sequence[tuple[MethodResult, MethodResult]], keys: Sequence[str]) -> Estimate:
    """How far a measure is from the base's."""
    names = (measure.stored, *measure.statistic.also)
    sides = [_both(pairs, lambda one: one.measured.get(name)) for name in names]  # noqa: B023
    return measure.statistic.change(*(a for a, _ in sides), *(b for _, b in sides), keys)


def summaries(comparison: ComparisonResults) -> list[MethodSummary]:
    """Sum up every method, by mean reward from high to low; those without one come last, in the order given."""
    by_method = results_by_method(comparison)
    found = [summarize(results, by_method[comparison.base]) for results in by_method.values()]

    def order(one: MethodSummary) -> float:
        reward = one.scores.get(REWARD, MISSING).value
        return math.inf if math.isnan(reward) else -reward

    return sorted(found, key=order)


def results_by_method(comparison: ComparisonResults) -> dict[str, list[MethodResult]]:
    """`method` to its results, by seed."""
    found: dict[str, list[MethodResult]] = {}
    for result in sorted(comparison.results, key=lambda result: result.seed):
        found.setdefault(result.method, []).append(result)
    return {result.method: found[result.method] for result in comparison.results}


def scorers(comparison: ComparisonResults) -> list[str]:
    """All scorers, `"reward"` first if there is one."""
    found = list(dict.fromkeys(scorer for result in comparison.results for scorer in result.scores))
    return sorted(found, key=lambda scorer: scorer != REWARD)


def win_rate_matrix(comparison: ComparisonResults, scorer: str = REWARD) -> dict[tuple[str, str], Estimate]:
    """
    Every method against every other on one scorer.

    Returns:
        `dict[tuple[str, str], Estimate]`: `(a, b)` to the win rate of a over b, [`MISSING`] where they have no pairs.
        What is under `(a, b)` and under `(b, a)` adds up to 1.
    """
    by_method, found = results_by_method(comparison), {}
    methods = list(by_method)
    for number, one in enumerate(methods):
        for other in methods[number + 1 :]:
            pairs = pairs_of(by_method[one], by_method[other])
            a, b = _both(pairs, lambda result: result.scores.get(scorer))
            rate = win_rate(a, b, [result.prompts_key for result, _ in pairs])
            found[one, other] = rate
            found[other, one] = Estimate(1 - rate.value, 1 - rate.high, 1 - rate.low, rate.num_seeds, rate.num_values)
    return found


def mean_curve(results: Iterable[MethodResult], key: str) -> list[tuple[float, float]]:
    """
    What was watched along training, as the mean over seeds.

    Args:
        results (`Iterable[MethodResult]`): of one method.
        key (`str`): `"reward"`, `"kl"`, `"chosen_logps"` or `"rejected_logps"`.

    Returns:
        `list[tuple[float, float]]`: share of training and mean, by share. Where seeds were looked at at different
        shares, each is interpolated; shares that a seed has not reached are left out.
    """
    curves = []
    for result in results:
        points = sorted((point["share"], point[key]) for point in result.curve if _is_number(point[key]))
        if points:
            curves.append(np.array(points, dtype=float))
    if not curves:
        return []
    first, last = max(curve[0, 0] for curve in curves), min(curve[-1, 0] for curve in curves)
    shares = sorted({share for curve in curves for share in curve[:, 0] if first <= share <= last})
    return [(share, fmean(np.interp(share, curve[:, 0], curve[:, 1]) for curve in curves)) for share in shares]


def pairs_of(
    results: Iterable[MethodResult], others: Iterable[MethodResult]
) -> list[tuple[MethodResult, MethodResult]]:
    """Results of two methods with the same seed that both are done, by seed."""
    by_seed = {other.seed: other for other in others if other.status == "done"}
    return [
        (result, by_seed[result.seed])
        for result in sorted(results, key=lambda result: result.seed)
        if result.status == "done" and result.seed in by_seed
    ]


def _rows(results: Sequence[MethodResult], values) -> list[Sequence[float]]:
    """What was measured of each; NaN for each prompt of one of whom it was not."""
    found = [values(result) or [] for result in results]
    longest = max(map(len, found), default=0)
    return [row or [math.nan] * longest for row in found]


def _both(pairs, values) -> tuple[list[Sequence[float]], list[Sequence[float]]]:
    found = _rows([one for pair in pairs for one in pair], values)
    return found[::2], found[1::2]


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _mean(values: Iterable[float | None]) -> float:
    numbers = [float(value) for value in values if _is_number(value)]
    return fmean(numbers) if numbers else math.nan
