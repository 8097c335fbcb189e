"""SLiCTrainer against the slow reference, and as its users use it."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import MixtralConfig, MixtralForCausalLM

from tests.support import methods, reference
from tests.support.data import REFERENCES
from tests.support.training import (
    Losses,
    assert_same_gradients,
    copy_of,
    gradients,
    one_batch,
    perturbed,
    weights,
)
from trl_ext.methods.slic.config import CALIBRATIONS

build = partial(methods.build, "slic")
run = partial(methods.run, "slic")
BF16_LOSS, BF16_GRADIENT = 0.001, 0.07  # measured: at most 0.00033 and 0.033


def dataset_of(form, pairs, chat_pairs, ranked):
    if form == "ranked":
        return ranked
    rows = {"plain": pairs, "chat": chat_pairs}[form.removesuffix("+reference")]
    rows = rows.add_column("score_chosen", [1.0 - 0.1 * i for i in range(len(rows))])
    rows = rows.add_column("score_rejected", [-0.5 + 0.05 * i for i in range(len(rows))])
    if form.endswith("+reference"):
        answers = REFERENCES
        if form.startswith("chat"):
            answers = [[{"role": "assistant", "content": text}] for text in answers]
        rows = rows.add_column("reference", answers)
    return rows


FORMS = ["plain", "plain+reference", "chat", "chat+reference", "ranked"]
REGULARISERS = ["cross_entropy", "kl"]


@pytest.mark.parametrize(
    ("calibration", "reg_type", "form"),
    [  # any two values meet
        (calibration, REGULARISERS[(row + column) % 2], form)
        for row, calibration in enumerate(CALIBRATIONS)
        for column, form in enumerate(FORMS)
    ],
)
def test_compute_loss_equals_slow_reference(
    calibration, reg_type, form, model, tokenizer, pairs, chat_pairs, ranked, config_kwargs
):
    rows = dataset_of(form, pairs, chat_pairs, ranked)
    frozen = perturbed(model) if reg_type == "kl" else None
    settings = {} if calibration == "expected_reward" else {"delta": 3.0}
    trainer = build(
        model, tokenizer, rows, config_kwargs,
        calibration=calibration, reg_type=reg_type, reg_weight=0.3, ref_model=frozen, **settings,
    )  # fmt: skip
    batch = one_batch(trainer)
    if form.endswith("+reference"):
        num_rows, num_candidates = len(batch["input_ids"]), (batch["candidate_index"] >= 0).sum()
        assert num_candidates < num_rows, "some targets are rows of their own"
        if form == "plain+reference":
            assert num_rows < num_candidates + len(rows), "and some are candidates, not computed twice"

    slow_model = copy_of(model)
    slow = reference.slic_loss(
        slow_model, list(trainer.train_dataset),
        calibration=calibration, delta=3.0, reg_weight=0.3, reference_model=frozen,
    )  # fmt: skip
    fast = trainer.compute_loss(trainer.model, batch)
    slow.backward()
    fast.backward()
    assert slow.abs() > 1e-2
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    assert_same_gradients(trainer.model, slow_model)


@pytest.mark.parametrize("reg_type", ["cross_entropy", "kl"])
def test_averaged_likelihoods_equal_slow_reference(reg_type, model, tokenizer, pairs, config_kwargs):
    frozen = perturbed(model) if reg_type == "kl" else None
    trainer = build(
        model, tokenizer, pairs, config_kwargs, logps_reduction="mean", reg_type=reg_type, ref_model=frozen
    )
    slow = reference.slic_loss(
        model, list(trainer.train_dataset),
        calibration="rank", delta=1.0, reg_weight=0.1, reduction="mean", reference_model=frozen,
    )  # fmt: skip
    torch.testing.assert_close(trainer.compute_loss(trainer.model, one_batch(trainer)), slow, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reg_type", ["cross_entropy", "kl"])
@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_bfloat16_autocast_stays_close(
    calibration, reg_type, model, tokenizer, pairs, chat_pairs, ranked, config_kwargs
):
    """
    bf16 keeps 8 bits of a number: 0.4 % of each activation. The bound on both parts of the loss is BF16_LOSS of the
    largest |S| of the batch, on gradients BF16_GRADIENT of their norm.
    """
    rows = dataset_of("ranked" if calibration != "rank" else "plain+reference", pairs, chat_pairs, ranked)
    frozen = perturbed(model, scale=0.1) if reg_type == "kl" else None
    trainer = build(
        model,
        tokenizer,
        rows,
        config_kwargs,
        calibration=calibration,
        reg_type=reg_type,
        reg_weight=1.0,
        ref_model=frozen,
    )
    batch = one_batch(trainer)
    parts, norms = [], []
    for half in (False, True):
        trainer.model.zero_grad()
        captured = {}
        original = trainer.loss_from_logps

        def keep(*args, captured=captured, original=original):
            losses, metrics = original(*args)
            captured.update(metrics)
            return losses, metrics

        trainer.loss_from_logps = keep
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = trainer.compute_loss(trainer.model, batch)
        trainer.loss_from_logps = original
        loss.backward()
        parts.append([captured[f"loss/{part}"].detach().mean().item() for part in ("calibration", "regularization")])
        norms.append(torch.cat([g.flatten() for g in gradients(trainer.model).values()]))
    (exact, rough), (exact_gradient, rough_gradient) = parts, norms
    examples = [(row["prompt_ids"], ids) for row in trainer.train_dataset for ids in row["completion_ids"]]
    largest = max(abs(reference.sequence_logp(model, *example).item()) for example in examples)
    assert rough != exact, "autocast was not active"
    for one, other in zip(exact, rough, strict=True):
        assert abs(one - other) < BF16_LOSS * largest
    assert (rough_gradient - exact_gradient).norm() < BF16_GRADIENT * exact_gradient.norm()


def test_scores_are_not_rounded_under_deepspeed(model, tokenizer, ranked, config_kwargs):
    """`Trainer` would cast what is floating in a batch to the model's dtype, and bfloat16 has three digits."""
    trainer = build(model, tokenizer, ranked, config_kwargs)
    batch = one_batch(trainer)
    batch["scores"][:, 0] = batch["scores"][:, 1] + 1e-6
    assert (batch["scores"][:, 0].bfloat16() == batch["scores"][:, 1].bfloat16()).all()
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    trainer.is_deepspeed_enabled = True
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    prepared = trainer._prepare_inputs(batch)
    assert {name: tensor.dtype for name, tensor in prepared.items()} == {n: t.dtype for n, t in batch.items()}
    assert torch.equal(prepared["scores"], batch["scores"])


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("peft", [True, False])
def test_every_parameter_moves_and_the_loss_falls(peft, checkpointing, model_dir, tokenizer, pairs, config_kwargs):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM") if peft else None
    kwargs = {**config_kwargs, "learning_rate": 1e-2, "activation_checkpointing": checkpointing}
    losses = Losses()
    trainer = build(model_dir, tokenizer, pairs, kwargs, peft_config=lora, num_train_epochs=4, callbacks=[losses])
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        if name in before:
            assert not torch.equal(parameter, before[name]), f"{name} did not move"
    series = losses.series()
    assert series[-1] < 0.8 * series[0]


