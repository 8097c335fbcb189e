"""Warnings about runs that work and do not do what they are for; numbered headings."""

import pytest

from trl_ext.runtime.headings import Headings, count
from trl_ext.runtime.run_warnings import ToldApart, cut_answers, unequal_terms

RRHF = {"loss/rank": ("rank_weight", 1.0), "loss/sft": ("sft_weight", 1.0)}


def test_a_term_a_hundred_times_the_other():
    """RRHF's defaults on chat rows: sums over hundreds of tokens against a difference of means."""
    message = unequal_terms({"loss/rank": 0.19, "loss/sft": 1671.0}, RRHF)
    assert message == (
        "Warning: `loss/sft` adds 1,671 to the loss and `loss/rank` 0.19, over 100 times less, so that it has next to "
        "no effect. Raise `rank_weight` (1 now) or lower `sft_weight` (1 now)."
    )
    slic = {"loss/calibration": (None, 1.0), "loss/regularization": ("reg_weight", 0.1)}
    assert unequal_terms({"loss/calibration": 1.0, "loss/regularization": 2000.0}, slic).endswith(
        "effect. Lower `reg_weight` (0.1 now)."
    )
    assert unequal_terms({"loss/calibration": -500.0, "loss/regularization": 1.0}, slic) is not None


@pytest.mark.parametrize("logs", [{"loss/rank": 1.0, "loss/sft": 100.0}, {"loss/rank": 0.0, "loss/sft": 50.0}, {}])
def test_terms_that_may_be_so(logs):
    assert unequal_terms(logs, RRHF) is None


def test_a_term_whose_weight_is_zero_is_none():
    assert unequal_terms({"loss/rank": 0.1, "loss/sft": 99.0}, RRHF | {"loss/rank": ("rank_weight", 0.0)}) is None


def test_most_answers_cut():
    assert cut_answers(0.5, 16) is None
    assert cut_answers(0.87, 16).startswith("Warning: 87% of the sampled answers are cut at max_new_tokens=16.")


def test_margins_above_zero_for_all():
    told_apart = ToldApart()
    logs = [(1, 0.0), (10, 0.9), (20, 1.0), (30, 1.0), (40, 1.0)]
    said = [told_apart.look({"rewards/accuracies": share}, step, pairs_per_step=8) for step, share in logs]
    assert [one is not None for one in said] == [False, False, False, True, False]
    assert "all of the last 160 pairs" in said[3]
    assert told_apart.look({"train_runtime": 1.0}, 40, 8) is None


def test_headings(capsys):
    headings = Headings(7)
    headings.print("a", "training")
    headings.print("b", f"sampling {count(8, 'answer')} to {count(1600, 'prompt')}", is_finished=True)
    headings.print("a", "training")  # asked for again by another part of the recipe
    assert (
        capsys.readouterr().out
        == "\n1 of 7: training\n\n2 of 7: sampling 8 answers to 1,600 prompts (finished before)\n"
    )
    Headings(9, at_most=True).print("a", f"evaluating on {count(1, 'prompt')}")
    assert capsys.readouterr().out == "\n1 of at most 9: evaluating on 1 prompt\n"
    Headings().print("a", "training")
    assert capsys.readouterr().out == "\n1: training\n"
