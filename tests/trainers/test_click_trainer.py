"""CLICKTrainer against the slow reference."""

import pytest
import torch
from datasets import Dataset

from tests.support import reference
from tests.support.training import (
    assert_same_gradients,
    copy_of,
    gradients,
    one_batch,
)
from trl_ext import CLICKConfig, CLICKTrainer, losses

ROWS = [
    {"prompt": "a? ", "completions": ["x", "yy", "zzz"], "scores": [0.0, 1.0, 0.0], "reference": "the task"},
    {"prompt": "bb? ", "completions": ["one", "two"], "scores": [1.0, 0.0], "reference": "one"},
    {"prompt": "c ", "completions": ["p", "qq"], "scores": [1.0, 1.0], "reference": "both are good"},
    {"prompt": "dd ", "completions": ["alone"], "scores": [1.0], "reference": "no sample"},
]


def build(model, tokenizer, config_kwargs, rows=ROWS, callbacks=None, eval_rows=None, **settings):
    return CLICKTrainer(
        callbacks=callbacks,
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        model=model,
        args=CLICKConfig(**{**config_kwargs, **settings}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("settings", [{}, {"margin": 3.0, "pair_weight": 2.0}, {"pair_weight": 0.0}], ids=str)
def test_loss_and_gradients_equal_the_slow_reference(model, tokenizer, config_kwargs, settings):
    trainer = build(model, tokenizer, config_kwargs, **settings)
    slow = copy_of(model)
    weights = {"margin": 15.0, "pair_weight": 0.3, **settings}
    expected = reference.click_loss(slow, list(trainer.train_dataset), **weights)
    expected.backward()
    loss = trainer.compute_loss(trainer.model, one_batch(trainer))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(trainer.model, slow)


def test_loss_by_hand():
    """S+ = -10, S- = -9 and a margin of 15 are 16 inside; 0.5 per token beside it."""
    mask, scores = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[1.0, 0.0]])
    pair = losses.slic_rank_loss(torch.tensor([[-10.0, -9.0]]), scores, mask, delta=15.0)
    assert losses.click_loss(pair, torch.tensor([0.5]), pair_weight=0.1).item() == pytest.approx(2.1)


def test_a_pair_beyond_the_margin_leaves_the_task_alone(model, tokenizer, config_kwargs):
    trainer = build(model, tokenizer, config_kwargs, margin=1e-6, pair_weight=5.0)
    batch = one_batch(trainer)
    with torch.no_grad():
        for row, rows in enumerate(batch["candidate_index"]):  # turn every pair into the order the model has
            found = trainer.forward_batch(trainer.model, batch).log_probs.sum(dim=1)[rows.clamp(min=0)]
            batch["scores"][row] = torch.where(rows >= 0, found, batch["scores"][row])
    only_lm = build(model, tokenizer, config_kwargs, pair_weight=0.0)
    torch.testing.assert_close(
        trainer.compute_loss(trainer.model, batch), only_lm.compute_loss(only_lm.model, one_batch(only_lm))
    )


def test_trains_without_a_reference_model_and_logs_its_parts(model, tokenizer, config_kwargs):
    trainer = build(model, tokenizer, config_kwargs, num_train_epochs=20, learning_rate=3e-3)
    assert trainer.ref_model is None
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    for log in logs:
        # a step without a pair has nothing to say about pairs
        assert log["loss"] == pytest.approx(log["loss/lm"] + 0.3 * log.get("loss/pair", 0.0), rel=1e-4)
    for part in ("loss/lm", "loss/pair"):  # two steps are an epoch
        start, end = ([log[part] for log in some if part in log] for some in (logs[:2], logs[-2:]))
        assert sum(end) / len(end) < 0.5 * sum(start) / len(start)
    assert any("hinge/active" in log and "lengths/reference" in log and "logps/rejected" in log for log in logs)


def test_task_data_without_samples_does_not_dilute_the_pairs(model, tokenizer, config_kwargs):
    """What the hinge does to the weights is the same with and without rows of the task beside the pairs."""
    found = []
    for rows in (ROWS[:2], [*ROWS[:2], *({**ROWS[3], "prompt": f"{n} "} for n in range(6))]):
        parts = []
        for pair_weight in (0.3, 0.0):
            trainer = build(copy_of(model), tokenizer, config_kwargs, rows, pair_weight=pair_weight)
            trainer.compute_loss(trainer.model, one_batch(trainer)).backward()
            parts.append(gradients(trainer.model))
        found.append({name: parts[0][name] - parts[1][name] for name in parts[0]})
    assert max(gradient.abs().max() for gradient in found[0].values()) > 1e-2
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


def without_reference(row):
    return {key: value for key, value in row.items() if key != "reference"}


def test_best_candidate_stands_in_for_a_missing_target(model, tokenizer, config_kwargs):
    rows = [without_reference(ROWS[index]) for index in (0, 1, 3)]
    trainer = build(model, tokenizer, config_kwargs, rows)
    assert [row["target_index"] for row in trainer.train_dataset] == [1, 0, 0]
    assert trainer.data_reports["train"].num_reference_missing == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completions": ["bad", "worse"], "scores": [0.0, 0.0]}, "and no candidate is better than another. Add a"),
        ({"completions": ["good", "nice"], "scores": [1.0, 1.0]}, "and no candidate is better than another"),
        ({"completions": ["bad"], "scores": [0.0]}, "the only candidate scores 0.0"),
    ],
)
def test_a_sample_that_may_be_bad_is_no_target(row, message, model, tokenizer, config_kwargs):
    rows = [{"prompt": "e ", **row}, without_reference(ROWS[0])]
    with pytest.raises(ValueError, match=f"row 0: column 'reference' .*{message}"):
        build(model, tokenizer, config_kwargs, rows)
    trainer = build(model, tokenizer, config_kwargs, rows, on_invalid_row="drop")
    assert len(trainer.train_dataset) == 1 and trainer.data_reports["train"].dropped == {"no target": 1}
    kept = build(model, tokenizer, config_kwargs, [{**row, "reference": "the task"} for row in rows])
    assert len(kept.train_dataset) == 2 and kept.data_reports["train"].num_reference_missing == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"margin": 0.0}, "`margin` must be above 0, got 0.0"),
        ({"pair_weight": -1.0}, "`pair_weight` must be 0 .*got -1.0: a negative weight prefers"),
        ({"pair_weight": 0.0, "margin": 5.0}, "`margin` must be 15.0, its default, with pair_weight=0, got 5.0"),
        ({"beta": 0.2}, "beta=0.2: set `margin`, in nats"),
    ],
)
def test_settings_that_cannot_be_honoured(config_kwargs, settings, message):
    with pytest.raises(ValueError, match=message):
        CLICKConfig(**config_kwargs, **settings)
