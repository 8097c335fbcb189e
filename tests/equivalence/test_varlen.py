"""Attention by segments: the padded path's numbers without a mask, through the kernels' own interface."""

import inspect

import numpy as np
import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.equivalence.compare import assert_same, batch_of, random_sequences, two_of
from tests.equivalence.small_models import SHARING, WINDOW
from tests.support.layouts import CPU
from tests.support.layouts import batch_of as arrays_of
from trl_ext.execution import varlen
from trl_ext.execution.cost import CostModel
from trl_ext.execution.layout import plan_layout
from trl_ext.execution.masks import visibility
from trl_ext.execution.varlen import Segments, attention_by_segment

# no SDPA to take the place of, attention that does not go through transformers' interface, or values of another size
WITH_MASKS = {"gemma2", "gpt_oss", "stablelm", "gptj", "codegen", "falcon", "deepseek_v3"}


@pytest.fixture
def on_cpu(monkeypatch):
    """PyTorch's kernel runs on a GPU in half precision; here its plain version takes its place. Yields the calls."""
    calls = []
    through = varlen._through_varlen_attention

    def counted(*args, **kwargs):
        calls.append(1)
        return through(*args, **kwargs)

    monkeypatch.setattr(varlen, "VARLEN_DEVICES", ("cpu",))
    monkeypatch.setattr(varlen, "VARLEN_DTYPES", (torch.float64,))
    monkeypatch.setattr(varlen, "_through_varlen_attention", counted)
    for name in ("sdpa",):  # taught anew, with the counted function
        attend = varlen.ALL_ATTENTION_FUNCTIONS[name]
        monkeypatch.setitem(varlen.AttentionInterface._global_mapping, name, getattr(attend, "__wrapped__", attend))
    return calls


@settings(max_examples=60, deadline=None)
@given(
    sequences=st.lists(
        st.tuples(st.lists(st.integers(3, 4), max_size=8), st.lists(st.integers(3, 4), min_size=1, max_size=6)),
        min_size=1,
        max_size=6,
    ),
    window=st.sampled_from([None, 3]),
    cost=st.sampled_from([None, CostModel(0.0), CostModel(0.05)]),
)
def test_segments_see_what_the_mask_shows(sequences, window, cost):
    layout = plan_layout(*arrays_of(sequences), cost=cost)
    if layout is None:
        return
    segments = Segments.of(layout, CPU)
    num_slots = layout.source.size
    seen = np.zeros((num_slots, num_slots), dtype=bool)
    query_starts, key_starts = segments.cu_seqlens_q.tolist(), segments.cu_seqlens_k.tolist()
    for start, stop, first, last in zip(query_starts, query_starts[1:], key_starts, key_starts[1:], strict=False):
        keys = segments.key_index[first:last].numpy()
        for query in range(start, stop):  # causal, aligned at the bottom right
            own = len(keys) - (stop - query)
            seen[query, keys[max(0, own + 1 - (window or num_slots)) : own + 1]] = True
    expected = torch.block_diag(*visibility(layout, window, CPU)[:, 0]).numpy().astype(bool)
    assert (seen == expected).all()
    assert segments.max_seqlen_q == max(np.diff(query_starts)) and segments.max_seqlen_k == max(np.diff(key_starts))


def test_without_a_cost_every_token_is_computed_once_in_one_row():
    prompt = list(range(100, 130))
    ids, mask, scored = arrays_of([(prompt, [1, 2, 3]), (prompt, [4, 5]), ([7, 8], [9] * 50)])
    layout = plan_layout(ids, mask, scored, cost=None)
    assert layout.source.shape == (1, 30 + 2 + 1 + 2 + 49) and (layout.source >= 0).all()
    assert len(Segments.of(layout, CPU).cu_seqlens_q) == 1 + 4  # a prompt, its two answers, and a lone sequence


@pytest.mark.parametrize("model_type", sorted(SHARING))
def test_architectures_with_segments_in_place_of_sdpa(model_type, on_cpu):
    padded, shared, prefix_sharing = two_of(model_type)
    for model in (padded.double(), shared.double()):
        model.config._experts_implementation = "eager"  # the grouped kernel has no double precision
    batch = batch_of(random_sequences(2, 3, (WINDOW + 1, 3 * WINDOW), (1, 2 * WINDOW)))
    assert_same(padded, shared, batch, tolerance=1e-6)
    assert prefix_sharing.statistics.batches_shared == 1
    assert bool(on_cpu) == (model_type not in WITH_MASKS)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_segments_reach_layers_that_are_run_again(use_reentrant, on_cpu):
    padded, shared, _ = two_of("qwen3", attention_dropout=0.0)
    for model in (padded.double(), shared.double()):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        if use_reentrant:
            model.enable_input_require_grads()
    assert_same(padded, shared, batch_of(random_sequences(2, 3, (8, 20), (1, 12))), tolerance=1e-6)
    assert len(on_cpu) == 2 * shared.config.num_hidden_layers


