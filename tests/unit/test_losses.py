"""Losses against hand-derived values and against the slow reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from tests.support import reference
from trl_ext import losses
from trl_ext.metrics import kendall_tau

CALIBRATIONS = {
    "rank": losses.slic_rank_loss,
    "margin": losses.slic_margin_loss,
    "list_rank": losses.slic_list_rank_loss,
    "expected_reward": losses.slic_expected_reward_loss,
}
LOSSES = {**CALIBRATIONS, "rrhf": losses.rrhf_rank_loss}
REFERENCES = {
    **reference.CALIBRATION_LOSSES,
    "rrhf": lambda logps, scores, delta: reference.rrhf_rank_loss(logps, scores),
}


def batch(rows):
    """[(logps, scores), ...] -> padded tensors; the padding holds values that would be noticed."""
    width = max(len(scores) for _, scores in rows)
    logps = torch.full((len(rows), width), 1e4)
    scores = torch.full((len(rows), width), -7.0)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, (row_logps, row_scores) in enumerate(rows):
        logps[index, : len(row_logps)] = torch.tensor(row_logps)
        scores[index, : len(row_scores)] = torch.tensor(row_scores)
        mask[index, : len(row_scores)] = True
    return logps.requires_grad_(), scores, mask


def kwargs(name, delta):
    return {} if name in ("expected_reward", "rrhf") else {"delta": delta}


@pytest.mark.parametrize(
    ("logp_chosen", "logp_rejected", "delta", "expected"),
    [
        (-10.0, -12.0, 1.0, 0.0),  # gap 2 reaches the margin
        (-10.0, -12.0, 5.0, 3.0),  # five times TRL's CPO hinge with beta 0.2, which gives 0.6
        (-10.0, -9.0, 1.0, 2.0),
        (-8.0, -10.0, 1.0, 0.0),
    ],
)
def test_rank_loss_by_hand(logp_chosen, logp_rejected, delta, expected):
    logps, scores, mask = batch([([logp_chosen, logp_rejected], [1.0, 0.0])])
    assert losses.slic_rank_loss(logps, scores, mask, delta=delta).item() == expected


def test_whole_loss_by_hand():
    """relu(1 + 10 - 9) + 0.1 * 12, the regulariser with the sign of a negative log-likelihood."""
    loss = losses.slic_loss(torch.tensor([2.0]), torch.tensor([12.0]), reg_weight=0.1)
    assert loss.item() == pytest.approx(3.2)


def test_margin_loss_by_hand():
    # wanted gap 2 * (0.9 - 0.4) = 1, found 0.25
    logps, scores, mask = batch([([-3.0, -3.25], [0.9, 0.4])])
    assert losses.slic_margin_loss(logps, scores, mask, delta=2.0).item() == pytest.approx(0.75)


def test_list_rank_loss_by_hand():
    # best first: S = -1, -3, -2 with delta 1: relu(1 - 2) + relu(2 - 1) + relu(1 + 3 - 2) = 0 + 1 + 2
    logps, scores, mask = batch([([-2.0, -1.0, -3.0], [0.0, 5.0, 1.0])])
    assert losses.slic_list_rank_loss(logps, scores, mask, delta=1.0).item() == 3.0


def test_list_rank_loss_counts_places_not_positions_among_ties():
    # scores 2, 1, 1, 0: places 0, 1, 1, 2. All S equal, so each pair costs delta times its distance in places.
    logps, scores, mask = batch([([0.0] * 4, [1.0, 2.0, 0.0, 1.0])])
    assert losses.slic_list_rank_loss(logps, scores, mask, delta=1.0).item() == 1 + 1 + 2 + 1 + 1


def test_expected_reward_loss_by_hand():
    logps, scores, mask = batch([([math.log(0.3), math.log(0.1)], [1.0, -1.0])])
    assert losses.slic_expected_reward_loss(logps, scores, mask).item() == pytest.approx(-(0.75 - 0.25))


# multiples of 1/64, so that sums are exact and both sides fall on the same side of a hinge's kink
LOGPS = st.integers(-4000, -1).map(lambda n: n / 64)
rows_strategy = st.lists(
    st.integers(1, 5).flatmap(
        lambda k: st.tuples(
            st.lists(LOGPS, min_size=k, max_size=k),
            st.lists(st.sampled_from([-1.0, 0.0, 0.5, 0.75, 2.0]), min_size=k, max_size=k),
        )
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=150, deadline=None)
@given(rows=rows_strategy, delta=st.sampled_from([0.125, 1.0, 7.0]))
def test_equals_slow_reference_with_gradients(name, rows, delta):
    logps, scores, mask = batch(rows)
    fast = LOSSES[name](logps, scores, mask, **kwargs(name, delta))
    fast.sum().backward()
    assert fast.shape == (len(rows),)
    for index, (row_logps, row_scores) in enumerate(rows):
        leaf = torch.tensor(row_logps, requires_grad=True)
        slow = REFERENCES[name](list(leaf.unbind()), row_scores, delta)
        torch.testing.assert_close(fast[index], slow, rtol=1e-5, atol=1e-5)
        if slow.requires_grad:
            slow.backward()
        expected = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(logps.grad[index, : len(row_logps)], expected, rtol=1e-4, atol=1e-5)
        assert not logps.grad[index, len(row_logps) :].any(), "padding received gradient"


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=50, deadline=None)
@given(rows=rows_strategy, seed=st.integers(0, 1000))
def test_order_of_candidates_does_not_matter(name, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    shuffled = []
    for row_logps, row_scores in rows:
        order = torch.randperm(len(row_scores), generator=generator).tolist()
        shuffled.append(([row_logps[i] for i in order], [row_scores[i] for i in order]))
    before, after = (LOSSES[name](*batch(r), **kwargs(name, 1.0)) for r in (rows, shuffled))
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-4)


def test_satisfied_hinge_has_no_gradient_and_violated_one_has_constant_size():
    logps, scores, mask = batch([([-5.0, -9.0], [1.0, 0.0]), ([-9.0, -5.0], [1.0, 0.0]), ([-90.0, -5.0], [1.0, 0.0])])
    losses.slic_rank_loss(logps, scores, mask, delta=1.0).sum().backward()
    assert logps.grad.tolist() == [[0.0, 0.0], [-1.0, 1.0], [-1.0, 1.0]]


def test_equal_scores_make_no_pair():
    logps, scores, mask = batch([([-1.0, -50.0], [0.5, 0.5])])
    for name in ("rank", "margin", "list_rank"):
        loss = CALIBRATIONS[name](logps, scores, mask, delta=1.0)
        (gradient,) = torch.autograd.grad(loss.sum(), logps)
        assert loss.item() == 0 and not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_likelihoods_stay_finite(name, dtype):
    logps, scores, mask = batch([([-30000.0, -1.0], [1.0, 0.0]), ([-1.0, -30000.0], [1.0, 0.0])])
    logps = logps.detach().to(dtype).requires_grad_()
    loss = LOSSES[name](logps, scores.to(dtype), mask, **kwargs(name, 1.0))
    loss.sum().backward()
    assert loss.isfinite().all() and logps.grad.isfinite().all()


# RRHF

RRHF_SCORES, RRHF_SUMS, RRHF_LENGTHS = [1.0, 0.2, 0.8], [-8.0, -10.0, -18.0], [10, 20, 20]


@pytest.mark.parametrize(
    ("arithmetic", "length_penalty", "reduction", "p", "rank", "sft"),
    [
        # the second answer is above both better ones
        ("paper", 1.0, "sum", [-0.8, -0.5, -0.9], 0.30 + 0.40, 8.0),
        ("paper", 1.0, "mean", [-0.8, -0.5, -0.9], 0.30 + 0.40, 0.8),
        ("official", 1.0, "mean", [-0.2, -0.25, -0.45], 0.20, 0.20),
        ("paper", 0.0, "sum", RRHF_SUMS, 8.0, 8.0),  # sums: only the second above the third
        ("paper", 2.0, "sum", [-0.08, -0.025, -0.045], 0.055 + 0.035 + 0.02, 8.0),
    ],
)
def test_rrhf_by_hand(arithmetic, length_penalty, reduction, p, rank, sft):
    # and next to it a prompt with one candidate, whose padding would be noticed
    sums, scores, mask = batch([(RRHF_SUMS, RRHF_SCORES), ([-3.0], [0.5])])
    lengths, widths = torch.tensor([RRHF_LENGTHS, [6, 900, 900]]), torch.tensor([[25, 40, 33], [12, 900, 900]])
    if arithmetic == "official":
        lengths = losses.rrhf_official_lengths(widths, mask)
        assert lengths.tolist() == [[40] * 3, [12] * 3]
    found_p = losses.rrhf_likelihoods(sums, lengths, length_penalty=length_penalty)
    assert found_p[0].tolist() == pytest.approx(p)
    found = losses.rrhf_rank_loss(found_p, scores, mask)
    assert found.tolist() == pytest.approx([rank, 0.0])
    found_sft = losses.rrhf_sft_loss(sums, lengths, scores, mask, reduction=reduction)
    assert found_sft.tolist() == pytest.approx([sft, 3.0 / {"sum": 1, "mean": int(lengths[1, 0])}[reduction]])
    whole = losses.rrhf_loss(found, found_sft, rank_weight=1.0, sft_weight=1.0)
    assert whole[0].item() == pytest.approx(rank + sft)
    weighted = losses.rrhf_loss(found, found_sft, rank_weight=10.0, sft_weight=0.5)
    assert weighted[0].item() == pytest.approx(10 * rank + 0.5 * sft)


def test_rrhf_fine_tunes_on_the_first_of_equally_good_candidates():
    sums, scores, mask = batch([([-1.0, -2.0, -4.0], [0.0, 1.0, 1.0])])
    losses.rrhf_sft_loss(sums, torch.ones_like(sums), scores, mask, reduction="sum").sum().backward()
    assert sums.grad.tolist() == [[0.0, -1.0, 0.0]]


@settings(max_examples=50, deadline=None)
@given(rows=rows_strategy, scale=st.sampled_from([0.5, 3.0, 100.0]), shift=st.sampled_from([-8.0, 0.0, 16.0]))
def test_only_the_order_of_scores_enters_rrhf(rows, scale, shift):
    moved = [(row_logps, [scale * score + shift for score in row_scores]) for row_logps, row_scores in rows]
    before, after = (losses.rrhf_rank_loss(*batch(r)) for r in (rows, moved))
    assert torch.equal(before, after)


def test_rrhf_pairs_in_order_and_equal_scores_have_no_gradient():
    rows = [
        ([-1.0, -2.0, -3.0], [0.9, 0.5, 0.1]),  # in order
        ([-1.0, -2.0, -3.0], [0.5, 0.5, 0.5]),  # nothing to order
        ([-2.0, -2.0], [1.0, 0.0]),  # not in order, but not the wrong way round either: no margin
        ([-4.0], [1.0]),
        ([-3.0, -1.0, -2.0], [0.9, 0.1, 0.1]),  # two pairs the wrong way round, and one tie that is none
    ]
    logps, scores, mask = batch(rows)
    loss = losses.rrhf_rank_loss(logps, scores, mask)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0, 0.0, 0.0, 2.0 + 1.0]
    assert not logps.grad[:4].any()
    assert logps.grad[4].tolist() == [-2.0, 1.0, 1.0]  # of constant size, whatever the gap


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.integers(1, 6).flatmap(
            lambda k: st.tuples(
                st.lists(st.sampled_from([-4.0, -3.0, -2.5, -1.0]), min_size=k, max_size=k),
                st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=k, max_size=k),
            )
        ),
        min_size=1,
        max_size=4,
    )
)
def test_kendall_tau_equals_scipy(rows):
    tau, has_one = kendall_tau(*batch(rows))
    for index, (row_logps, row_scores) in enumerate(rows):
        if len(set(row_logps)) == 1 or len(set(row_scores)) == 1:
            assert not has_one[index] and tau[index] == 0
        else:
            assert has_one[index]
            assert tau[index].item() == pytest.approx(kendalltau(row_logps, row_scores).statistic, abs=1e-6)
