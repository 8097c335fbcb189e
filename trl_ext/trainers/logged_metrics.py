"""Metrics of a method's trainer: means over the prompts of all processes, the same for any split into batches."""

import logging
from typing import Any

import torch

from ..runtime.run_warnings import unequal_terms
from .batches import best_and_worst

logger = logging.getLogger(__name__)


class LoggedMetrics:
    """Collects metrics of micro-batches and logs their means; for [`CandidateTrainer`]."""

    @torch.no_grad()
    def _accumulate(self, metrics: dict[str, Any], inputs: dict[str, torch.Tensor], outputs: Any) -> None:
        sums = self._metric_sums["train" if self.model.training else "eval"]
        weights = inputs["prompt_weights"]
        for name, value in metrics.items():
            numerators, denominators = value if isinstance(value, tuple) else (value, torch.ones_like(weights))
            sums.add(name, numerators * weights, denominators * weights)

        row_weights = weights[inputs["prompt_index"]].unsqueeze(1)
        scored = inputs["completion_mask"][:, 1:] * row_weights
        sums.add("entropy", outputs.entropy * scored, scored)
        best_row, worst_row, is_worse = best_and_worst(inputs)
        sums.add("logits/chosen", outputs.mean_logits[best_row] * scored[best_row], scored[best_row])
        rejected = scored[worst_row] * is_worse.unsqueeze(1)
        sums.add("logits/rejected", outputs.mean_logits[worst_row] * rejected, rejected)
        sums.add("mean_token_accuracy", outputs.is_top1[best_row] * scored[best_row], scored[best_row])
        if self.model.training:
            sums.add_total("num_tokens", inputs["attention_mask"] * row_weights)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs.update(self._reduce_metrics("train" if self.model.training else "eval"))
        if self.model.training:
            self._look_at_logs(logs)
        super().log(logs, start_time)

    def _look_at_logs(self, logs: dict[str, float]) -> None:
        """Warn, at the first log of the loss, where one of its terms is far larger than another."""
        if self._terms_are_compared or not self.loss_terms.keys() <= logs.keys():
            return
        self._terms_are_compared = True
        weights = {
            name: (setting, 1.0 if setting is None else getattr(self.args, setting))
            for name, setting in self.loss_terms.items()
        }
        self._warn(unequal_terms(logs, weights))

    def _warn(self, message: str | None) -> None:
        if message is not None and self.is_world_process_zero():
            logger.warning(message)

    def _reduce_metrics(self, mode: str) -> dict[str, float]:
        metrics = self._metric_sums[mode].reduce(self.accelerator)
        if "num_tokens" in metrics:  # a running total, taken up again where a resumed run left off
            before = (entry["num_tokens"] for entry in reversed(self.state.log_history) if "num_tokens" in entry)
            metrics["num_tokens"] += next(before, 0)
        prefix = "" if mode == "train" else f"{self._eval_prefix}_"
        return {prefix + name: value for name, value in metrics.items()}

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self._metric_sums["eval"].clear()
        self._eval_prefix = metric_key_prefix
        return super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
