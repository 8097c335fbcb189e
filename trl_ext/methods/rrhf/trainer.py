"""RRHF."""

import textwrap
from typing import Any

import torch

from ...data.rows import RowOptions
from ...logps import CompletionLogps, by_prompt
from ...losses import rank_margins, rrhf_likelihoods, rrhf_loss, rrhf_official_lengths, rrhf_rank_loss, rrhf_sft_loss
from ...metrics import kendall_tau, pair_metrics, row_metrics
from ...runs.curves import RRHF_PANELS
from ...trainers.batches import best_and_worst
from ...trainers.candidate_trainer import CandidateTrainer
from .config import RRHFConfig


class RRHFTrainer(CandidateTrainer):
    r"""
    Trainer for RRHF, rank responses to align language models with human feedback
    (https://huggingface.co/papers/2304.05302), eq. 5:

        loss = sum over r_i < r_j of relu(p_i - p_j) - S(y_best)
        p_i = S(y_i) / |y_i|,        S(y) = sum_t log P(y_t | x, y_<t)

    as a mean over prompts. It takes `DPOTrainer`'s place and arguments; only the loss, its config and the rows it
    accepts differ. There is no reference model and there is no margin: a pair in the right order is left alone.

    Rows are ranked lists of any length, which may differ from row to row, or preference pairs, whose `score_chosen`
    and `score_rejected` are their scores where they have both. Equal scores make no pair, and of equally good
    candidates the first is the best. A row without a pair (one candidate, or all scores equal) is fine-tuned on its
    best candidate.

    `rank_weight=0` is fine-tuning on the best of each row (rejection sampling). The other candidates of the training
    data are then neither tokenised nor computed, and nothing that compares candidates is logged of it. Evaluation
    still looks at all of them.

    Departures from the paper: none with the default settings. Where the paper leaves it open, the log-likelihood and
    the length count the end token, where there is one.

    Departures from the authors' code, which departs from the paper itself. `arithmetic="official"` gives its loss:

    - The code divides by the length of the prompt's longest row, prompt included, for all candidates alike, because it
      reads lengths off labels that it has overwritten. So it compares sums, and its second term is a small fraction of
      the paper's. Here a candidate is divided by its own length, and the second term is a sum.
    - Its `rrhf_weight` is 100 by default, though the authors' scripts set 1. Here `rank_weight` is 1.
    - It takes one prompt per device. Here a batch has any number of prompts, and rows may differ in length.
    - It tokenises prompt and answers apart, so that some tokenizers begin the answer with a start token. Here they are
      tokenised together, as TRL does.

    Logged besides `Trainer`'s own: `loss/rank` and `loss/sft` (before their weights), `rank/violations` (share of
    ordered pairs whose worse answer has the higher p; these make up the rank term), `rank/kendall_tau` (tau-b between
    p and score, over prompts that have one), `rewards/margins` and `rewards/accuracies` (over all ordered pairs; the
    reward of an answer is its p), `scores/best` and `scores/mean` (over prompts whose row has scores),
    `logps/{chosen,rejected}` (summed, whatever `length_penalty`), `logps_per_token/{chosen,rejected}`,
    `lengths/{chosen,rejected}` in tokens, `logits/{chosen,rejected}`, `entropy`, `mean_token_accuracy`, `num_tokens`.
    "chosen" is the best candidate and "rejected" the worst; a prompt whose candidates are all equally good has no
    rejected one.

    Example:
    ```python
    from datasets import Dataset
    from trl_ext import RRHFConfig, RRHFTrainer

    rows = [{"prompt": "2 + 2 =", "completions": [" 4", " 5", " four"], "scores": [1.0, 0.0, 0.8]}]
    trainer = RRHFTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=RRHFConfig("Qwen2.5-0.5B-RRHF", learning_rate=2e-5, max_completions_per_forward=4),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    ```

    Args:
        model, ref_model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics,
        callbacks, optimizers, quantization_config, peft_config:
            As in [`~trl.DPOTrainer`], with `args` an [`RRHFConfig`]. `ref_model` and `compute_metrics` are refused.
    """

    panels = RRHF_PANELS
    config_class = RRHFConfig
    loss_terms = {"loss/rank": "rank_weight", "loss/sft": "sft_weight"}
    _tag_names = ["trl", "rrhf"]
    _name = "RRHF"
    _paper = {
        "title": "RRHF: Rank Responses to Align Language Models with Human Feedback without tears",
        "id": "2304.05302",
        "citation": textwrap.dedent("""\
            @article{yuan2023rrhf,
                title   = {{RRHF: Rank Responses to Align Language Models with Human Feedback without tears}},
                author  = {Zheng Yuan and Hongyi Yuan and Chuanqi Tan and Wei Wang and Songfang Huang and Fei Huang},
                year    = 2023,
                journal = {arXiv preprint arXiv:2304.05302},
            }"""),
    }

    def _row_options(self, args: RRHFConfig) -> RowOptions:
        return RowOptions(
            min_completions=1,
            score_columns=True,
            best_only=args.rank_weight == 0,
            max_length=args.max_length,
        )

    def loss_from_logps(
        self, logps: CompletionLogps, inputs: dict[str, torch.Tensor], outputs: Any
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        args = self.args
        scores, candidate_index = inputs["scores"], inputs["candidate_index"]
        candidate_mask = candidate_index >= 0
        sums, lengths = (by_prompt(values, candidate_index) for values in (logps.sums, logps.lengths))  # (B, K)
        reduction = args.sft_reduction
        if args.arithmetic == "official":
            widths = by_prompt(inputs["attention_mask"].sum(dim=1), candidate_index)  # (B, K)
            lengths, reduction = rrhf_official_lengths(widths, candidate_mask), "mean"
        candidates = rrhf_likelihoods(sums, lengths, length_penalty=args.length_penalty)
        rank = rrhf_rank_loss(candidates, scores, candidate_mask)
        sft = rrhf_sft_loss(sums, lengths, scores, candidate_mask, reduction=reduction)
        losses = rrhf_loss(rank, sft, rank_weight=args.rank_weight, sft_weight=args.sft_weight)

        with torch.no_grad():
            best_row, worst_row, is_worse = best_and_worst(inputs)
            described = [("chosen", best_row, torch.ones_like(sft))]
            has_scores = inputs["has_scores"].to(sft.dtype)
            best_scores = scores.masked_fill(~candidate_mask, float("-inf")).amax(dim=1)
            metrics = {"loss/sft": sft, "scores/best": (best_scores * has_scores, has_scores)}
            if args.rank_weight > 0 or not self.model.training:  # else there is only the best
                described.append(("rejected", worst_row, is_worse.to(sft.dtype)))
                no_margins = rank_margins(scores, candidate_mask, delta=0.0)
                mean_scores = scores.sum(dim=1) / candidate_mask.sum(dim=1)
                metrics |= pair_metrics(candidates, scores, candidate_mask, no_margins, active="rank/violations") | {
                    "loss/rank": rank,
                    "rank/kendall_tau": kendall_tau(candidates, scores, candidate_mask),
                    "scores/mean": (mean_scores * has_scores, has_scores),
                }
            for name, rows, counts in described:
                metrics |= row_metrics(name, rows, logps, counts)
                metrics[f"logps_per_token/{name}"] = (logps.means[rows] * counts, counts)
        return losses, metrics