def test_dropout_needs_a_mask(on_cpu):
    _, shared, prefix_sharing = two_of("llama", attention_dropout=0.1)
    shared.double().train()
    shared(**batch_of(random_sequences(1, 2, (8, 8), (3, 3))), fused_lm_head=True)
    assert prefix_sharing.statistics.batches_shared == 1 and not on_cpu


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, deterministic=False,
):  # fmt: skip
    """FlashAttention 2's function for rows of many lengths, by its signature, in plain PyTorch."""
    assert causal and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert isinstance(max_seqlen_q, int) and isinstance(max_seqlen_k, int)
    segments = Segments(cu_seqlens_q, cu_seqlens_k, torch.arange(len(k)), max_seqlen_q, max_seqlen_k)
    window = None if window_size[0] < 0 else window_size[0] + 1
    starts = zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True)
    assert all(last - first >= stop - start for start, stop, first, last in starts)
    CALLS.append((len(q), len(k)))
    return attention_by_segment(q, k, v, segments, scale=softmax_scale, window=window)


CALLS: list[tuple[int, int]] = []


@pytest.fixture
def flash_attention(monkeypatch):
    """FlashAttention 2 as transformers calls it. Only the kernel itself is replaced. Yields the calls."""
    process = flash._lazy_define_process_function(flash_attn_varlen_func)
    functions = (None, flash_attn_varlen_func, None, None, None), (process, None)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *args, **kwargs: functions)
    CALLS.clear()
    return CALLS


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "gemma3_text", "gpt_neox"])
def test_flash_attention_shares_prompts(model_type, flash_attention):
    padded, shared, prefix_sharing = two_of(model_type)
    padded.double(), shared.double()
    sequences = random_sequences(2, 3, (WINDOW + 1, 3 * WINDOW), (1, 2 * WINDOW))
    shared.config._attn_implementation = "flash_attention_2"
    assert_same(padded, shared, batch_of(sequences), tolerance=1e-6)
    assert prefix_sharing.statistics.batches_shared == 1
    distinct = sum(len(prompt) for prompt, _ in sequences[::3]) + sum(len(answer) - 1 for _, answer in sequences)
    assert len(flash_attention) == shared.config.num_hidden_layers
    # each prompt is a segment of its own; each answer that has more than one token to compute is another
    keys = sum(len(prompt) for prompt, _ in sequences[::3])
    keys += sum(len(prompt) + len(answer) - 1 for prompt, answer in sequences if len(answer) > 1)
    assert set(flash_attention) == {(distinct, keys)}


def test_flash_attention_drops_the_padding_where_nothing_is_shared(flash_attention):
    padded, shared, prefix_sharing = two_of("llama", mode="auto")
    padded.double(), shared.double()
    shared.config._attn_implementation = "flash_attention_2"
    sequences = [([3] * 5, [4] * 30), ([5] * 6, [6] * 2), ([7] * 3, [8] * 4)]
    assert_same(padded, shared, batch_of(sequences), tolerance=1e-6)
    computed = sum(len(prompt) + len(answer) - 1 for prompt, answer in sequences)
    assert prefix_sharing.statistics.positions_computed == computed


def test_one_wrong_key_is_noticed(flash_attention, monkeypatch):
    padded, shared, _ = two_of("llama")
    padded.double(), shared.double()
    shared.config._attn_implementation = "flash_attention_2"
    batch = batch_of(random_sequences(1, 2, (12, 12), (6, 6)))
    assert_same(padded, shared, batch, tolerance=1e-6)
    cut = Segments.of.__func__

    def with_one_wrong(cls, layout, device):
        segments = cut(cls, layout, device)
        segments.key_index[-1] = segments.key_index[-2]
        return segments

    monkeypatch.setattr(Segments, "of", classmethod(with_one_wrong))
    with pytest.raises(AssertionError):
        assert_same(padded, shared, {name: tensor.clone() for name, tensor in batch.items()}, tolerance=1e-6)


def test_the_arguments_of_the_kernels_are_there():
    """What is called on a GPU only, by the names that the installed versions have."""
    assert {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen.varlen_attn).parameters)
    names = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "sliding_window"}
    assert names <= set(inspect.signature(flash._flash_attention_forward).parameters)
