"""Batches run in parts: the same numbers, with memory that does not grow with the number of completions."""

import copy
import gc
import weakref

import pytest
import torch
import trl.trainer.utils
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PromptTuningConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from tests.equivalence.compare import FIELDS, batch_of, random_sequences, run
from tests.equivalence.small_models import make
from tests.support import methods
from tests.support.data import LISTS
from tests.support.methods import LORA
from tests.support.training import Losses, assert_same_gradients, copy_of, counting, gradients, one_batch, weights
from trl_ext import RRHFConfig, RRHFTrainer, SLiCConfig, enable_prefix_sharing
from trl_ext._trl import add_fused_lm_head
from trl_ext.execution import chunking
from trl_ext.execution.chunking import add_chunking, chunk_sizes
from trl_ext.execution.sharing import PrefixSharing
from trl_ext.playground.model import save_byte_level_model


def build(model, tokenizer, config_kwargs, rows=LISTS, method="rrhf", **settings):
    return methods.build(method, model, tokenizer, rows, config_kwargs, **settings)


# How a batch is cut


@pytest.mark.parametrize(
    ("counts", "most", "expected"),
    [
        ([2, 2, 2], 4, [4, 2]),
        ([3, 3, 3], 4, [3, 3, 3]),  # a prompt is not torn apart to fill up a part
        ([1, 5, 1], 4, [1, 4, 2]),  # unless it has to be; what is left over may have company
        ([4, 4], 4, [4, 4]),
        ([8], 4, [4, 4]),
        ([9, 3], 4, [4, 4, 4]),
        ([2, 3], 1, [1, 1, 1, 1, 1]),
        ([2, 3], 100, [5]),
    ],
)
def test_cuts_fall_between_prompts_where_they_can(counts, most, expected):
    prompt_index = [prompt for prompt, count in enumerate(counts) for _ in range(count)]
    assert chunk_sizes(prompt_index, most) == expected


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=8), most=st.integers(1, 12))
def test_no_part_is_too_large_and_small_prompts_stay_whole(counts, most):
    prompt_index = [prompt for prompt, count in enumerate(counts) for _ in range(count)]
    sizes = chunk_sizes(prompt_index, most)
    assert sum(sizes) == len(prompt_index) and all(0 < size <= most for size in sizes)
    borders = {sum(sizes[:i]) for i in range(len(sizes))}
    for prompt, count in enumerate(counts):
        inside = range(sum(counts[:prompt]) + 1, sum(counts[: prompt + 1]))
        assert count > most or not borders & set(inside)


# One model call


def one_of(model_type="llama", prefix_sharing=None, **overrides):
    """A model as TRL leaves it, or sharing prefixes, and the same one that can run in parts."""
    models = []
    for chunked in (False, True):
        model = make(model_type, **overrides)
        add_fused_lm_head(model, outputs=FIELDS)
        if prefix_sharing is not None:
            PrefixSharing(prefix_sharing).install(model)
        if chunked:
            model.load_state_dict(models[0].state_dict())
            add_chunking(model)
        models.append(model)
    return models


def backward(outputs):
    signs = torch.randn(outputs.log_probs.shape, generator=torch.Generator().manual_seed(0))
    (outputs.log_probs * signs + 0.1 * outputs.entropy * signs).sum().backward()


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "qwen3_moe"])
@pytest.mark.parametrize("prefix_sharing", [None, True])
def test_parts_give_the_outputs_and_gradients_of_the_whole(prefix_sharing, model_type, padding_side):
    whole, chunked = one_of(model_type, prefix_sharing)
    batch = batch_of(random_sequences(4, 3, (3, 20), (1, 12)), padding_side)
    expected, found = run(whole, batch), run(chunked, batch, chunk_sizes=[3, 1, 2, 5, 1])
    for name in (*FIELDS, "label_mask"):
        assert expected[name].shape == found[name].shape and expected[name].dtype == found[name].dtype
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    backward(expected)
    backward(found)
    assert_same_gradients(chunked, whole, tolerance=1e-5)  # measured: 1e-6
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found = run(chunked, {k: v.clone() for k, v in batch.items()}, chunk_sizes=[6, 6])
        torch.testing.assert_close(found.log_probs, expected.log_probs.detach(), rtol=1e-5, atol=1e-5)


