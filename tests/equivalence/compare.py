"""A model twice, padded and sharing prefixes, and everything that has to be equal between the two."""

import copy

import torch

from tests.equivalence.small_models import VOCABULARY, make
from trl_ext._trl import add_fused_lm_head
from trl_ext.execution.sharing import PrefixSharing

FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


def two_of(model_type="llama", mode=True, self_check=False, **overrides):
    """The same model twice: as TRL leaves it, and sharing prefixes."""
    padded = make(model_type, **overrides)
    shared = copy.deepcopy(padded)
    for model in (padded, shared):
        add_fused_lm_head(model, outputs=FIELDS)
    prefix_sharing = PrefixSharing(mode, self_check)
    prefix_sharing.install(shared)
    return padded, shared, prefix_sharing


def batch_of(sequences, padding_side="right"):
    """`[(prompt, completion), ...]` to what TRL's trainers hand to the model."""
    length = max(len(prompt) + len(completion) for prompt, completion in sequences)
    batch = {name: [] for name in ("input_ids", "attention_mask", "labels")}
    for prompt, completion in sequences:
        padding = length - len(prompt) - len(completion)
        for name, values, filler in (
            ("input_ids", [*prompt, *completion], 0),
            ("attention_mask", [1] * (length - padding), 0),
            ("labels", [-100] * len(prompt) + list(completion), -100),
        ):
            filled = [filler] * padding
            batch[name].append(values + filled if padding_side == "right" else filled + values)
    batch = {name: torch.tensor(rows) for name, rows in batch.items()}
    if padding_side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    return batch


def random_sequences(num_prompts, num_completions, prompt_length, completion_length, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tokens(shortest, longest):
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    sequences = []
    for _ in range(num_prompts):
        prompt = tokens(*prompt_length)
        sequences += [(prompt, tokens(*completion_length)) for _ in range(num_completions)]
    return sequences


def run(model, batch, **kwargs):
    return model(**batch, fused_lm_head=True, use_cache=False, **kwargs)


def assert_same(padded, shared, batch, tolerance=1e-5):
    """All per-token outputs, the loss, and all parameter gradients; `tolerance` relative to their largest value."""
    expected, found = run(padded, batch), run(shared, batch)
    for name in FIELDS:
        a, b = getattr(expected, name), getattr(found, name)
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.dtype == torch.bool:
            assert torch.equal(a, b)
        else:
            assert (a - b).abs().max() <= tolerance * a.abs().max(), name
    assert torch.equal(expected.label_mask, found.label_mask)
    torch.testing.assert_close(found.loss, expected.loss, rtol=tolerance, atol=0)
    # of one sign: where all tokens are alike, weights of both would leave little but the rounding of what they cancel
    weights = 0.5 + torch.rand(expected.log_probs.shape, generator=torch.Generator().manual_seed(0))
    for model, outputs in ((padded, expected), (shared, found)):
        model.zero_grad()
        (outputs.log_probs * weights + 0.1 * outputs.entropy * weights).sum().backward()
    total = torch.stack([p.grad.norm() for p in padded.parameters() if p.grad is not None]).norm()
    assert total > 1e-3
    for (name, a), b in zip(padded.named_parameters(), shared.parameters(), strict=True):
        if a.grad is not None:
            # some have no gradient but rounding (keys' biases, queries of a lone token): these against the whole
            assert (a.grad - b.grad).norm() <= tolerance * max(a.grad.norm(), 0.1 * total), name
