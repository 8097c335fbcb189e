"""Sequences of token ids as the arrays that a layout is planned from."""

import numpy as np
import torch

CPU = torch.device("cpu")


def batch_of(sequences, padding_side="right"):
    """`[(prompt, completion), ...]` to ids, mask and scored `(N, L)` arrays."""
    length = max(len(prompt) + len(completion) for prompt, completion in sequences)
    ids = np.zeros((len(sequences), length), dtype=np.int64)
    mask, scored = np.zeros_like(ids), np.zeros_like(ids, dtype=bool)
    for n, (prompt, completion) in enumerate(sequences):
        used = len(prompt) + len(completion)
        start = length - used if padding_side == "left" else 0
        ids[n, start : start + used] = [*prompt, *completion]
        mask[n, start : start + used] = 1
        scored[n, start + len(prompt) : start + used] = True
    return ids, mask, scored