def test_sizes_of_0_compute_the_last_row_once_more_and_count_for_nothing():
    whole, chunked = one_of()
    batch = batch_of(random_sequences(2, 2, (3, 9), (1, 6)))
    calls = []
    chunked.model.layers[0].register_forward_pre_hook(lambda _module, args: calls.append(len(args[0])))
    expected, found = run(whole, batch), run(chunked, batch, chunk_sizes=[3, 1, 0, 0])
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)
    backward(expected)
    backward(found)
    assert_same_gradients(chunked, whole, tolerance=1e-5)  # measured: 1e-6
    assert calls == [3, 1, 1, 1, 1, 1, 1, 3], "each part once more, in the backward pass too"


def test_padding_is_cut_off_each_part():
    _, chunked = one_of()
    lengths = []
    chunked.model.layers[0].register_forward_pre_hook(lambda _module, args: lengths.append(args[0].size(1)))
    batch = batch_of([([5] * 3, [6] * 2), ([5] * 4, [6] * 3), ([5] * 30, [6] * 9)])
    with torch.no_grad():
        run(chunked, batch, chunk_sizes=[1, 1, 1])
        add_chunking(chunked, multiple_of=8)
        run(chunked, batch, chunk_sizes=[1, 1, 1])
    assert lengths == [5, 7, 39, 8, 8, 39]