def test_checkpointing_does_not_change_the_numbers(model_dir, tokenizer, pairs, config_kwargs):
    plain, _ = run(model_dir, tokenizer, pairs, config_kwargs)
    saving, _ = run(model_dir, tokenizer, pairs, {**config_kwargs, "activation_checkpointing": True})
    assert saving.args.activation_checkpointing and saving.model.is_gradient_checkpointing
    torch.testing.assert_close(weights(saving), weights(plain), rtol=1e-5, atol=1e-6)


def test_logged_metrics_are_the_plain_averages(model, tokenizer, ranked, config_kwargs):
    """Against a loop over prompts, with ragged lists and a smaller last batch."""
    trainer = build(model, tokenizer, ranked, config_kwargs, eval_dataset=ranked, per_device_eval_batch_size=3)
    logged = trainer.evaluate()
    rows = list(trainer.train_dataset)
    sums = [[reference.sequence_logp(model, r["prompt_ids"], ids).item() for ids in r["completion_ids"]] for r in rows]
    gaps = [
        s[i] - s[j]
        for row, s in zip(rows, sums, strict=True)
        for i in range(len(s))
        for j in range(len(s))
        if row["scores"][i] > row["scores"][j]
    ]
    best = [row["scores"].index(max(row["scores"])) for row in rows]
    worst = [len(r["scores"]) - 1 - r["scores"][::-1].index(min(r["scores"])) for r in rows]

    ordered = [min(r["scores"]) < max(r["scores"]) for r in rows]  # else none is the rejected one

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    assert not all(ordered)
    calibrations = [
        reference.rank_loss(torch.tensor(s), r["scores"], 1.0).item() for r, s in zip(rows, sums, strict=True)
    ]
    expected = {
        "loss/calibration": mean(calibrations),
        "loss/regularization": mean(-s[b] for s, b in zip(sums, best, strict=True)),
        "loss": mean(c - 0.1 * s[b] for c, s, b in zip(calibrations, sums, best, strict=True)),
        "rewards/margins": mean(gaps),
        "rewards/accuracies": mean(gap > 0 for gap in gaps),
        "hinge/active": mean(gap < 1 for gap in gaps),
        "logps/chosen": mean(s[b] for s, b in zip(sums, best, strict=True)),
        "logps/rejected": mean(s[w] for s, w, o in zip(sums, worst, ordered, strict=True) if o),
        "logps/reference": mean(s[b] for s, b in zip(sums, best, strict=True)),
        "lengths/chosen": mean(len(r["completion_ids"][b]) for r, b in zip(rows, best, strict=True)),
        "lengths/rejected": mean(
            len(r["completion_ids"][w]) for r, w, o in zip(rows, worst, ordered, strict=True) if o
        ),
        "lengths/reference": mean(len(r["completion_ids"][b]) for r, b in zip(rows, best, strict=True)),
    }
    for name, value in expected.items():
        assert logged[f"eval_{name}"] == pytest.approx(value, rel=1e-4), name
    for name in ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"):
        assert f"eval_{name}" in logged


