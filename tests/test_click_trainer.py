"""CLICKTrainer against the slow reference."""

import pytest
import torch
from datasets import Dataset

from tests import reference
from tests.test_slic_trainer import assert_same_gradients, one_batch
from trl_ext import CLICKConfig, CLICKTrainer, losses

ROWS = [
    {"prompt": "a? ", "completions": ["x", "yy", "zzz"], "scores": [0.0, 1.0, 0.0], "reference": "the task"},
    {"prompt": "bb? ", "completions": ["one", "two"], "scores": [1.0, 0.0], "reference": "one"},
    {"prompt": "c ", "completions": ["p", "qq"], "scores": [1.0, 1.0], "reference": "both are good"},
    {"prompt": "dd ", "completions": ["alone"], "scores": [1.0], "reference": "no sample"},
]


def build(model, tokenizer, config_kwargs, rows=ROWS, **settings):
    return CLICKTrainer(
        model=model,
        args=CLICKConfig(**{**config_kwargs, **settings}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("settings", [{}, {"margin": 3.0, "pair_weight": 2.0}, {"pair_weight": 0.0}], ids=str)
@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_loss_and_gradients_equal_the_slow_reference(model, tokenizer, config_kwargs, settings, prefix_sharing):
    trainer = build(model, tokenizer, config_kwargs, prefix_sharing=prefix_sharing, **settings)
    slow = type(model)(model.config)
    slow.load_state_dict(model.state_dict())
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
        assert log["loss"] == pytest.approx(log["loss/lm"] + 0.3 * log["loss/pair"], rel=1e-4)
    for part in ("loss/lm", "loss/pair"):  # two steps are an epoch
        assert sum(log[part] for log in logs[-2:]) < 0.5 * sum(log[part] for log in logs[:2])
    assert any("hinge/active" in log and "lengths/reference" in log and "logps/rejected" in log for log in logs)


def test_best_candidate_stands_in_for_a_missing_target(model, tokenizer, config_kwargs):
    rows = [{key: value for key, value in row.items() if key != "reference"} for row in ROWS]
    prepared = build(model, tokenizer, config_kwargs, rows).train_dataset
    assert [row["reference_index"] for row in prepared] == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"margin": 0.0}, "margin=0.0 is no margin"),
        ({"pair_weight": -1.0}, "pair_weight=-1.0 would prefer the negatives"),
        ({"beta": 0.2}, "beta=0.2: set `margin`, in nats"),
    ],
)
def test_settings_that_cannot_be_honoured(config_kwargs, settings, message):
    with pytest.raises(ValueError, match=message):
        CLICKConfig(**config_kwargs, **settings)
