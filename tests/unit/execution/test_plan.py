"""Plans for devices that are not there: lengths that kernels take, and the time a plan takes."""

import time

import numpy as np
import pytest
import torch

from trl_ext.execution.cost import CostModel
from trl_ext.execution.layout import plan_layout
from trl_ext.execution.masks import FLEX_LONGEST_ROW
from trl_ext.execution.plan import CUDA_MULTIPLE, choose_layout, prepare_attention


def ragged(prompts, completions, prompt, completion, seed=0):
    """Ids, mask and scored positions `(N, L)` of random tokens; lengths differ by up to 30 %."""
    random = np.random.default_rng(seed)

    def tokens(length):
        return random.integers(5, 150_000, int(length * random.uniform(0.7, 1.3)))

    rows = [
        (head, tokens(completion)) for head in (tokens(prompt) for _ in range(prompts)) for _ in range(completions)
    ]
    length = max(len(head) + len(tail) for head, tail in rows)
    ids, mask = (np.zeros((len(rows), length), dtype=np.int64) for _ in range(2))
    scored = np.zeros_like(mask, dtype=bool)
    for n, (head, tail) in enumerate(rows):
        both = len(head) + len(tail)
        ids[n, :both], mask[n, :both], scored[n, len(head) : both] = np.concatenate([head, tail]), 1, True
    return ids, mask, scored


def planned(batch, backend):
    return choose_layout(
        *batch, None, keep_unscored=False, cost=CostModel(0.0 if backend == "flex_attention" else 1 / 8900),
        backend=backend, by_segment=False, device=torch.device("cuda"), is_forced=lambda _: True,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex_attention"])
def test_row_lengths_on_cuda_are_multiples_of_128(backend):
    """With others, T mod 128 is 64 in some batches, for which cuDNN's backward gives NaN."""
    lengths = [planned(ragged(3, 2, 300, 40, seed), backend).row_length for seed in range(20)]
    assert len(set(lengths)) > 1 and all(length % CUDA_MULTIPLE == 0 for length in lengths) and CUDA_MULTIPLE == 128


def test_rows_of_flex_attention_are_capped():
    """Its attention counts as free, so that all would be in one row, whose list of blocks is quadratic in it."""
    assert planned(ragged(16, 8, 1600, 400), "flex_attention").row_length <= FLEX_LONGEST_ROW
    single = ragged(1, 1, 30_000, 400)
    assert planned(single, "flex_attention").row_length > FLEX_LONGEST_ROW  # a sequence is not cut


def test_a_large_batch_is_planned_in_a_fraction_of_a_second():
    """64 prompts with 8 answers, 2,000 tokens each: 64 ms measured. The bound leaves room for a slow machine."""
    batch, times = ragged(64, 8, 1600, 400), []
    for _ in range(3):
        start = time.process_time()
        plan_layout(*batch, multiple_of=CUDA_MULTIPLE, cost=CostModel(1 / 8900))
        times.append(time.process_time() - start)
    assert min(times) < 0.25


@pytest.mark.parametrize(
    "backend, device, wanted", [("sdpa", "cuda", [False]), ("sdpa", "cpu", []), ("eager", "cuda", [])]
)
def test_cudnn_gets_no_masks(backend, device, wanted, monkeypatch):
    """Those of padded rows neither, for which there is no plan."""
    switched = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", switched.append)
    prepare_attention(backend, torch.device(device), None)
    assert switched == wanted