def test_rotary_embeddings_that_depend_on_the_length_of_a_batch_see_all_of_it():
    """The rows of such a model change with the longest row next to them, so nothing is cut off."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    whole, chunked = one_of(rope_parameters=rope, max_position_embeddings=16)
    batch = batch_of([([5] * 3, [6, 7]), ([8] * 30, [6, 9])])
    with torch.no_grad():
        expected, found = run(whole, batch), run(chunked, batch, chunk_sizes=[1, 1])
        alone = run(whole, {name: tensor[:1, :5] for name, tensor in batch.items()})
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)
    assert (alone.log_probs - expected.log_probs[:1, :4]).abs().max() > 1e-3


def test_dropout_is_the_same_in_both_runs_of_a_part(monkeypatch):
    batch = batch_of(random_sequences(2, 3, (3, 20), (1, 12)))
    results = []
    for recompute in (True, False):
        torch.manual_seed(0)
        _, model = one_of(attention_dropout=0.5)
        model.train()
        if not recompute:
            monkeypatch.setattr(chunking, "checkpoint", lambda run, args, kwargs, **settings: run(args, kwargs))
        torch.manual_seed(1)
        backward(run(model, batch, chunk_sizes=[3, 2, 1]))
        results.append(gradients(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)
    model.eval().zero_grad()
    backward(run(model, batch, chunk_sizes=[3, 2, 1]))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(gradients(model), results[1], rtol=1e-2, atol=1e-2)


def test_a_call_without_sizes_goes_through_and_nothing_stays_behind():
    whole, chunked = one_of()
    batch = batch_of(random_sequences(2, 2, (3, 9), (1, 6)))
    torch.testing.assert_close(run(chunked, batch).loss, run(whole, batch).loss)
    ids = batch["input_ids"][:1, :4]
    assert torch.equal(chunked.generate(ids, max_new_tokens=3), whole.generate(ids, max_new_tokens=3))
    backward(run(chunked, batch, chunk_sizes=[2, 2]))
    assert "forward" not in vars(chunked.model), "the backbone is as it was"
    twin = copy.deepcopy(chunked)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
        assert not torch.equal(
            run(twin, batch, chunk_sizes=[2, 2]).log_probs, run(chunked, batch, chunk_sizes=[2, 2]).log_probs
        )
    del chunked, twin  # TRL's fused head ties a deep copy to its original
    _, chunked = one_of()
    backward(run(chunked, batch, chunk_sizes=[2, 2]))
    gone = weakref.ref(chunked)
    del chunked
    gc.collect()
    assert gone() is None


def test_what_has_no_rows_to_cut_is_refused():
    _, chunked = one_of()
    batch = batch_of(random_sequences(1, 2, (3, 9), (1, 6)))
    with pytest.raises(NotImplementedError, match=r"called with \['token_type_ids'\], which cannot be run in parts"):
        run(chunked, batch, chunk_sizes=[1, 1], token_type_ids=torch.zeros_like(batch["input_ids"]))


# Whole trainers


@pytest.mark.parametrize(("prefix_sharing", "most"), [(False, 1), (True, 1), (False, 3), (True, 7)])
def test_loss_and_gradients_are_those_of_whole_batches(prefix_sharing, most, model, tokenizer, config_kwargs):
    config_kwargs["prefix_sharing"] = prefix_sharing
    results = []
    for limit in (None, most):
        trainer = build(copy_of(model), tokenizer, config_kwargs, max_completions_per_forward=limit)
        with counting() as counts:
            loss = trainer.compute_loss(trainer.model, one_batch(trainer))
            loss.backward()
        results.append((loss, gradients(trainer.model)))
        if limit is None:
            assert counts["forwards"] == 1
        else:  # every part twice
            assert counts["forwards"] == 2 * len(trainer._chunk_sizes(one_batch(trainer))) > 2 * 36 / most - 2
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-5)


def test_prompts_are_still_shared_within_a_part(model, tokenizer, config_kwargs):
    rows = [{**row, "prompt": "a prompt that takes its time: " + row["prompt"]} for row in LISTS]
    trainer = build(
        model, tokenizer, config_kwargs, rows=rows, max_completions_per_forward=8, prefix_sharing=True,
        check_prefix_sharing=True,
    )  # fmt: skip
    trainer.compute_loss(trainer.model, one_batch(trainer)).backward()
    statistics = trainer.prefix_sharing.statistics
    # 1 + 2 + 3, 4, 5, 6, 7, 8
    assert statistics.batches_shared == 6 and statistics.positions_computed < 0.4 * statistics.positions_padded


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"peft_config": LORA, "activation_checkpointing": True},
        {"gradient_accumulation_steps": 2},
        {"prefix_sharing": True, "check_prefix_sharing": True},
        {"rank_weight": 0.0},
        {"method": "slic"},
        {"pad_to_multiple_of": 32},
        {"bf16": True},
    ],
    # without the values of an adapter's config, a set of which has another order in each process
    ids=lambda settings: ", ".join(k if k == "peft_config" else f"{k}={v}" for k, v in settings.items()),
)
def test_training_in_parts_is_the_same_training(settings, model_dir, tokenizer, config_kwargs):
    settings = {"prefix_sharing": False, **settings}
    config_kwargs.update(per_device_train_batch_size=4, optim="sgd", learning_rate=0.05)
    rows = LISTS if settings.get("method") != "slic" else LISTS[1:]
    runs, forwards = [], []
    for most in (None, 3):
        losses = Losses()
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        trainer = build(
            model, tokenizer, config_kwargs, rows=rows, callbacks=[losses], max_completions_per_forward=most,
            **settings,
        )  # fmt: skip
        before = weights(trainer)
        with counting() as counts:
            trainer.train()
        forwards.append(counts["forwards"])
        runs.append((trainer, losses, trainer.evaluate(trainer.train_dataset)))
    (whole, whole_losses, evaluation), (parts, parts_losses, parts_evaluation) = runs
    # one for each batch, and where the first is checked two more; two for each part
    num_completions = sum(len(row["completion_ids"]) for row in whole.train_dataset)
    assert forwards[0] <= 4 and forwards[1] >= 2 * num_completions / 3
    moved, off = (weights(whole) - before).abs().max(), (weights(parts) - weights(whole)).abs().max()
    print(f"moved by {moved:.2g}, off by {off / moved:.2g} of it")
    assert moved > 1e-2
    # measured: off by 4e-7 of the movement, and by 7e-4 in bfloat16
    assert off <= (3e-3 if settings.get("bf16") else 1e-5) * moved
    tolerance = {"rtol": 1e-3 if settings.get("bf16") else 1e-4, "atol": 1e-5}
    for name in ("loss", "logps/chosen", "entropy", "mean_token_accuracy", "logits/chosen", "num_tokens"):
        torch.testing.assert_close(parts_losses.series(name), whole_losses.series(name), **tolerance)
    assert parts_evaluation["eval_loss"] == pytest.approx(evaluation["eval_loss"], rel=tolerance["rtol"])


def test_prefix_sharing_can_be_switched_on_and_off_beneath(model, tokenizer, config_kwargs):
    trainer = build(model, tokenizer, config_kwargs, max_completions_per_forward=8, prefix_sharing=False)
    batch = one_batch(trainer)
    expected = trainer.compute_loss(trainer.model, batch)
    for prefix_sharing in (True, False, True):
        sharing = enable_prefix_sharing(trainer, prefix_sharing)
        torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected, rtol=1e-5, atol=1e-5)
        assert sharing is None or sharing.statistics.batches_shared == 6


@pytest.mark.parametrize("bf16", [False, True])
def test_prefix_sharing_can_be_switched_on_beneath_after_training(bf16, model, tokenizer, config_kwargs):
    """With bf16, `train` leaves accelerate's wrapper for mixed precision on top."""
    config_kwargs.update(bf16=bf16, learning_rate=1e-6)
    trainer = build(model, tokenizer, config_kwargs, max_completions_per_forward=8, prefix_sharing=False)
    trainer.train()
    assert hasattr(trainer.model, "_original_forward") == bf16
    batch = one_batch(trainer)
    expected = trainer.compute_loss(trainer.model, batch)
    wrapped = trainer.model.forward
    for prefix_sharing in (True, False, True):
        sharing = enable_prefix_sharing(trainer, prefix_sharing)
        assert trainer.model.forward == wrapped
        with counting() as counts:
            found = trainer.compute_loss(trainer.model, batch)
        torch.testing.assert_close(found, expected, rtol=1e-2 if bf16 else 1e-5, atol=1e-5)
        assert counts["forwards"] == 6
        assert sharing is None or sharing.statistics.batches_shared == 6