def test_several_eval_sets_have_metrics_of_their_own(model, tokenizer, pairs, ranked, config_kwargs):
    trainer = build(model, tokenizer, pairs, config_kwargs, eval_dataset={"pairs": pairs, "lists": ranked})
    metrics = trainer.evaluate()
    assert metrics["eval_pairs_logps/chosen"] != metrics["eval_lists_logps/chosen"]
    alone = trainer.evaluate(eval_dataset=ranked)
    assert alone["eval_logps/chosen"] == pytest.approx(metrics["eval_lists_logps/chosen"])
    trainer.predict(trainer.train_dataset)
    assert trainer.evaluate(eval_dataset=ranked)["eval_logps/chosen"] == pytest.approx(alone["eval_logps/chosen"])


def test_evaluation_during_training_and_best_checkpoint(model_dir, tokenizer, pairs, config_kwargs):
    kwargs = {
        **config_kwargs, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_rewards/accuracies", "learning_rate": 1e-2,
    }  # fmt: skip
    trainer, losses = run(model_dir, tokenizer, pairs, kwargs, eval_dataset=pairs)
    evals = [log for log in losses.logs if "eval_loss" in log]
    assert len(evals) == 2 and all("eval_loss/calibration" in log for log in evals)
    assert trainer.state.best_metric == max(log["eval_rewards/accuracies"] for log in evals)


