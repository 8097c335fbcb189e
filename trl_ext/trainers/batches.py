"""Batches of candidates: the keys they must have, the best and the worst of each prompt."""

import torch
from torch import nn

REQUIRED_BATCH_KEYS = {
    "prompt_weights",
    "prompt_index",
    "candidate_index",
    "target_index",
    "scores",
    "has_scores",
    "input_ids",
    "attention_mask",
    "completion_mask",
}


def _keep_gradients_of_quantized_layers(model: nn.Module) -> None:
    """
    On a CPU with AVX512-BF16, bitsandbytes (0.50) packs a layer's 4-bit weights the first time that it is evaluated.
    From then on the layer has no gradient, in training either, and what is below it does not learn. So no packing.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _check_batch(inputs: dict[str, torch.Tensor]) -> None:
    missing = REQUIRED_BATCH_KEYS - set(inputs)
    if missing:
        raise ValueError(
            f"A batch must have what `trl_ext.CandidateCollator` makes, got none of {sorted(missing)}. Remove "
            "`data_collator`, or derive it from that class."
        )


def best_and_worst(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Rows of the best and the worst candidate of each prompt, `(B,)` each; of equals the first is the best and the last
    the worst. And whether that one scores less, `(B,)`, bool: where it does not, nothing is better than anything.
    """
    candidate_index, scores = inputs["candidate_index"], inputs["scores"]
    absent = candidate_index < 0
    best = scores.masked_fill(absent, float("-inf")).argmax(dim=1, keepdim=True)
    # argmax takes the first of equals: look from the end for the last
    worst = (-scores).masked_fill(absent, float("-inf")).flip(1).argmax(dim=1, keepdim=True)
    worst = scores.size(1) - 1 - worst
    is_worse = scores.gather(1, worst) < scores.gather(1, best)
    return tuple(t.squeeze(1) for t in (candidate_index.gather(1, best), candidate_index.gather(1, worst), is_worse))