# Settings that TRL changes


def test_checkpointing_stays_as_the_user_wants_it_where_trl_would_change_it(
    model_dir, tokenizer, config_kwargs, monkeypatch
):
    """For PEFT under ZeRO-3, `DPOTrainer` sets 'use_reentrant': True in the dict that `Trainer` reads."""
    construct = trl.DPOTrainer.__init__

    def construct_as_under_zero_3(self, *args, **kwargs):
        construct(self, *args, **kwargs)
        self.args.gradient_checkpointing_kwargs["use_reentrant"] = True

    monkeypatch.setattr(trl.DPOTrainer, "__init__", construct_as_under_zero_3)
    for wanted in ({"use_reentrant": False}, {"every_n_layers": 1}):
        settings = {"activation_checkpointing": True, "activation_checkpointing_kwargs": dict(wanted)}
        trainer = build(
            model_dir, tokenizer, {**config_kwargs, **settings}, peft_config=LORA, max_completions_per_forward=3
        )
        assert trainer.args.activation_checkpointing_kwargs == wanted
        assert trainer.args.gradient_checkpointing_kwargs == wanted
    settings["activation_checkpointing_kwargs"] = {"use_reentrant": False}
    trainer = build(model_dir, tokenizer, {**config_kwargs, **settings}, peft_config=LORA)
    assert trainer.args.activation_checkpointing_kwargs["use_reentrant"], "TRL's way, where no parts are run"

    settings["activation_checkpointing_kwargs"] = {"use_reentrant": False}
    args = RRHFConfig(**{**config_kwargs, **settings}, max_completions_per_forward=3)
    args.activation_checkpointing_kwargs["use_reentrant"] = True  # changed afterwards
    with pytest.raises(ValueError, match="each part would run a backward pass"):
        RRHFTrainer(model_dir, args=args, train_dataset=Dataset.from_list(LISTS), processing_class=tokenizer)


# Memory


