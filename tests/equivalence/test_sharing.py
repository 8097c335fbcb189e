"""The shared forward gives what the padded one gives, in the same places."""

import copy
import dataclasses
import functools
import gc
import random
import warnings
import weakref
from types import MethodType

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.equivalence.compare import FIELDS, assert_same, batch_of, random_sequences, run, two_of
from tests.equivalence.small_models import NOT_SHARING, make
from tests.support.reference import token_logps
from trl_ext._trl import add_fused_lm_head
from trl_ext.execution import masks, sharing
from trl_ext.execution.cost import CostModel
from trl_ext.execution.sharing import PrefixSharing

completions = st.lists(st.lists(st.integers(3, 5), min_size=0, max_size=8), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.tuples(st.lists(st.integers(3, 5), max_size=14), completions), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    model_type=st.sampled_from(["llama", "mistral", "gpt2"]),
)
@example([([3], [[3], [3, 3]])], random.Random(0), "llama")  # all tokens alike
def test_any_ragged_batch(groups, order, model_type):
    sequences = [(prompt, completion) for prompt, completions in groups for completion in completions]
    order.shuffle(sequences)
    batch = batch_of(sequences)
    if not (batch["labels"][:, 1:] != -100).any():
        return
    padded, shared, prefix_sharing = two_of(model_type)
    # in double precision: in float32 a few tokens, all alike, differ by up to 2e-5 in a gradient, and by more in means
    # of logits that come out near 0, which is rounding and would hide what is wrong
    padded.double(), shared.double()
    assert_same(padded, shared, batch, tolerance=1e-6)
    assert prefix_sharing.statistics.batches_shared == 1


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_against_one_sequence_at_a_time(padding_side):
    # the slow version: no batch, no padding, no fused head
    padded, shared, _ = two_of()
    sequences = random_sequences(3, 3, (4, 20), (1, 12))
    batch = batch_of(sequences, padding_side)
    found = run(shared, batch).log_probs
    scored = batch["labels"][:, 1:] != -100
    for n, (prompt, completion) in enumerate(sequences):
        torch.testing.assert_close(found[n][scored[n]], token_logps(padded, prompt, completion), rtol=1e-5, atol=1e-5)


def test_prompts_are_computed_once():
    padded, shared, prefix_sharing = two_of()
    computed = {"padded": 0, "shared": 0}
    for name, model in (("padded", padded), ("shared", shared)):

        def count(_module, args, name=name):
            computed[name] += args[0].shape[0] * args[0].shape[1]

        model.model.layers[1].mlp.register_forward_pre_hook(count)
    batch = batch_of(random_sequences(2, 4, (40, 40), (10, 10)))
    assert_same(padded, shared, batch)
    assert computed == {"padded": 8 * 50, "shared": 2 * (40 + 4 * 9)}
    assert prefix_sharing.statistics.positions_computed == computed["shared"]
    assert prefix_sharing.statistics.positions_padded == computed["padded"]


def test_all_layers_keep_one_mask_and_it_goes_with_the_backward_pass():
    _, shared, prefix_sharing = two_of()
    batch = batch_of(random_sequences(1, 3, (30, 30), (8, 8)))
    slots = 30 + 3 * 7
    kept = []

    def keep(tensor):
        if tensor.shape[-2:] == (slots, slots):
            kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = run(shared, batch)
    assert len(kept) == shared.config.num_hidden_layers and len(set(kept)) == 1
    del keep
    masks_of_the_plan = prefix_sharing._last[-1].masks
    assert len(masks_of_the_plan) == 1
    outputs.log_probs.sum().backward()
    del outputs
    gc.collect()
    assert len(masks_of_the_plan) == 0


@pytest.mark.parametrize("pays", [True, False])
def test_only_scored_positions_reach_the_head(pays, monkeypatch):
    from trl.trainer import utils

    monkeypatch.setattr(CostModel, "pays", lambda *_: pays)
    _, shared, prefix_sharing = two_of(mode="auto")
    sizes = []
    apply = utils._ChunkedLogProbFunction.apply

    class Counting:
        @staticmethod
        def apply(hidden, *args):
            sizes.append(len(hidden))
            return apply(hidden, *args)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Counting)
    run(shared, batch_of(random_sequences(2, 2, (40, 40), (10, 10))))
    assert sizes == [40]  # also where "auto" leaves a batch padded
    assert prefix_sharing.statistics.batches_shared == pays


