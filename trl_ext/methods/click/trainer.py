"""CLICK."""

import textwrap
from typing import Any

import torch

from ...data.rows import RowOptions
from ...logps import CompletionLogps, by_prompt
from ...losses import click_loss, ordered_pairs, rank_margins, slic_rank_loss
from ...metrics import pair_metrics, row_metrics
from ...runs.curves import CLICK_PANELS
from ...trainers.batches import best_and_worst
from ...trainers.candidate_trainer import CandidateTrainer
from .config import CLICKConfig


class CLICKTrainer(CandidateTrainer):
    r"""
    Trainer for CLICK, controllable text generation with sequence likelihood contrastive learning
    (https://huggingface.co/papers/2306.03350):

        loss = - S(y*) / |y*| + pair_weight * relu(margin - S(y+) + S(y-)),      S(y) = sum_t log P(y_t | x, y_<t)

    the first term as a mean over all prompts, the second over those that have a pair, counted over the whole optimiser
    step. y* is the task's own target, y+ and y- are samples of the model that a classifier has called good and bad. It
    takes `DPOTrainer`'s place and arguments; there is no reference model.

    A row is a pair (`prompt`, `chosen`, `rejected`) or a list with scores (the mean over its strictly ordered pairs),
    with y* in the column `reference`. A row with one completion has no pair and gives the language-modelling loss
    alone, so that data of the task without samples can be mixed in; it does not make the pairs of others weigh less.
    Without a `reference` the best candidate stands in, if it is better than another, or is the only one and scores
    above 0; any other row without one is invalid, since its best candidate may be what is to be unlearned. What makes
    CLICK's pairs is the rule `"likelihood_near"` of [`~trl_ext.scoring.pairs.make_pairs`].

    Departures from the authors' code:

    - It averages the language-modelling loss over the tokens of a micro-batch. That depends on how a batch is split,
      so here each target is averaged over its own tokens, and then prompts.
    - It averages the hinge over the pairs of a micro-batch. Here each prompt with pairs counts once, however many it
      has in its row.

    Logged besides `Trainer`'s own: `loss/lm`, `loss/pair` (before its weight, over prompts with a pair),
    `hinge/active` (share of pairs still inside the margin), `rewards/margins` and `rewards/accuracies` (over all
    ordered pairs; the reward of an answer is its S), `logps/{chosen,rejected,reference}` (summed),
    `lengths/{chosen,rejected,reference}` in tokens, `logits/{chosen,rejected}`, `entropy`, `mean_token_accuracy`,
    `num_tokens`.

    Example:
    ```python
    from datasets import Dataset
    from trl_ext import CLICKConfig, CLICKTrainer

    rows = [{"prompt": "2 + 2?", "chosen": " It is 4.", "rejected": " 4, you fool.", "reference": " 4"}]
    trainer = CLICKTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=CLICKConfig("Qwen2.5-0.5B-CLICK", learning_rate=5e-5, margin=20.0, pair_weight=0.5),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    ```

    Args:
        model, ref_model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics,
        callbacks, optimizers, quantization_config, peft_config:
            As in [`~trl.DPOTrainer`], with `args` a [`CLICKConfig`]. `ref_model` and `compute_metrics` are refused.
    """

    panels = CLICK_PANELS
    config_class = CLICKConfig
    loss_terms = {"loss/lm": None, "loss/pair": "pair_weight"}
    _tag_names = ["trl", "click"]
    _name = "CLICK"
    _paper = {
        "title": "Click: Controllable Text Generation with Sequence Likelihood Contrastive Learning",
        "id": "2306.03350",
        "citation": textwrap.dedent("""\
            @inproceedings{zheng2023click,
                title     = {{Click: Controllable Text Generation with Sequence Likelihood Contrastive Learning}},
                author    = {Chujie Zheng and Pei Ke and Zheng Zhang and Minlie Huang},
                year      = 2023,
                booktitle = {Findings of ACL},
            }"""),
    }

    def _row_options(self, args: CLICKConfig) -> RowOptions:
        return RowOptions(min_completions=1, reference=True, expect_reference=True, max_length=args.max_length)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As for every trainer here; and how many prompts there are for each one that has a pair."""
        batches, num_prompts = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            with_pair = sum((has_pair(batch) * batch["prompt_weights"]).sum() for batch in batches).to(device)
            with_pair = self.accelerator.reduce(with_pair, reduction="sum")
            for batch in batches:
                batch["prompts_per_pair"] = num_prompts / with_pair.clamp(min=1)
        return batches, num_prompts

    def loss_from_logps(
        self, logps: CompletionLogps, inputs: dict[str, torch.Tensor], outputs: Any
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        args = self.args
        scores, candidate_index, reference_row = inputs["scores"], inputs["candidate_index"], inputs["target_index"]
        candidate_mask = candidate_index >= 0
        candidates = by_prompt(logps.sums, candidate_index)

        pair = slic_rank_loss(candidates, scores, candidate_mask, delta=args.margin)
        lm = -logps.means[reference_row]
        counts, weights = has_pair(inputs), inputs["prompt_weights"]
        prompts_per_pair = inputs.get("prompts_per_pair")
        if prompts_per_pair is None:  # outside of training: of this batch
            prompts_per_pair = weights.sum() / (counts * weights).sum().clamp(min=1)
        losses = click_loss(pair * prompts_per_pair, lm, pair_weight=args.pair_weight)

        with torch.no_grad():
            best_row, worst_row, is_worse = best_and_worst(inputs)
            margins = rank_margins(scores, candidate_mask, delta=args.margin)
            metrics = {
                "loss/lm": lm,
                "loss/pair": (pair, counts),
                **pair_metrics(candidates, scores, candidate_mask, margins),
                **row_metrics("chosen", best_row, logps),
                **row_metrics("rejected", worst_row, logps, is_worse),
                **row_metrics("reference", reference_row, logps),
            }
        return losses, metrics

    def _reduce_metrics(self, mode: str) -> dict[str, float]:
        metrics = super()._reduce_metrics(mode)
        prefix = "" if mode == "train" else f"{self._eval_prefix}_"
        if mode == "eval" and f"{prefix}loss/lm" in metrics:
            # put together from means over all batches: those of single batches have other numbers of pairs
            metrics[f"{prefix}loss"] = (
                metrics[f"{prefix}loss/lm"]
                + self.args.pair_weight * metrics.get(f"{prefix}loss/pair", 0.0)
                + (self.router_aux_loss_coef * metrics[f"{prefix}aux_loss"] if self.aux_loss_enabled else 0.0)
            )
        return metrics


def has_pair(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """1 for each prompt with two candidates of different scores, else 0, `(B,)`."""
    return ordered_pairs(inputs["scores"], inputs["candidate_index"] >= 0).any(dim=2).any(dim=1).float()