@pytest.fixture(scope="module")
def deep_model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("deep")
    return str(save_byte_level_model(directory, hidden_size=32, num_layers=8, max_position_embeddings=512))


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, as long as they live."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, result)
        return result

    def _count(self, tensor):
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        size = self._seen[storage] = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size):
        self.now -= size


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("prefix_sharing", [False, True])
def test_memory_does_not_grow_with_the_number_of_completions(
    prefix_sharing, checkpointing, deep_model_dir, tokenizer, config_kwargs, monkeypatch
):
    # the LM head's buffer for logits, of constant size for long batches, would outweigh this small model
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 16)
    config_kwargs.update(prefix_sharing=prefix_sharing, activation_checkpointing=checkpointing)
    peaks = {}
    for num_completions in (4, 16):
        completions = [f"{n:02}{' answer' * 8}" for n in range(num_completions)]
        rows = [{"prompt": "p" * 40, "completions": completions, "scores": [float(n) for n in range(num_completions)]}]
        for most in (None, 2):
            trainer = build(deep_model_dir, tokenizer, config_kwargs, rows=rows, max_completions_per_forward=most)
            trainer.model.train()
            if checkpointing:
                trainer.model.activation_checkpointing_enable()
            batch = one_batch(trainer)
            trainer.compute_loss(trainer.model, batch).backward()  # from here on there are gradients, before and after
            gc.collect()
            with PeakMemory() as memory:
                trainer.compute_loss(trainer.model, batch).backward()
            peaks[num_completions, most] = memory.peak
    print(peaks)
    assert peaks[16, None] > 2.5 * peaks[4, None]
    # measured: 1.04 and 1.06, and 1.19 and 1.29 with activation checkpointing
    assert peaks[16, 2] < (1.35 if checkpointing else 1.1) * peaks[4, 2]
    assert peaks[16, 2] < (0.35 if checkpointing else 0.2) * peaks[16, None]


# Refusals


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (RRHFConfig, {"max_completions_per_forward": 0}, r"`max_completions_per_forward` must be at least 1, got 0"),
        (RRHFConfig, {"max_completions_per_forward": -3}, r"must be at least 1, got -3"),
        (RRHFConfig, {"max_completions_per_forward": 2, "torch_compile": True}, r"`torch_compile` must be False"),
        (
            RRHFConfig,
            {
                "max_completions_per_forward": 2,
                "activation_checkpointing": True,
                "activation_checkpointing_kwargs": {"use_reentrant": True},
            },
            r"'use_reentrant' of .* must be False .* each part would run a backward pass",
        ),
        (
            SLiCConfig,
            {"max_completions_per_forward": 2, "reg_type": "kl"},
            r"with reg_type='kl', got 2",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(config, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(str(tmp_path), bf16=False, **settings)


@pytest.mark.parametrize("how", ["name", "object"])
def test_a_balancing_loss_is_refused_before_any_weight_is_loaded(how, tokenizer, config_kwargs):
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.01,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    if how == "name":
        model.save_pretrained(config_kwargs["output_dir"])
        model = config_kwargs["output_dir"]
    kwargs = {**config_kwargs, "max_completions_per_forward": 2}
    with pytest.raises(NotImplementedError, match="balancing loss .* Remove it, or set router_aux_loss_coef=0"):
        build(model, tokenizer, kwargs)
    trainer = build(model, tokenizer, kwargs, router_aux_loss_coef=0.0)
    whole = build(copy_of(trainer.model), tokenizer, config_kwargs, router_aux_loss_coef=0.0)
    batch = one_batch(trainer)
    found = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(found, whole.compute_loss(whole.model, batch), rtol=1e-5, atol=1e-5)


def test_adapters_that_do_more_than_change_weights_are_refused(model_dir, tokenizer, config_kwargs):
    adapter = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with counting() as counts, pytest.raises(NotImplementedError, match="PROMPT_TUNING adapters add tokens .* LoRA"):
        build(model_dir, tokenizer, config_kwargs, peft_config=adapter, max_completions_per_forward=2)
    assert counts["models"] == 0
