"""Statistics of a comparison against slow versions of them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize

from tests.support.comparisons import invented_comparison
from trl_ext.comparison.results import MethodResult
from trl_ext.comparison.statistics import (
    RIDGE,
    length_controlled_win_rate,
    mean_interval,
    perplexity_interval,
    perplexity_ratio_interval,
    win_rate,
)
from trl_ext.comparison.summary import mean_curve, results_by_method, summarize, win_rate_matrix
from trl_ext.runs.evaluation import perplexity


def slow_intervals(rows, same_prompts: bool, statistic, draws: int = 3000) -> tuple[float, float]:
    """A bootstrap by loops: seeds are drawn, prompts are drawn, and the values that were drawn are listed."""
    generator, found = np.random.default_rng(5), []
    for _ in range(draws):
        seeds = generator.integers(len(rows), size=len(rows))
        drawn = {
            key: generator.integers(len(rows[0]), size=len(rows[0]))
            for key in ([0] if same_prompts else range(len(rows)))
        }
        found.append(
            statistic([rows[seed][prompt] for seed in seeds for prompt in drawn[0 if same_prompts else seed]])
        )
    return tuple(np.quantile(found, [0.025, 0.975]))


@pytest.mark.parametrize("same_prompts", [True, False])
@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_intervals_are_those_of_a_slow_bootstrap(seeds, same_prompts):
    generator = np.random.default_rng(1)
    rows = generator.normal(size=(seeds, 1)) + generator.normal(0, 2, size=40) + generator.normal(size=(seeds, 40))
    found = mean_interval(rows, None if same_prompts else list(range(seeds)))
    low, high = slow_intervals(rows, same_prompts, np.mean, draws=2000)
    assert found.value == pytest.approx(rows.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.08 * (high - low))
    assert (found.num_seeds, found.num_values) == (seeds, 40 * seeds)


def test_the_interval_of_one_seed_is_that_of_the_normal_approximation():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    found = mean_interval([values])
    half = 1.96 * values.std() / 20
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


@pytest.mark.parametrize(
    ("seeds", "spread", "stated"), [(2, 0.0, 0.99), (2, 0.1, 0.92), (2, 0.3, 0.73), (5, 0.3, 0.87)]
)
def test_intervals_cover_as_often_as_is_said(seeds, spread, stated):
    generator, covered = np.random.default_rng(2), 0
    for _ in range(300):
        rows = spread * generator.normal(size=(seeds, 1)) + 0.5 * generator.normal(size=200)
        found = mean_interval(rows + generator.normal(size=(seeds, 200)))
        covered += found.low <= 0 <= found.high
    assert covered / 300 == pytest.approx(stated, abs=0.05)


def test_perplexity_is_of_tokens_and_not_of_answers():
    nll, lengths = [[math.log(2), 3 * math.log(8)], [0.0, math.nan]], [[1, 3], [6, 2]]
    found = perplexity_interval(nll, lengths)
    assert found.value == pytest.approx(perplexity([(-math.log(2), 1), (-3 * math.log(8), 3), (0.0, 6)]))
    assert found.low <= found.value <= found.high and found.num_values == 3
    doubled = [
        [value + math.log(2) * length for value, length in zip(*pair, strict=True)]
        for pair in zip(nll, lengths, strict=True)
    ]
    ratio = perplexity_ratio_interval(doubled, lengths, nll, lengths)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2, 2, 2))  # the same draws on both sides


def test_missing_values_are_left_out_and_nothing_is_nothing():
    assert mean_interval([[1.0, math.nan, 3.0]]).value == 2.0
    assert mean_interval([[1.0, math.nan, 3.0]]).num_values == 2
    for empty in ([], [[]], [[math.nan, math.nan]], [[], []]):
        assert math.isnan(mean_interval(empty).value) and math.isnan(win_rate(empty, empty).value)
        assert math.isnan(length_controlled_win_rate(empty, empty, empty, empty).value)
    one = mean_interval([[5.0]])
    assert one.value == 5.0 and math.isnan(one.low) and not one.lies_off(0)


def test_values_that_make_no_pairs_are_refused():
    with pytest.raises(ValueError, match="one value for each seed and prompt"):
        win_rate([[1.0, 2.0]], [[1.0]])
    with pytest.raises(ValueError, match="of the same answers"):
        length_controlled_win_rate([[1.0, 2.0]], [[1.0, 3.0]], [[1]], [[1]])
    with pytest.raises(ValueError, match="Seeds with the prompts 'p' must"):
        mean_interval([[1.0, 2.0], [1.0]], ["p", "p"])


@st.composite
def two_sides(draw):
    size, seeds = draw(st.integers(1, 25)), draw(st.integers(1, 3))

    def some(values):
        return [draw(st.lists(values, min_size=size, max_size=size)) for _ in range(seeds)]

    score = st.sampled_from([0.0, 0.5, 1.0, math.nan])
    return some(score), some(score), some(st.integers(0, 40)), some(st.integers(0, 40))


@settings(max_examples=60, deadline=None)
@given(two_sides())
def test_win_rates_are_counts_and_symmetric(sides):
    a, b, lengths_a, lengths_b = sides
    outcomes = [
        1.0 if one > other else 0.0 if one < other else 0.5
        for row_a, row_b in zip(a, b, strict=True)
        for one, other in zip(row_a, row_b, strict=True)
        if not math.isnan(one + other)
    ]
    there, back = win_rate(a, b), win_rate(b, a)
    assert there.value == pytest.approx(sum(outcomes) / len(outcomes) if outcomes else math.nan, nan_ok=True)
    assert (back.value, back.low, back.high) == pytest.approx(
        (1 - there.value, 1 - there.high, 1 - there.low), nan_ok=True
    )
    there = length_controlled_win_rate(a, b, lengths_a, lengths_b)
    back = length_controlled_win_rate(b, a, lengths_b, lengths_a)
    assert (back.value, back.low, back.high) == pytest.approx(
        (1 - there.value, 1 - there.high, 1 - there.low), nan_ok=True, abs=1e-6
    )
    assert math.isnan(there.value) or 0 < there.value < 1


def slow_length_control(outcomes, differences) -> float:
    """Penalised maximum likelihood by a general optimiser, term by term."""
    spread = np.std(differences)

    def loss(parameters):
        theta, phi = parameters
        total = RIDGE / 2 * (theta**2 + phi**2)
        for won, difference in zip(outcomes, differences, strict=True):
            logit = theta + phi * math.tanh(difference / spread)
            total += np.logaddexp(0, logit) - won * logit
        return total

    found = minimize(loss, [0.3, -0.3], method="BFGS", options={"gtol": 1e-8})
    return 1 / (1 + math.exp(-found.x[0]))


@pytest.mark.parametrize("kind", ["mixed", "ties", "separable", "by length alone"])
def test_length_control_is_the_regression(kind):
    generator = np.random.default_rng(3)
    lengths_a, lengths_b = generator.integers(5, 60, size=50), generator.integers(5, 30, size=50)
    longer = lengths_a - lengths_b
    won = {
        "mixed": (generator.random(50) < 0.6).astype(float),
        "ties": generator.choice([0.0, 0.5, 1.0], size=50),
        "separable": np.ones(50),
        "by length alone": (longer > 0).astype(float),
    }[kind]
    found = length_controlled_win_rate([won], [np.full(50, 0.5)], [lengths_a], [lengths_b])
    assert found.value == pytest.approx(slow_length_control(won, longer), abs=1e-5)
    assert 0 < found.low <= found.value <= found.high < 1


def test_a_method_that_wins_by_length_alone_loses_its_lead():
    generator = np.random.default_rng(4)
    lengths_a, lengths_b = generator.poisson(24, size=800), generator.poisson(20, size=800)
    chance = 1 / (1 + np.exp(-2 * np.tanh((lengths_a - lengths_b) / np.std(lengths_a - lengths_b))))
    won, half = (generator.random(800) < chance).astype(float), np.full(800, 0.5)
    raw, controlled = win_rate([won], [half]), length_controlled_win_rate([won], [half], [lengths_a], [lengths_b])
    assert raw.low > 0.6
    assert controlled.low < 0.5 < controlled.high and controlled.high - controlled.low < 0.15


def test_length_control_at_equal_and_at_constant_difference():
    won, lost, lengths = [[1.0] * 100], [[0.0] * 100], [[7] * 100]
    found = length_controlled_win_rate(won, lost, lengths, lengths)
    theta = brentq(lambda theta: 100 * (1 - 1 / (1 + math.exp(-theta))) - RIDGE * theta, 0, 20)
    assert found.value == pytest.approx(1 / (1 + math.exp(-theta))) and found.value > 0.99
    assert math.isnan(length_controlled_win_rate(won, lost, [[9] * 100], lengths).value)


def test_the_matrix_is_all_pairs_and_adds_up():
    comparison = invented_comparison(prompts=30, methods=["sft", "dpo", "spin"])
    comparison.results[4].status = "failed"  # dpo, seed 1
    rates = win_rate_matrix(comparison)
    by_method = results_by_method(comparison)
    assert len(rates) == 6
    for (one, other), rate in rates.items():
        assert rate.value + rates[other, one].value == pytest.approx(1)
        assert rate.low + rates[other, one].high == pytest.approx(1)
        seeds = 1 if "dpo" in (one, other) else 2
        a, b = ([result.scores["reward"] for result in by_method[key][:seeds]] for key in (one, other))
        assert rate.value == pytest.approx(win_rate(a, b).value) and rate.num_seeds == seeds


def test_only_the_same_seed_is_compared():
    comparison = invented_comparison(prompts=30, seeds=(0, 1, 2), methods=["sft", "dpo"])
    results = results_by_method(comparison)
    summary = summarize(results["dpo"][1:], results["sft"][:2])
    one, other = results["dpo"][1].scores["reward"], results["sft"][1].scores["reward"]
    assert summary.differences["reward"].value == pytest.approx(np.mean(one) - np.mean(other))
    assert summary.differences["reward"].num_seeds == 1 and summary.scores["reward"].num_seeds == 2


def test_curves_of_several_seeds_are_interpolated():
    def result(seed, points):
        curve = [
            {"share": share, "updates": 0, "reward": reward, "kl": None, "chosen_logps": None, "rejected_logps": None}
            for share, reward in points
        ]
        return MethodResult("a", "A", seed, "done", curve=curve)

    results = [result(0, [(0.0, 1.0), (0.5, 2.0), (1.0, 4.0)]), result(1, [(0.25, 3.0), (0.8, None), (0.75, 5.0)])]
    assert mean_curve(results, "reward") == [(0.25, 2.25), (0.5, 3.0), (0.75, 4.0)]  # where both were looked at
    assert mean_curve(results, "kl") == []