def test_one_wrong_bit_in_the_mask_is_noticed(monkeypatch):
    padded, shared, _ = two_of()
    batch = batch_of(random_sequences(1, 2, (12, 12), (6, 6)))
    assert_same(padded, shared, batch)
    visibility = masks.visibility

    def flip_one(layout, window, device):
        visible = visibility(layout, window, device).clone()
        query, key = layout.row_length - 1, 13  # the second answer's last token, a token of the first answer
        assert not visible[0, 0, query, key]
        visible[0, 0, query, key] = True
        return visible

    monkeypatch.setattr(masks, "visibility", flip_one)
    with pytest.raises(AssertionError):
        assert_same(padded, shared, {name: tensor.clone() for name, tensor in batch.items()})
    # and so does the self-check, which stops with the difference
    _, checked, _ = two_of(self_check=True)
    with pytest.raises(RuntimeError, match="other numbers.*differ by.*prefix_sharing=False"):
        run(checked, batch)


def test_the_self_check_passes_and_leaves_no_trace():
    padded, checked, prefix_sharing = two_of(self_check=True, attention_dropout=0.0)
    checked.train()
    checked.model.layers[0].eval()
    batch = batch_of(random_sequences(2, 2, (12, 20), (3, 6)))
    assert_same(padded, checked, batch)
    assert checked.training and not checked.model.layers[0].training
    assert prefix_sharing.statistics.batches_shared == 1


@pytest.fixture
def unverified(monkeypatch):
    """Llama as if nobody had tried it."""
    inspect_model = sharing.inspect_model
    monkeypatch.setattr(
        sharing, "inspect_model", lambda model: dataclasses.replace(inspect_model(model), verified=False)
    )


def test_an_architecture_that_is_not_verified_runs_padded(unverified):
    with pytest.warns(UserWarning, match="LlamaForCausalLM is not among the architectures tested.*=True"):
        padded, shared, prefix_sharing = two_of(mode="auto")
    assert_same(padded, shared, batch_of(random_sequences(2, 4, (30, 30), (3, 6))))
    assert prefix_sharing.statistics.batches_shared == 0


def test_an_architecture_that_is_not_verified_is_checked_if_it_has_to_share(unverified, monkeypatch):
    calls = []
    compare = sharing.compare
    monkeypatch.setattr(sharing, "compare", lambda *args, **kwargs: calls.append(1) or compare(*args, **kwargs))
    padded, shared, _ = two_of(mode=True)
    batch = batch_of(random_sequences(2, 2, (30, 30), (3, 6)))
    assert_same(padded, shared, batch)
    run(shared, batch)
    assert calls == [1]
    # a model whose attention ignores where a branch begins, as if its masks had not reached it
    visibility = masks.visibility
    monkeypatch.setattr(
        masks,
        "visibility",
        lambda layout, window, device: torch.ones_like(visibility(layout, window, device)).tril(),
    )
    _, shared, _ = two_of(mode=True)
    with pytest.raises(RuntimeError, match="log-probabilities differ by.*prefix_sharing=False"):
        run(shared, batch)


@pytest.mark.parametrize("mode", ["auto", True])
def test_the_self_check_waits_for_sequences_that_share_and_not_for_a_batch_that_pays(mode, monkeypatch):
    monkeypatch.setattr(CostModel, "pays", lambda *_: False)
    _, shared, prefix_sharing = two_of(mode=mode, self_check=True)
    checked = []
    compare = sharing.compare
    monkeypatch.setattr(sharing, "compare", lambda *args, **kwargs: checked.append(1) or compare(*args, **kwargs))
    one = batch_of(random_sequences(1, 1, (40, 40), (40, 40)))
    nothing_in_common = batch_of([([3, 4, 5], [6, 7]), ([8, 9, 10], [11, 12])])
    for batch in (one, nothing_in_common):
        run(shared, batch)
    statistics = prefix_sharing.statistics
    assert not checked and statistics.batches_shared == (2 if mode is True else 0)
    for _ in range(2):
        run(shared, batch_of(random_sequences(1, 2, (40, 40), (40, 40))))
    assert checked == [1] and statistics.batches_shared == (4 if mode is True else 1)


