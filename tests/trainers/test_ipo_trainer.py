"""IPO against a slow loop over plain logits, and against TRL's."""

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset

from tests.support.data import PAIRS
from tests.support.reference import sequence_logp
from trl_ext import IPOConfig, IPOTrainer
from trl_ext.losses import ipo_loss


def slow_loss(model, reference, rows, beta, log_ratios):
    """One prompt, one pair, one sequence at a time."""
    losses = []
    for row in rows:
        ratios = []
        for ids in row["completion_ids"]:
            ratio = sequence_logp(model, row["prompt_ids"], ids) - sequence_logp(reference, row["prompt_ids"], ids)
            ratios.append(ratio / len(ids) if log_ratios == "mean" else ratio)
        scores = row["scores"]
        errors = [
            (ratios[i] - ratios[j] - 1 / (2 * beta)) ** 2
            for i in range(len(scores))
            for j in range(len(scores))
            if scores[i] > scores[j]
        ]
        losses.append(sum(errors) / len(errors) if errors else torch.zeros(()))
    return sum(losses) / len(losses)


def moved(model, size=0.02):
    """The model after a step of sorts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def test_the_loss_as_it_is_written():
    ratios = torch.tensor([[3.0, 1.0, 9.0], [0.0, 4.0, 2.0]], requires_grad=True)
    scores = torch.tensor([[1.0, 0.0, 5.0], [1.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    losses = ipo_loss(ratios, scores, mask, beta=0.25)  # a target of 2
    assert losses.tolist() == pytest.approx([0.0, ((0 - 2 - 2) ** 2 + (4 - 2 - 2) ** 2) / 2])
    losses.sum().backward()
    assert ratios.grad[0].tolist() == [0.0, 0.0, 0.0] and ratios.grad[1, 0] < 0
    beyond = ipo_loss(torch.tensor([[5.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.ones(1, 2).bool(), beta=0.25)
    assert beyond.item() == 9.0, "what is beyond the target is pulled back"


@pytest.mark.parametrize("log_ratios", ["mean", "sum"])
@pytest.mark.parametrize("rows", ["pairs", "chat_pairs", "ranked"])
def test_against_plain_logits(rows, log_ratios, model, tokenizer, config_kwargs, request):
    from copy import deepcopy

    reference = deepcopy(model).eval()
    args = IPOConfig(**config_kwargs, beta=0.2, log_ratios=log_ratios)
    dataset = request.getfixturevalue(rows)
    trainer = IPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer._checks_first_loss = False  # the weights are moved behind its back
    moved(trainer.model)
    prepared = [trainer.train_dataset[index] for index in range(4)]
    batch = trainer.data_collator(prepared)
    loss = trainer.compute_loss(trainer.model, batch)
    expected = slow_loss(trainer.model, reference, prepared, 0.2, log_ratios)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    for found, wanted in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


def test_means_are_those_of_trl(model_dir, config_kwargs, pairs):
    def logged(trainer, *names):
        trainer.train()
        return [[entry[name] for name in names] for entry in trainer.state.log_history if names[0] in entry]

    kwargs = {**config_kwargs, "num_train_epochs": 2, "beta": 0.3}
    ours = IPOTrainer(model_dir, args=IPOConfig(**kwargs), train_dataset=pairs)
    theirs = trl.DPOTrainer(model_dir, args=trl.DPOConfig(**kwargs, loss_type="ipo"), train_dataset=pairs)
    names = ("loss", "logps/chosen", "logps/rejected")
    assert logged(ours, *names) == [pytest.approx(row, rel=1e-4) for row in logged(theirs, *names)]


def test_the_first_loss_is_that_of_the_reference(model_dir, config_kwargs, pairs):
    trainer = IPOTrainer(model_dir, args=IPOConfig(**config_kwargs, beta=0.5, log_ratios="sum"), train_dataset=pairs)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(1.0, abs=1e-4)
    assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    trainer = IPOTrainer(model_dir, args=IPOConfig(**config_kwargs, beta=0.5), train_dataset=pairs)
    moved(trainer.model)
    with pytest.raises(RuntimeError, match=r"where 1 / \(2 beta\)\^2 = 1.0000 is right"):
        trainer.train()


def test_another_reference(model_dir, model, tokenizer, config_kwargs, pairs, tmp_path):
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    args = IPOConfig(**config_kwargs, log_ratios="sum")
    trainer = IPOTrainer(model_dir, ref_model=str(tmp_path / "other"), args=args, train_dataset=pairs)
    prepared = [trainer.train_dataset[index] for index in range(2)]
    expected = slow_loss(trainer.model, model.eval(), prepared, 0.1, "sum")
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(prepared))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert trainer.ref_model is None, "it has been let go"


def test_what_cannot_be_is_refused(model_dir, config_kwargs, pairs):
    for settings, message in (
        ({"beta": 0.0}, "`beta` must be above 0, got 0.0"),
        ({"log_ratios": "median"}, "`log_ratios` must be one of .*got 'median'"),
        ({"loss_type": ["ipo"]}, "set `log_ratios`"),
        ({"precompute_ref_batch_size": 0}, "`precompute_ref_batch_size` must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            IPOConfig(**config_kwargs, **settings)
    stream = IterableDataset.from_generator(lambda: iter(PAIRS))
    for data in ({"train_dataset": stream}, {"train_dataset": pairs, "eval_dataset": {"one": stream}}):
        with pytest.raises(NotImplementedError, match="must be a `Dataset` for IPOTrainer, got a stream"):
            IPOTrainer(model_dir, args=IPOConfig(**config_kwargs), **data)
    with pytest.raises(ValueError, match="1 of 1 rows that cannot be used"):
        rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "b"}])
        IPOTrainer(model_dir, args=IPOConfig(**config_kwargs), train_dataset=rows)
