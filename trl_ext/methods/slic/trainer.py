"""SLiC-HF."""

import contextlib
import textwrap
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..._trl import disable_gradient_checkpointing, use_adapter
from ...data.rows import RowOptions
from ...execution.forward import MODEL_KEYS, add_kl_head, score_completions
from ...logps import CompletionLogps, by_prompt
from ...losses import (
    place_margins,
    rank_margins,
    score_margins,
    slic_expected_reward_loss,
    slic_list_rank_loss,
    slic_loss,
    slic_margin_loss,
    slic_rank_loss,
)
from ...metrics import pair_metrics, row_metrics
from ...runs.curves import SLIC_PANELS
from ...trainers.batches import best_and_worst
from ...trainers.candidate_trainer import CandidateTrainer
from .config import SCORE_VALUE_CALIBRATIONS, SLiCConfig

# calibration -> its loss, and the gap it wants between two candidates
HINGES = {
    "rank": (slic_rank_loss, rank_margins),
    "margin": (slic_margin_loss, score_margins),
    "list_rank": (slic_list_rank_loss, place_margins),
}


class SLiCTrainer(CandidateTrainer):
    r"""
    Trainer for SLiC-HF, sequence likelihood calibration with human feedback
    (https://huggingface.co/papers/2305.10425), eq. 4:

        loss = relu(delta - S(y+) + S(y-)) - lambda * S(y_ref),        S(y) = sum_t log P(y_t | x, y_<t)

    as a mean over prompts. It takes `DPOTrainer`'s place and arguments; only the loss, its config and the rows it
    accepts differ. There is no reference model: y_ref is the row's `reference` where the dataset has that column, else
    the best candidate (`chosen`), whose log-likelihood is already there.

    `SLiCConfig` offers the other calibration losses and the KL regulariser of the predecessor
    (https://huggingface.co/papers/2210.00045), ranked lists of any length, and likelihoods averaged over length.

    Departures from the papers, each chosen because the papers leave it open:

    - With more than two candidates, `"rank"` and `"margin"` average over all strictly ordered pairs instead of drawing
      one.
    - The regulariser adds up over tokens as the formula does. Whether the authors' code divides by length is not
      reported.
    - The KL regulariser's direction is not stated in any source we found. Here it is KL(model || fine-tuned model),
      the direction of RLHF's penalty.

    Logged besides `Trainer`'s own: `loss/calibration`, `loss/regularization` (before `reg_weight`), `hinge/active`
    (share of pairs still inside the margin), `rewards/margins` and `rewards/accuracies` (over all ordered pairs; the
    reward of an answer is its S), `logps/{chosen,rejected,reference}` (summed, whatever `logps_reduction`),
    `lengths/{chosen,rejected,reference}` in tokens, `logits/{chosen,rejected}`, `entropy`, `mean_token_accuracy`,
    `num_tokens`. With lists, "chosen" is the best candidate and "rejected" the worst, which a prompt whose candidates
    are all equally good does not have.

    Example:
    ```python
    from datasets import load_dataset
    from trl_ext import SLiCConfig, SLiCTrainer

    trainer = SLiCTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=SLiCConfig("Qwen2.5-0.5B-SLiC", delta=1.0, reg_weight=0.1),
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    )
    trainer.train()
    ```

    Args:
        model, ref_model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics,
        callbacks, optimizers, quantization_config, peft_config:
            As in [`~trl.DPOTrainer`], with `args` a [`SLiCConfig`]. `ref_model` is taken only with `reg_type="kl"`.
    """

    panels = SLIC_PANELS
    config_class = SLiCConfig
    loss_terms = {"loss/calibration": None, "loss/regularization": "reg_weight"}
    _tag_names = ["trl", "slic-hf"]
    _name = "SLiC-HF"
    _paper = {
        "title": "SLiC-HF: Sequence Likelihood Calibration with Human Feedback",
        "id": "2305.10425",
        "citation": textwrap.dedent("""\
            @article{zhao2023slichf,
                title   = {{SLiC-HF: Sequence Likelihood Calibration with Human Feedback}},
                author  = {Yao Zhao and Rishabh Joshi and Tianqi Liu and Misha Khalman and Mohammad Saleh and
                           Peter J. Liu},
                year    = 2023,
                journal = {arXiv preprint arXiv:2305.10425},
            }"""),
    }

    def _row_options(self, args: SLiCConfig) -> RowOptions:
        return RowOptions(
            max_length=args.max_length,
            score_values=args.calibration in SCORE_VALUE_CALIBRATIONS,
            reference=args.reg_weight > 0,
        )

    def loss_from_logps(
        self, logps: CompletionLogps, inputs: dict[str, torch.Tensor], outputs: Any
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        args = self.args
        scores, candidate_index = inputs["scores"], inputs["candidate_index"]
        candidate_mask, reference_row = candidate_index >= 0, inputs["target_index"]
        likelihoods = logps.sums if args.logps_reduction == "sum" else logps.means
        candidates = by_prompt(likelihoods, candidate_index)

        if args.calibration == "expected_reward":
            calibration = slic_expected_reward_loss(candidates, scores, candidate_mask)
        else:
            hinge_loss, wanted_gaps = HINGES[args.calibration]
            calibration = hinge_loss(candidates, scores, candidate_mask, delta=args.delta)
        if args.reg_type == "cross_entropy":
            regularization = -likelihoods[reference_row]
        else:
            regularization = self._reference_kl(outputs.kl, inputs)
            if args.logps_reduction == "mean":
                regularization = regularization / logps.lengths[reference_row].clamp(min=1)
        losses = slic_loss(calibration, regularization, reg_weight=args.reg_weight)

        with torch.no_grad():
            best_row, worst_row, is_worse = best_and_worst(inputs)
            margins = None
            if args.calibration != "expected_reward":
                margins = wanted_gaps(scores, candidate_mask, delta=args.delta)
            metrics = {
                "loss/calibration": calibration,
                "loss/regularization": regularization,
                **pair_metrics(candidates, scores, candidate_mask, margins),
                **row_metrics("chosen", best_row, logps),
                **row_metrics("rejected", worst_row, logps, is_worse),
                **row_metrics("reference", reference_row, logps),
            }
        return losses, metrics

    # The KL regulariser, and with it everything that has to do with a reference model

    def _prepare_reference_model(self) -> None:
        policy = self.model.get_base_model() if is_peft_model(self.model) else self.model
        if self.ref_model is None:  # PEFT: the reference is the same model without its adapter
            head = policy.get_output_embeddings()
            if isinstance(head, AuxiliaryTrainingWrapper):
                raise NotImplementedError(
                    "An adapter must not train the LM head (`modules_to_save` or `trainable_token_indices`) with "
                    "reg_type='kl': the reference uses the same head. Remove the head from the adapter, or set "
                    "reg_type='cross_entropy'."
                )
            for name, parameter in self.model.named_parameters():
                if ".ref." in name:  # not every kind of adapter is frozen by TRL's copying it
                    parameter.requires_grad_(False)
            add_kl_head(policy, policy.get_output_embeddings)
        else:
            reference = self.accelerator.unwrap_model(self.ref_model)
            add_kl_head(policy, reference.get_output_embeddings)
            add_kl_head(reference)

    def forward_batch(self, model: nn.Module, inputs: dict[str, torch.Tensor], **model_kwargs: Any):
        if not self.args.uses_reference_model:
            return super().forward_batch(model, inputs, **model_kwargs)
        # rows are prompt-major, so the targets' rows ascend and both passes mark the same positions in the same order
        target_mask = torch.zeros_like(inputs["completion_mask"][:, 1:], dtype=torch.bool)
        reference_row = inputs["target_index"]
        target_mask[reference_row] = inputs["completion_mask"][reference_row, 1:].bool()
        return super().forward_batch(
            model,
            inputs,
            hidden_mask=target_mask,
            reference_hidden=self._reference_hidden_states(inputs, target_mask),
            **model_kwargs,
        )

    @torch.no_grad()
    def _reference_hidden_states(self, inputs: dict[str, torch.Tensor], target_mask: torch.Tensor) -> torch.Tensor:
        """The reference model's hidden states at the tokens of y_ref, `(M, H)`; only those rows are run."""
        rows = inputs["target_index"]
        targets = {key: inputs[key][rows] for key in (*MODEL_KEYS, "completion_mask") if key in inputs}
        model, adapter_off = self.ref_model, contextlib.nullcontext()
        if model is None:
            model, unwrapped = self.model, self.accelerator.unwrap_model(self.model)
            adapter_off = use_adapter(unwrapped, "ref" if "ref" in unwrapped.peft_config else None)
        with adapter_off, disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            return score_completions(model, targets, hidden_mask=target_mask[rows]).hidden_states

    def _reference_kl(self, kl: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Add up the KL at the tokens of y_ref: `(M,)` to `(B,)`."""
        tokens_per_prompt = inputs["completion_mask"][inputs["target_index"], 1:].sum(dim=1)
        prompt = torch.arange(len(tokens_per_prompt), device=kl.device).repeat_interleave(tokens_per_prompt)
        return kl.new_zeros(len(tokens_per_prompt)).index_add(0, prompt, kl)
