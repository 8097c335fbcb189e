"""Running means that come out the same for any split of the data over micro-batches and processes, and what to log."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator

from .logps import CompletionLogps
from .losses import ordered_pairs, pair_gaps


def kendall_tau(
    logps: torch.Tensor, scores: torch.Tensor, candidate_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Kendall's tau-b between log-likelihoods and scores: 1 where the model ranks the candidates as the scores do, -1
    where it ranks them the other way round. Pairs that are equal on one side only count in the denominator.

    Args:
        logps, scores (`torch.Tensor` of shape `(B, K)`): what to compare.
        candidate_mask (`torch.Tensor` of shape `(B, K)`, bool): True where there is a candidate.

    Returns:
        `tuple`: tau of each prompt `(B,)`, and whether it has one `(B,)`, bool: it has none, and 0 here, where all
        scores or all log-likelihoods are equal.
    """
    better, likelier = (ordered_pairs(values, candidate_mask).to(logps.dtype) for values in (scores, logps))
    agreement = (better * (likelier - likelier.transpose(1, 2))).sum(dim=(1, 2))
    # each pair that is not equal counts once
    norm = (better.sum(dim=(1, 2)) * likelier.sum(dim=(1, 2))).sqrt()
    return agreement / norm.clamp(min=1), norm > 0


def pair_metrics(
    logps: torch.Tensor,
    scores: torch.Tensor,
    candidate_mask: torch.Tensor,
    margins: torch.Tensor | None = None,
    *,
    active: str = "hinge/active",
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """
    How well the strictly ordered pairs are told apart.

    Args:
        logps, scores (`torch.Tensor` of shape `(B, K)`): what the loss compares, and what it should be ordered by.
        candidate_mask (`torch.Tensor` of shape `(B, K)`, bool): True where there is a candidate.
        margins (`torch.Tensor` of shape `(B, K, K)`, *optional*): the gap that the loss wants between two candidates.
        active (`str`): name of the share of pairs whose gap is smaller than that.

    Returns:
        `dict`: numerators and denominators `(B,)` of `rewards/margins` (mean gap), `rewards/accuracies` (share of
        pairs in the right order) and, with `margins`, of `active`.
    """
    pairs = ordered_pairs(scores, candidate_mask)
    gaps = pair_gaps(logps, candidate_mask)
    num_pairs = pairs.sum(dim=(1, 2))
    metrics = {
        "rewards/margins": ((gaps * pairs).sum(dim=(1, 2)), num_pairs),
        "rewards/accuracies": (((gaps > 0) & pairs).sum(dim=(1, 2)), num_pairs),
    }
    if margins is not None:
        metrics[active] = (((gaps < margins) & pairs).sum(dim=(1, 2)), num_pairs)
    return metrics


def row_metrics(
    name: str, rows: torch.Tensor, logps: CompletionLogps, counts: torch.Tensor | None = None
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """
    Log-likelihood and length of one completion of each prompt.

    Args:
        name (`str`): what the completion is called, such as `"chosen"`.
        rows (`torch.Tensor` of shape `(B,)`, int64): its row in the batch.
        logps ([`CompletionLogps`]): of all rows.
        counts (`torch.Tensor` of shape `(B,)`, *optional*): 1, or 0 where a prompt has no such completion.

    Returns:
        `dict`: numerators and denominators `(B,)` of `logps/<name>` and `lengths/<name>`.
    """
    counts = torch.ones_like(logps.sums[rows]) if counts is None else counts.to(logps.sums.dtype)
    return {
        f"logps/{name}": (logps.sums[rows] * counts, counts),
        f"lengths/{name}": (logps.lengths[rows] * counts, counts),
    }


class MetricAccumulator:
    """
    Sums numerators and denominators on the device and divides once, globally, when asked.

    Nothing is copied to the host and nothing is communicated until [`~MetricAccumulator.reduce`].
    """

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}
        self._totals: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        """Names of the metrics that something was added to."""
        return iter(self._sums)

    def add(self, name: str, numerator: torch.Tensor, denominator: torch.Tensor) -> None:
        """Add `numerator` and `denominator` (any shape; they are summed) to the metric `name`."""
        precision = torch.float32 if numerator.device.type == "mps" else torch.float64  # MPS has no float64
        pair = torch.stack([numerator.detach().sum().to(precision), denominator.detach().sum().to(precision)])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def add_total(self, name: str, amount: torch.Tensor) -> None:
        """Add `amount` (any shape; it is summed) to the plain total `name`, which is not divided by anything."""
        self.add(name, amount, torch.zeros_like(amount))
        self._totals.add(name)

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """
        Means, and totals, of everything added on any process since the last call, and start afresh.

        All processes must call this together, having added the same names. One collective for all metrics. A metric
        whose denominator is 0 is left out: there was nothing to average.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        totals = accelerator.reduce(torch.stack([self._sums[name] for name in names]), reduction="sum").tolist()
        self._sums = {}
        return {
            name: numerator if name in self._totals else numerator / denominator
            for name, (numerator, denominator) in zip(names, totals, strict=True)
            if denominator or name in self._totals
        }

    def clear(self) -> None:
        self._sums = {}
