"""The plan and its masks: every token keeps exactly the context it had, and nothing is computed twice."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.layouts import CPU, batch_of
from trl_ext.execution.cost import CostModel
from trl_ext.execution.layout import plan_layout
from trl_ext.execution.masks import FLEX_BLOCK_SIZE, attention_mask, block_mask, visibility


def in_one_row(rows, length):
    return rows


def in_short_rows(rows, length):
    return length


def check_contexts(layout, ids, mask, scored, window=None, keep_unscored=False):
    """Each computed token sees, in order, exactly the tokens that precede it in its own sequence, and itself."""
    sees = visibility(layout, window, CPU)[:, 0].numpy()
    source = layout.source
    for n in range(len(ids)):
        tokens = np.flatnonzero(mask[n])
        last = max(tokens, default=-1) + 1 if keep_unscored else max(np.flatnonzero(scored[n][1:]) + 1, default=0)
        tokens = tokens[tokens < last]
        for depth, column in enumerate(tokens):
            row, slot = divmod(layout.slots[n, column], layout.row_length)
            context = ids.flatten()[source[row][sees[row, slot]]]
            first = 0 if window is None else max(0, depth - window + 1)
            assert list(context) == list(ids[n, tokens[first : depth + 1]])
            assert layout.depth[row, slot] == depth
        assert (layout.slots[n] >= 0).sum() == len(tokens)


def test_a_pair_by_hand():
    ids, mask, scored = batch_of([([5, 6, 7], [1, 2]), ([5, 6, 7], [3])])
    layout = plan_layout(ids, mask, scored, cost=in_one_row)
    # the prompt once; of each answer all but its last token, which predicts nothing
    assert ids.flatten()[layout.source].tolist() == [[5, 6, 7, 1]]
    assert layout.subtree_end.tolist() == [[4, 4, 4, 4]]
    assert layout.slots.tolist() == [[0, 1, 2, 3, -1], [0, 1, 2, -1, -1]]


def test_branches_do_not_see_each_other_by_hand():
    ids, mask, scored = batch_of([([5], [1, 2]), ([5], [3, 4]), ([8], [9, 9])])
    layout = plan_layout(ids, mask, scored, cost=in_one_row)
    assert ids.flatten()[layout.source].tolist() == [[5, 1, 3, 8, 9]]
    assert visibility(layout, None, CPU)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


sequences = st.lists(
    st.tuples(
        st.lists(st.integers(1, 3), max_size=12),  # few different tokens, so that beginnings coincide by chance
        st.lists(st.lists(st.integers(1, 3), max_size=9), min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=5,
).map(lambda groups: [(prompt, completion) for prompt, completions in groups for completion in completions])


@settings(max_examples=300, deadline=None)
@given(
    sequences=sequences,
    order=st.randoms(use_true_random=False),
    padding_side=st.sampled_from(["right", "left"]),
    window=st.sampled_from([None, 1, 3]),
    keep_unscored=st.booleans(),
    cost=st.sampled_from([in_one_row, in_short_rows, CostModel(0.01)]),
)
def test_every_token_keeps_its_context(sequences, order, padding_side, window, keep_unscored, cost):
    order.shuffle(sequences)
    if not any(prompt + completion for prompt, completion in sequences):
        return
    ids, mask, scored = batch_of(sequences, padding_side)
    if padding_side == "left":
        # an answer without a prompt is predicted by nothing; the trainers leave its first token out
        scored &= np.pad(mask, ((0, 0), (1, 0)))[:, :-1].astype(bool)
    positions = (mask.cumsum(axis=1) - 1).clip(min=0)
    layout = plan_layout(ids, mask, scored, positions, keep_unscored=keep_unscored, cost=cost)
    if layout is None:
        assert not (mask.any() if keep_unscored else scored[:, 1:].any())
        return
    check_contexts(layout, ids, mask, scored, window, keep_unscored)
    used = layout.source[layout.source >= 0]
    assert len(used) == len(set(used.tolist()))
    assert (visibility(layout, window, CPU).sum(dim=-1) > 0).all()  # an empty slot sees itself: no row of -inf


@pytest.mark.parametrize("k", [1, 2, 6, 16])
def test_tokens_grow_with_distinct_tokens_only(k):
    rng = np.random.default_rng(0)
    prompt = rng.integers(100, 200, 50).tolist()
    answers = [[i, *rng.integers(100, 200, 19)] for i in range(k)]
    ids, mask, scored = batch_of([(prompt, answer) for answer in answers])
    layout = plan_layout(ids, mask, scored, cost=in_one_row)
    assert layout.source.size == 50 + k * 19
    assert layout.num_rows == 1


def test_equal_prompts_of_different_rows_are_one():
    # the same question in two rows of a dataset, and TRL's halves (all chosen, then all rejected)
    prompt = list(range(10, 40))
    ids, mask, scored = batch_of([(prompt, [1, 2]), (prompt, [3, 4]), (prompt, [5, 6]), (prompt, [7, 8])])
    assert plan_layout(ids, mask, scored, cost=in_one_row).source.size == 30 + 4


def test_prompts_that_differ_at_their_end_share_their_beginning():
    ids, mask, scored = batch_of([([*range(10, 40), 90], [1, 2]), ([*range(10, 40), 91], [3, 4])])
    layout = plan_layout(ids, mask, scored, cost=in_one_row)
    assert layout.source.size == 30 + 2 + 2
    check_contexts(layout, ids, mask, scored)


def test_unrelated_prompts_with_the_same_first_token_stay_apart_if_rows_are_short():
    ids, mask, scored = batch_of([([1, *range(10 * n, 10 * n + 9)], [n, n]) for n in range(2, 6)])
    layout = plan_layout(ids, mask, scored, cost=in_short_rows)
    assert layout.source.shape == (4, 11)


def test_a_prompt_with_many_long_answers_is_spread_over_rows_when_that_is_cheaper():
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 99, 30).tolist()
    ids, mask, scored = batch_of([(prompt, rng.integers(0, 99, 300).tolist()) for _ in range(8)])
    one_row = plan_layout(ids, mask, scored, cost=CostModel(0.0))
    assert one_row.num_rows == 1
    spread = plan_layout(ids, mask, scored, cost=CostModel(0.01))
    assert spread.num_rows > 2
    check_contexts(spread, ids, mask, scored)


def test_short_prompts_share_a_row():
    rng = np.random.default_rng(0)
    sequences = [(rng.integers(0, 99, 9).tolist(), rng.integers(0, 99, size).tolist()) for size in (90, 5, 6, 7, 8)]
    ids, mask, scored = batch_of(sequences)
    layout = plan_layout(ids, mask, scored, cost=CostModel(0.001))
    assert layout.num_rows < len(sequences)
    check_contexts(layout, ids, mask, scored)


def test_unusable_batches_are_named():
    ids, mask, scored = batch_of([([5, 6, 7], [1, 2])])
    mask[0, 1] = 0
    with pytest.raises(ValueError, match="holes"):
        plan_layout(ids, mask, scored, cost=in_one_row)
    ids, mask, scored = batch_of([([], [1, 2]), ([1, 2, 3], [4])], "left")
    with pytest.raises(ValueError, match="nothing predicts it"):
        plan_layout(ids, mask, scored, np.zeros_like(ids), cost=in_one_row)


@pytest.mark.parametrize("window", [None, 40])
def test_the_block_mask_is_the_dense_mask(window):
    from torch.nn.attention.flex_attention import create_mask

    rng = np.random.default_rng(0)
    prompt = rng.integers(100, 200, 150).tolist()
    sequences = [(prompt, rng.integers(100, 200, size).tolist()) for size in (90, 130, 20)]
    ids, mask, scored = batch_of([*sequences, ([1, 2, 3], [4, 5, 6])])
    layout = plan_layout(ids, mask, scored, multiple_of=FLEX_BLOCK_SIZE, cost=in_one_row)
    assert layout.row_length % FLEX_BLOCK_SIZE == 0
    dense = visibility(layout, window, CPU)
    blocks = block_mask(layout, window, CPU)
    rows, length = layout.source.shape
    assert torch.equal(create_mask(blocks.mask_mod, rows, 1, length, length, "cpu"), dense)
    side = length // FLEX_BLOCK_SIZE
    by_block = dense[:, 0].reshape(rows, side, FLEX_BLOCK_SIZE, side, FLEX_BLOCK_SIZE).transpose(2, 3)
    some, whole = by_block.flatten(3).any(dim=-1), by_block.flatten(3).all(dim=-1)

    def listed(number, indices):
        marked = torch.zeros_like(some)
        for r in range(rows):
            for q in range(side):
                marked[r, q, indices[r, 0, q, : number[r, 0, q]].long()] = True
        return marked

    full = listed(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    mixed = listed(blocks.kv_num_blocks, blocks.kv_indices)
    assert torch.equal(full, whole)  # these are computed without looking at the mask
    assert not (some & ~(full | mixed)).any()  # nothing visible is skipped
    assert not (full & mixed).any()
    assert (~(full | mixed)).any()  # and something is


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_is_added_to_the_scores(backend, dtype):
    ids, mask, scored = batch_of([([5, 6, 7], [1, 2]), ([5, 6, 7], [3, 4])])
    layout = plan_layout(ids, mask, scored, cost=in_one_row)
    seen = visibility(layout, None, CPU)
    added = attention_mask(layout, None, backend=backend, dtype=dtype, device=CPU)
    assert added.dtype == dtype
    assert torch.equal(added == 0, seen)
    assert (added[~seen] == torch.finfo(dtype).min / 2).all()