def test_a_wrong_mask_is_noticed_after_batches_that_share_nothing(monkeypatch):
    visibility = masks.visibility
    monkeypatch.setattr(
        masks, "visibility", lambda layout, window, device: torch.ones_like(visibility(layout, window, device)).tril()
    )
    _, shared, _ = two_of(self_check=True)
    run(shared, batch_of(random_sequences(1, 1, (12, 20), (3, 6))))
    with pytest.raises(RuntimeError, match="log-probabilities differ by"):
        run(shared, batch_of(random_sequences(2, 2, (12, 20), (3, 6))))


def test_under_zero_3_all_processes_check_when_one_can(monkeypatch):
    """The one that has nothing to compare takes part all the same, and none checks again."""
    _, shared, _ = two_of(self_check=True)
    next(shared.parameters()).ds_id = 0  # as DeepSpeed marks what it has split
    others, checked = iter([0.0, 1.0]), []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda can, op: can.fill_(max(can.item(), next(others))))
    compare = sharing.compare
    monkeypatch.setattr(
        sharing, "compare", lambda *args, slots, **named: checked.append(slots) or compare(*args, slots, **named)
    )
    one = batch_of(random_sequences(1, 1, (12, 20), (3, 6)))
    run(shared, one)
    assert checked == []
    run(shared, batch_of(random_sequences(1, 1, (12, 20), (3, 6), seed=1)))
    assert checked == [None]
    run(shared, batch_of(random_sequences(2, 2, (12, 20), (3, 6))))  # asks nobody
    assert checked == [None]


def test_another_attention_implementation_later_on():
    padded, shared, prefix_sharing = two_of()
    batch = batch_of(random_sequences(2, 2, (12, 20), (3, 6)))
    assert_same(padded, shared, batch)
    shared.set_attn_implementation("eager")
    assert_same(padded, shared, {name: tensor.clone() for name, tensor in batch.items()})
    assert prefix_sharing.statistics.batches_shared == 2


def test_a_deep_copy_runs_its_own_weights():
    _, shared, _ = two_of()
    twin = copy.deepcopy(shared)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    fresh = make("llama")
    fresh.load_state_dict(twin.state_dict())
    add_fused_lm_head(fresh, outputs=FIELDS)
    assert_same(fresh, twin, batch_of(random_sequences(2, 2, (12, 20), (3, 6))))


def test_no_model_is_kept_alive():
    model = make("llama")
    add_fused_lm_head(model)
    prefix_sharing = PrefixSharing(True)
    prefix_sharing.install(model)
    run(model, batch_of(random_sequences(2, 2, (12, 20), (3, 6))))
    model = weakref.ref(model)
    gc.collect()
    assert model() is None
    prefix_sharing.remove()


def test_inference_mode():
    padded, shared, _ = two_of()
    with torch.inference_mode():
        batch = batch_of(random_sequences(2, 2, (12, 20), (3, 6)))
        for _ in range(2):
            torch.testing.assert_close(run(shared, batch).log_probs, run(padded, batch).log_probs)


def test_masks_are_freed_with_the_batch():
    _, shared, prefix_sharing = two_of()
    run(shared, batch_of(random_sequences(2, 2, (12, 20), (3, 6))))
    first = weakref.ref(prefix_sharing._last[-1])
    run(shared, batch_of(random_sequences(2, 2, (12, 20), (3, 6), seed=1)))
    gc.collect()
    assert first() is None
    prefix_sharing.remove()
    assert prefix_sharing._last is None