def test_evaluating_a_stream_gives_the_numbers_of_a_list(model, tokenizer, pairs, ranked, config_kwargs):
    """5 rows in batches of 4: the last batch is short, and Trainer's own mean would count it as whole."""
    rows = [*ranked, {**ranked[0], "prompt": "again "}]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = build(model, tokenizer, pairs, config_kwargs, eval_dataset=stream, per_device_eval_batch_size=4)
    streamed, listed = trainer.evaluate(), trainer.evaluate(Dataset.from_list(rows))
    predicted = trainer.predict(Dataset.from_list(rows)).metrics
    for name in ("loss", "loss/calibration", "logps/chosen", "hinge/active"):
        assert streamed[f"eval_{name}"] == pytest.approx(listed[f"eval_{name}"], rel=1e-5), name
        assert predicted[f"test_{name}"] == pytest.approx(listed[f"eval_{name}"], rel=1e-5), name
    assert trainer.evaluate(stream)["eval_loss"] == streamed["eval_loss"]


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_resumed_run_equals_the_uninterrupted_one(logging_steps, model_dir, tokenizer, pairs, config_kwargs, tmp_path):
    kwargs = {
        **config_kwargs, "save_strategy": "steps", "save_steps": 3, "num_train_epochs": 3,
        "logging_steps": logging_steps, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1,
    }  # fmt: skip
    whole, whole_losses = run(model_dir, tokenizer, pairs, kwargs)
    assert whole.state.global_step == 12
    losses = Losses()
    resumed = build(model_dir, tokenizer, pairs, {**kwargs, "output_dir": str(tmp_path / "again")}, callbacks=[losses])
    resumed.train(resume_from_checkpoint=str(Path(kwargs["output_dir"]) / "checkpoint-6"))
    after = [log for log in whole_losses.logs if "loss" in log and log["step"] > 6]
    resumed_logs = [log for log in losses.logs if "loss" in log]
    assert [log["step"] for log in resumed_logs] == [log["step"] for log in after]
    for name in ("loss", "loss/calibration", "logps/rejected", "num_tokens"):
        assert [log[name] for log in resumed_logs] == pytest.approx([log[name] for log in after], rel=1e-6)
    assert torch.equal(weights(resumed), weights(whole))


def test_saved_model_loads_and_agrees(model_dir, tokenizer, pairs, config_kwargs):
    trainer, _ = run(model_dir, tokenizer, pairs, config_kwargs)
    trainer.save_model()
    batch = one_batch(trainer)
    loaded = build(config_kwargs["output_dir"], None, pairs, config_kwargs)
    trainer.model.eval()
    torch.testing.assert_close(
        loaded.compute_loss(loaded.model, batch), trainer.compute_loss(trainer.model, batch), rtol=1e-6, atol=1e-6
    )


def test_balancing_loss_of_a_mixture_of_experts_is_added_once(tokenizer, pairs, config_kwargs):
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    model.save_pretrained(config_kwargs["output_dir"])
    values = {}
    for coefficient in (0.0, 0.5):
        model = MixtralForCausalLM.from_pretrained(config_kwargs["output_dir"])
        trainer = build(model, tokenizer, pairs, config_kwargs, router_aux_loss_coef=coefficient, eval_dataset=pairs)
        batch = one_batch(trainer)
        whole = trainer.compute_loss(trainer.model, batch).item()
        halves = [trainer.data_collator(list(trainer.train_dataset)[part]) for part in (slice(0, 4), slice(4, 8))]
        parts = [
            trainer.compute_loss(trainer.model, half, num_items_in_batch=torch.tensor(8)).item() for half in halves
        ]
        values[coefficient] = whole, sum(parts), trainer.evaluate()
    aux_loss = values[0.5][2]["eval_aux_loss"]
    assert aux_loss > 0.5 and "eval_aux_loss" not in values[0.0][2]
    assert values[0.5][0] - values[0.0][0] == pytest.approx(0.5 * aux_loss, rel=1e-3)
    assert values[0.5][1] - values[0.0][1] == pytest.approx(0.5 * aux_loss, rel=0.05)
    assert values[0.0][0] == pytest.approx(values[0.0][1], rel=1e-5)
