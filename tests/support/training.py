"""Trainings in a test: copies of a model, what they log, and two of them compared within what rounding explains."""

from collections import Counter
from contextlib import contextmanager

import torch
from transformers import TrainerCallback

from trl_ext import CandidateCollator
from trl_ext.data import limits
from trl_ext.trainers import adapter_checks
from trl_ext.trainers.reference import ReferenceCollator

# Adam divides a gradient by its own size, so that where terms nearly cancel a weight moves by their rounding, which is
# another on each processor. SGD moves in proportion to the gradients; clipping would hide an error in their size.
SGD = {"optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0.0}


def assert_same_movement(found, expected, start, share=1e-5):
    """Flat weights `found` and `expected` differ by at most `share` of the largest movement away from `start`."""
    moved, off = (expected - start).abs().max(), (found - expected).abs().max()
    print(f"moved by {moved:.2g}, off by {off / moved:.2g} of it")
    assert moved > 1e-3
    assert off <= share * moved


def one_batch(trainer, **collator_kwargs):
    collator = CandidateCollator(trainer.processing_class.pad_token_id, **collator_kwargs)
    if isinstance(trainer.data_collator, ReferenceCollator):
        collator = ReferenceCollator(collator)
    return collator(list(trainer.train_dataset))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model, other, tolerance=1e-4):
    """Up to `tolerance` of the largest of all gradients."""
    ours, theirs = gradients(model), gradients(other)
    assert set(ours) == set(theirs)
    largest = max(gradient.abs().max() for gradient in theirs.values())
    assert largest > 1e-2
    for name, gradient in theirs.items():
        difference = (ours[name] - gradient).abs().max()
        assert difference <= tolerance * largest, f"{name}: {difference / largest:.2g} of the largest gradient"


def copy_of(model):
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


def perturbed(model, scale=0.02, seed=1):
    """A copy whose weights differ a little, to play the fine-tuned model."""
    copy = copy_of(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return copy.requires_grad_(False).eval()


def move(model, scale=0.02):
    """Change the weights of a model in place, as training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


class Losses(TrainerCallback):
    """What was logged, step by step."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({**logs, "step": state.global_step})

    def series(self, name="loss"):
        return [log[name] for log in self.logs if "loss" in log]


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@contextmanager
def counting():
    """Count models made and forward calls of whole causal LMs, whoever makes them, and the padded rows in them."""
    from transformers import LlamaForCausalLM, LlamaModel

    counts = Counter()
    init, forward = LlamaForCausalLM.__init__, LlamaModel.forward

    def counted_init(self, *args, **kwargs):
        counts["models"] += 1
        init(self, *args, **kwargs)

    def counted_forward(self, *args, **kwargs):
        counts["forwards"] += 1
        counts["rows"] += len(kwargs["input_ids"])
        return forward(self, *args, **kwargs)

    def uncounted(*args):  # modules without weights
        before = counts["models"]
        found = without_weights(*args)
        counts["models"] = before
        return found

    without_weights = limits.without_weights
    LlamaForCausalLM.__init__, LlamaModel.forward = counted_init, counted_forward
    limits.without_weights = adapter_checks.without_weights = uncounted
    try:
        yield counts
    finally:
        LlamaForCausalLM.__init__, LlamaModel.forward = init, forward
        limits.without_weights = adapter_checks.without_weights = without_weights