def test_the_plan_is_made_once_for_all_models():
    padded, shared, prefix_sharing = two_of()
    reference = copy.deepcopy(padded)
    prefix_sharing.install(reference)
    batch = batch_of(random_sequences(2, 2, (12, 20), (3, 6)))
    a, b = run(shared, batch), run(reference, batch)
    assert torch.equal(a.log_probs, b.log_probs)
    assert prefix_sharing.statistics.batches_shared == 1
    batch["input_ids"][0, 0] += 1  # the same tensor with other contents is another batch
    assert_same(padded, reference, batch)
    assert prefix_sharing.statistics.batches_shared == 2


def test_balancing_loss_counts_every_token_of_every_sequence():
    padded, shared, _ = two_of("qwen3_moe", router_aux_loss_coef=0.5)
    batch = batch_of(random_sequences(2, 3, (12, 20), (3, 6)))
    results = []
    for model in (padded, shared):
        outputs = run(model, batch, output_router_logits=True)
        outputs.aux_loss.backward()
        results.append(outputs)
    torch.testing.assert_close(results[1].aux_loss, results[0].aux_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(results[1].loss, results[0].loss, rtol=1e-5, atol=0)
    for a, b in zip(padded.parameters(), shared.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6)


def test_bf16_is_as_close_to_fp32_as_padded_bf16_is():
    exact, _, _ = two_of()
    padded, shared, _ = two_of()
    padded, shared = padded.bfloat16(), shared.bfloat16()
    batch = batch_of(random_sequences(4, 4, (30, 60), (20, 40)))
    weights = torch.randn(batch["labels"][:, 1:].shape, generator=torch.Generator().manual_seed(0))
    logps, gradients = [], []
    for model in (exact, padded, shared):
        found = run(model, batch).log_probs.float()
        (found * weights).sum().backward()
        logps.append(found.detach())
        gradients.append(torch.cat([p.grad.float().flatten() for p in model.parameters()]))
    errors = [((found - logps[0]).norm() / logps[0].norm()).item() for found in logps[1:]]
    gradient_errors = [((found - gradients[0]).norm() / gradients[0].norm()).item() for found in gradients[1:]]
    # measured, both ways: log-probabilities off by 1.4 % of their norm, gradients by 14 % (weights here are far larger
    # than a trained model's, and so is what rounding does); from padded to shared these change by less than 1 %
    assert errors[1] <= 1.1 * errors[0] and gradient_errors[1] <= 1.1 * gradient_errors[0]
    assert errors[1] < 0.02 and gradient_errors[1] < 0.2


@pytest.mark.slow
def test_flex_attention_on_cpu():
    # forward only: FlexAttention has no backward on CPU
    small = {"num_hidden_layers": 1, "head_dim": 16}
    padded, _, _ = two_of(**small)
    _, shared, prefix_sharing = two_of(attn_implementation="flex_attention", **small)
    batch = batch_of(random_sequences(2, 3, (20, 90), (10, 60)))
    with torch.no_grad():
        expected, found = run(padded, batch), run(shared, batch)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-4, atol=1e-4)
    assert prefix_sharing.statistics.batches_shared == 1


# What is not rearranged


def test_other_calls_go_through_unchanged():
    padded, shared, prefix_sharing = two_of()
    batch = batch_of(random_sequences(2, 2, (12, 20), (3, 6)))
    torch.testing.assert_close(shared(**batch).logits, padded(**batch).logits)
    torch.testing.assert_close(shared(**batch).loss, padded(**batch).loss)
    prompt = batch["input_ids"][:1, :8]
    assert torch.equal(
        shared.generate(prompt, max_new_tokens=5, do_sample=False),
        padded.generate(prompt, max_new_tokens=5, do_sample=False),
    )
    assert prefix_sharing.statistics.batches_shared == 0


def test_remove_restores_the_forward_it_found():
    model = make("llama")
    add_fused_lm_head(model)
    before = model.forward
    prefix_sharing = PrefixSharing(True)
    prefix_sharing.install(model)
    assert model.forward != before
    prefix_sharing.remove()
    assert model.forward == before


