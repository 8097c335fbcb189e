"""CLICK."""

import textwrap
from typing import Any

import torch

from .candidate_trainer import CandidateTrainer, best_and_worst
from .click_config import CLICKConfig
from .data import RowOptions
from .logps import CompletionLogps, by_prompt
from .losses import click_loss, ordered_pairs, pair_gaps, slic_rank_loss


class CLICKTrainer(CandidateTrainer):
    r"""
    Trainer for CLICK, controllable text generation with sequence likelihood contrastive learning
    (https://huggingface.co/papers/2306.03350):

        loss = - S(y*) / |y*| + pair_weight * relu(margin - S(y+) + S(y-)),      S(y) = sum_t log P(y_t | x, y_<t)

    as a mean over prompts. y* is the task's own target, y+ and y- are samples of the model that a classifier has
    called good and bad. It takes `DPOTrainer`'s place and arguments; there is no reference model.

    A row is a pair (`prompt`, `chosen`, `rejected`) or a list with scores (the mean over its strictly ordered pairs),
    with y* in the column `reference`; without it the best candidate stands in. A row with one completion has no pair
    and gives the language-modelling loss alone, so that data of the task without samples can be mixed in. What makes
    CLICK's pairs is the rule `"likelihood_near"` of [`make_pairs`].

    Departure from the authors' code: it averages the language-modelling loss over the tokens of a micro-batch. That
    depends on how a batch is split, so here each target is averaged over its own tokens, and prompts over the batch.

    Logged besides `Trainer`'s own: `loss/lm`, `loss/pair` (before its weight), `hinge/active` (share of pairs still
    inside the margin), `rewards/margins` and `rewards/accuracies` (over all ordered pairs; the reward of an answer is
    its S), `logps/{chosen,rejected,reference}` (summed), `lengths/{chosen,rejected,reference}` in tokens,
    `logits/{chosen,rejected}`, `entropy`, `mean_token_accuracy`, `num_tokens`.

    Args:
        model, ref_model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics,
        callbacks, optimizers, quantization_config, peft_config:
            As in [`~trl.DPOTrainer`], with `args` a [`CLICKConfig`]. `ref_model` and `compute_metrics` are refused.
    """

    config_class = CLICKConfig
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
        return RowOptions(min_completions=1, reference=True, max_length=args.max_length)

    def loss_from_logps(
        self, logps: CompletionLogps, inputs: dict[str, torch.Tensor], outputs: Any
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        args = self.args
        scores, candidate_index, reference_row = inputs["scores"], inputs["candidate_index"], inputs["reference_index"]
        candidate_mask = candidate_index >= 0
        candidates = by_prompt(logps.sums, candidate_index)

        pair = slic_rank_loss(candidates, scores, candidate_mask, delta=args.margin)
        lm = -logps.means[reference_row]
        losses = click_loss(pair, lm, pair_weight=args.pair_weight)

        with torch.no_grad():
            pairs = ordered_pairs(scores, candidate_mask)
            gaps = pair_gaps(candidates, candidate_mask)
            num_pairs = pairs.sum(dim=(1, 2))
            best_row, worst_row = best_and_worst(inputs)
            one = torch.ones_like(lm)
            metrics = {
                "loss/lm": lm,
                "loss/pair": pair,
                "hinge/active": (((gaps < args.margin) & pairs).sum(dim=(1, 2)), num_pairs),
                "rewards/margins": ((gaps * pairs).sum(dim=(1, 2)), num_pairs),
                "rewards/accuracies": (((gaps > 0) & pairs).sum(dim=(1, 2)), num_pairs),
            }
            for name, rows, counts in (
                ("chosen", best_row, one),
                ("rejected", worst_row, (worst_row != best_row).float()),
                ("reference", reference_row, one),
            ):
                metrics[f"logps/{name}"] = (logps.sums[rows] * counts, counts)
                metrics[f"lengths/{name}"] = (logps.lengths[rows] * counts, counts)
        return losses, metrics
