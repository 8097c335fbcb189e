"""Win rates and means with their intervals: one tie rule, and intervals that cover what they claim to."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from trl_ext.comparison.statistics import win_rate
from trl_ext.runs.intervals import Mean, Wins, mean, outcomes, paired_difference, wins
from trl_ext.runs.watch import change, wins_over


def test_mean_by_hand():
    found = mean([1.0, 2.0, 3.0])
    # t(0.975, 2) = 4.302653, standard error 1 / sqrt(3)
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2 - 2.484138, 2 + 2.484138), rel=1e-6)
    assert mean([0.5]) == Mean(0.5, -math.inf, math.inf, 1)
    assert mean([0.5, 0.5, 0.5]) == Mean(0.5, 0.5, 0.5, 3)


def test_paired_difference_covers_the_truth():
    """Of 95 % intervals about 95 % contain the true difference; pairing removes what prompts have in common."""
    generator, covered, widths = np.random.default_rng(0), {5: 0, 100: 0}, []
    for number in covered:
        for _ in range(1000):
            prompts = generator.normal(0, 5, size=number)
            before = prompts + generator.normal(size=number)
            after = prompts + 0.3 + generator.normal(size=number)
            difference = paired_difference(after, before)
            covered[number] += difference.low <= 0.3 <= difference.high
            widths += [difference.high - difference.low] if number == 100 else []
    assert all(930 <= one <= 970 for one in covered.values())
    assert np.mean(widths) == pytest.approx(2 * 1.98 * math.sqrt(2) / 10, rel=0.02)


def test_wins_without_ties_have_wilsons_interval():
    for won, lost in ((0, 7), (7, 0), (93, 7), (1, 1), (250, 150)):
        expected = binomtest(won, won + lost).proportion_ci(method="wilson")
        assert Wins(won, 0, lost).interval == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("ties", [0.0, 0.3, 0.9])
def test_win_rates_with_ties_cover_the_truth(ties):
    generator = np.random.default_rng(0)
    chances = [0.6 * (1 - ties), ties, 0.4 * (1 - ties)]
    truth, covered = chances[0] + ties / 2, 0
    for won, tied, lost in generator.multinomial(200, chances, size=1000):
        low, high = Wins(int(won), int(tied), int(lost)).interval
        covered += low <= truth <= high
    assert covered >= 930


def test_a_tie_is_half_a_win_in_every_report():
    """Two wins, three ties and a loss: 3.5 of 6, in rounds and self-play, in the comparison, and for the claims."""
    scores, others = [1.0, 1.0, 0.5, 0.5, 0.0, 0.0], [0.0, 0.5, 0.5, 0.5, 0.0, 1.0]
    assert outcomes(scores, others).tolist() == [1, 1, 0.5, 0.5, 0.5, 0]
    assert wins(scores, others) == Wins(2, 3, 1)
    assert wins(scores, others).rate == pytest.approx(3.5 / 6) == win_rate([scores], [others]).value
    assert wins(others, scores).rate == pytest.approx(2.5 / 6)
    answers, first = ({n: {"reward": one} for n, one in enumerate(of)} for of in (scores, others))
    answers[6] = first[7] = {"reward": 1.0}  # a prompt that only one has
    assert wins_over(answers, first) == Wins(2, 3, 1)
    assert change(answers, first).value == pytest.approx(0.5 / 6)


@pytest.mark.parametrize(("after", "before"), [([1.0], []), ([], [])])
@pytest.mark.parametrize("function", [paired_difference, wins])
def test_values_that_make_no_pairs(after, before, function):
    with pytest.raises(ValueError, match="one value for every prompt"):
        function(after, before)


def test_a_missing_score_is_in_no_pair():
    assert np.isnan(outcomes([math.nan, 1.0], [0.0, math.nan])).all()
