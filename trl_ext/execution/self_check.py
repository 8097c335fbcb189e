"""Run the same sequences in two ways and compare the outputs and gradients."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor


def compare(
    module: nn.Module, padded: Callable, shared: Callable, slots: torch.Tensor | None, *, outputs: str
) -> str | None:
    """
    `None` if two ways to run the same sequences agree, else what differs.

    Compared are the outputs and the gradient of a weighted sum of them with respect to the embedded tokens, which
    passes through every layer. Runs in eval mode, where neither dropout nor activation checkpointing is active.

    Args:
        module (`torch.nn.Module`): the model, unwrapped.
        padded, shared (`Callable`): run it; each returns log-probabilities `(N, L - 1)` or hidden states `(N, L, H)`.
        outputs (`str`): what these are, for the message.
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
                    output = run()
                    weights = torch.ones_like(output, dtype=torch.float32)
                    weights[:, ::2] = -0.5  # so that an error in one direction does not cancel
                    if output.dim() == 3:  # the sum of a normalised state is a constant
                        weights *= torch.arange(output.size(2), device=output.device).cos()
                    (gradient,) = torch.autograd.grad((output.float() * weights).sum(), embedded)
            finally:
                hook.remove()
            results.append((output.detach().float(), gradient.float().flatten(0, 1)))
    finally:
        for m, training in modes:
            m.training = training
    (padded_output, padded_gradient), (shared_output, shared_gradient) = results
    if slots is not None:
        used = slots >= 0
        padded_gradient = torch.zeros_like(shared_gradient).index_add(0, slots[used], padded_gradient[used])
    tolerance = _tolerance(module, any(autocast))
    for name, a, b in (
        (outputs, padded_output, shared_output),
        ("gradients", padded_gradient, shared_gradient),
    ):
        error = ((a - b).norm() / a.norm().clamp(min=1e-30)).item()
        if not error <= tolerance:
            return (
                f"{name} differ by {error:.2g} of their norm, {tolerance:g} allowed; the largest difference is "
                f"{(a - b).abs().max().item():.3g}"
            )
    return None


def can_check(module: nn.Module, this_process_can: bool) -> bool:
    """Whether this process can check, or under ZeRO-3 any process."""
    if not any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        return this_process_can
    device = next(module.parameters()).device
    can = torch.tensor(float(this_process_can), device=device)
    torch.distributed.all_reduce(can, op=torch.distributed.ReduceOp.MAX)
    return bool(can)


def stop_if_different(difference: str | None, module: nn.Module) -> None:
    """Stop if [`compare`] has found a difference."""
    if difference is not None:
        raise RuntimeError(
            f"The first batch gives other numbers with shared prompts than padded: {difference}. Set "
            f"prefix_sharing=False for {type(module).__name__}, and please report this."
        )


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
