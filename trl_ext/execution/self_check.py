"""Run the same sequences in two ways and compare log-probabilities and gradients."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor


def compare(module: nn.Module, padded: Callable, shared: Callable, slots: torch.Tensor | None) -> str | None:
    """
    `None` if two ways to run the same sequences agree, else what differs.

    Compared are the log-probabilities and the gradient of a signed sum of them with respect to the embedded tokens,
    which passes through every layer. Runs in eval mode, where neither dropout nor activation checkpointing is active.

    Args:
        module (`torch.nn.Module`): the model, unwrapped.
        padded, shared (`Callable`): run it; each returns an output with `log_probs` `(N, L - 1)`.
        slots (`torch.Tensor` of shape `(N * L,)`, *optional*): where `shared` computes each token of `padded`, -1
            where it does not. `None` if both are the same.

    Raises:
        NotImplementedError: under FSDP, whose hooks do not expect a backward pass inside a forward.
    """
    sharded = any(isinstance(p, DTensor) for p in module.parameters())
    if sharded or any(isinstance(m, FullyShardedDataParallel) for m in module.modules()):
        raise NotImplementedError(
            "The self-check of prefix sharing cannot run under FSDP. Run it once on a single process and leave it out "
            "here; for an architecture that is not among those tested, set prefix_sharing='auto'."
        )
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    results, autocast = [], []
    try:
        for run in (padded, shared):
            embedded = []

            def start_graph(_module, _args, output, embedded=embedded):
                autocast.append(torch.is_autocast_enabled(output.device.type))  # as wrapped by accelerate, or not
                embedded.append(output.detach().requires_grad_())
                return embedded[0]

            hook = module.get_input_embeddings().register_forward_hook(start_graph)
            try:
                with torch.enable_grad():
                    log_probs = run().log_probs
                    signs = torch.ones_like(log_probs, dtype=torch.float32)
                    signs[:, ::2] = -0.5  # so that an error in one direction does not cancel
                    (gradient,) = torch.autograd.grad((log_probs.float() * signs).sum(), embedded)
            finally:
                hook.remove()
            results.append((log_probs.detach().float(), gradient.float().flatten(0, 1)))
    finally:
        for m, training in modes:
            m.training = training
    (padded_logps, padded_gradient), (shared_logps, shared_gradient) = results
    if slots is not None:
        used = slots >= 0
        padded_gradient = torch.zeros_like(shared_gradient).index_add(0, slots[used], padded_gradient[used])
    tolerance = _tolerance(module, any(autocast))
    for name, a, b in (
        ("log-probabilities", padded_logps, shared_logps),
        ("gradients", padded_gradient, shared_gradient),
    ):
        error = ((a - b).norm() / a.norm().clamp(min=1e-30)).item()
        if not error <= tolerance:
            return (
                f"{name} differ by {error:.2g} of their norm, {tolerance:g} allowed; the largest difference is "
                f"{(a - b).abs().max().item():.3g}"
            )
    return None


def closest_pair(slots: np.ndarray) -> list[int] | None:
    """The two sequences that share most slots, given the slot of each token `(N, L)`; `None` if no two share any."""
    best, pair = 0, None
    for i in range(len(slots)):
        for j in range(i + 1, len(slots)):
            shared = int(((slots[i] == slots[j]) & (slots[i] >= 0)).sum())
            if shared > best:
                best, pair = shared, [i, j]
    return pair


def _tolerance(module: nn.Module, autocast: bool) -> float:
    """Relative to the norm. Rounding differs with the shape of a matrix product, more so at low precision."""
    if autocast or any(p.dtype != torch.float32 for p in module.parameters()):
        return 5e-2
    return 1e-4 if torch.get_float32_matmul_precision() == "highest" else 1e-2