def test_remove_works_under_a_later_wrapper():
    padded, shared, prefix_sharing = two_of()
    ours = shared.forward.__func__
    later = functools.wraps(ours)(lambda *args, **kwargs: ours(*args, **kwargs))
    shared.forward = MethodType(later, shared)
    prefix_sharing.remove()
    assert shared.forward.__func__ is later
    batch = batch_of(random_sequences(2, 2, (12, 20), (3, 6)))
    assert_same(padded, shared, batch)
    assert prefix_sharing.statistics.batches_shared == 0


def test_a_batch_without_anything_scored_still_has_a_gradient():
    _, shared, _ = two_of()
    batch = batch_of([([3, 4, 5], []), ([3, 4], [])])
    outputs = run(shared, batch)
    outputs.log_probs.sum().backward()
    assert outputs.log_probs.abs().sum() == 0


@pytest.mark.parametrize("model_type", NOT_SHARING)
def test_models_that_cannot_share_run_padded_and_are_named(model_type):
    padded = make(model_type)
    add_fused_lm_head(padded, outputs=FIELDS)
    model = copy.deepcopy(padded)
    prefix_sharing = PrefixSharing("auto")
    with pytest.warns(UserWarning, match=type(model).__name__):
        prefix_sharing.install(model)
    assert not prefix_sharing.shares
    if model_type != "llama4_text":  # which TRL's own head cannot run
        assert_same(padded, model, batch_of(random_sequences(2, 2, (20, 20), (3, 6))))
    assert prefix_sharing.statistics.batches_shared == 0
    with pytest.raises(ValueError, match=f"prefix_sharing=True.*{type(model).__name__}.*'auto' or False"):
        PrefixSharing(True).install(model)


def test_flash_attention_that_takes_no_segments_is_named():
    model = make("stablelm")  # does not go through transformers' attention interface
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="StableLm.*FlashAttention.*attn_implementation='sdpa'"):
        PrefixSharing(True).install(model)


def test_inputs_that_cannot_be_rearranged_are_named_once():
    padded, shared, prefix_sharing = two_of(mode="auto")
    batch = batch_of(random_sequences(2, 2, (12, 20), (3, 6)))
    embedded = {**batch, "inputs_embeds": padded.get_input_embeddings()(batch["input_ids"])}
    del embedded["input_ids"]
    with pytest.warns(UserWarning, match="inputs_embeds"):
        first = run(shared, embedded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(shared, embedded)
    torch.testing.assert_close(first.log_probs, run(padded, batch).log_probs)
    _, strict, _ = two_of(mode=True)
    with pytest.raises(ValueError, match="inputs_embeds"):
        run(strict, embedded)


def test_rotary_embeddings_that_depend_on_the_batch_are_left_alone_beyond_their_limit():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    padded, shared, prefix_sharing = two_of(mode="auto", rope_parameters=rope, max_position_embeddings=48)
    assert_same(padded, shared, batch_of(random_sequences(2, 4, (38, 38), (5, 10))))
    assert prefix_sharing.statistics.batches_shared == 1
    with pytest.warns(UserWarning, match="48 tokens"):
        assert_same(padded, shared, batch_of(random_sequences(2, 4, (38, 38), (11, 20))))
    assert prefix_sharing.statistics.batches_shared == 1


def test_auto_steps_aside_where_it_does_not_pay():
    padded, shared, prefix_sharing = two_of(mode="auto")
    nothing_in_common = batch_of(random_sequences(2, 1, (40, 40), (40, 40)))
    assert_same(padded, shared, nothing_in_common)
    assert prefix_sharing.statistics.batches_padded == 1
    run(shared, batch_of(random_sequences(2, 4, (40, 40), (5, 5))))
    assert prefix_sharing.statistics.batches_shared == 1


def test_the_cost_model_counts_active_weights():
    dense, experts = make("qwen3", intermediate_size=24 * 2), make("qwen3_moe")
    # two of four experts of width 24 are as much work as one MLP of width 48, save for the router
    a, b = (CostModel.of(model).attention_per_pair for model in (dense, experts))
    assert a == pytest.approx(b, rel=0.05)
