"""Two runs of training that have to be the same: every logged number and every weight."""

import pytest
import torch

NOT_RESULTS = ("runtime", "per_second", "flos", "step_time")


def history(trainer):
    return [
        {k: v for k, v in entry.items() if not any(word in k for word in NOT_RESULTS)}
        for entry in trainer.state.log_history
    ]


def remember(trainer):
    """Keep the weights as they are before training."""
    trainer.initial = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same_run(expected, found, *, tolerance=1e-5):
    """Every logged number and every weight of two finished runs."""
    a, b = history(expected), history(found)
    assert [list(entry) for entry in a] == [list(entry) for entry in b] and len(a) > 2
    for entry_a, entry_b in zip(a, b, strict=True):
        for name, value in entry_a.items():
            if name.endswith("accuracies") and abs(entry_a[name.replace("accuracies", "margins")]) < 1e-4:
                continue  # before the first step all rewards are 0 up to rounding, and so is which of them is larger
            # a difference of large numbers is as exact as those are, and a loss or a gradient made of differences too
            is_difference = not any(word in name for word in ("logps", "entropy", "num_tokens", "accurac", "lengths"))
            assert entry_b[name] == pytest.approx(
                value, rel=tolerance, abs=(10 if is_difference else 1) * tolerance
            ), name
    # what training did to the weights, not the weights, which are far larger
    updates = {name: p.detach() - expected.initial[name] for name, p in expected.model.named_parameters()}
    total = torch.stack([update.norm() for update in updates.values()]).norm()
    assert total > 1e-4
    for name, q in found.model.named_parameters():
        difference = q.detach() - expected.initial[name] - updates[name]
        # rounding of the weights themselves is 6e-8 of their size, a step long
        assert difference.norm() <= 10 * tolerance * max(updates[name].norm(), 0.1 * total) + 1e-6 * q.norm(), name
