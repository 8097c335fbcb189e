"""IPO."""

import textwrap
from typing import Any

import torch

from ...logps import CompletionLogps, by_prompt
from ...losses import ipo_loss
from ...metrics import pair_metrics, row_metrics
from ...runs.curves import DPO_PANELS
from ...trainers.batches import best_and_worst
from ...trainers.referenced_trainer import ReferencedTrainer
from .config import IPOConfig


class IPOTrainer(ReferencedTrainer):
    r"""
    Trainer for IPO, identity preference optimisation (https://huggingface.co/papers/2310.12036), eq. 17. With y+ and
    y- the better and the worse answer to x:

        loss = (r(y+) - r(y-) - 1 / (2 beta))^2,    r(y) = log p(y|x) / p_reference(y|x)

    as a mean over prompts, r summed over the tokens (`log_ratios="sum"`) or averaged over them ("mean"). It takes
    `DPOTrainer`'s place and arguments; with "mean" its numbers are those of TRL's `loss_type="ipo"`.

    What it has beyond TRL's: the paper's sums; rows of K ranked answers, with the mean over all strictly ordered
    pairs, where the paper has K = 2; and a reference that goes over the data once, when the trainer is constructed,
    and is let go.

    Logged besides `Trainer`'s own: `rewards/{chosen,rejected}` (beta times r of the best and the worst answer),
    `rewards/margins` (beta times the difference, mean over pairs; the target is 1/2), `rewards/accuracies`,
    `logps/{chosen,rejected}` (summed, in nats), `lengths/{chosen,rejected}` in tokens, `logits/{chosen,rejected}`,
    `entropy`, `mean_token_accuracy`, `num_tokens`.

    Example:
    ```python
    from datasets import load_dataset
    from trl_ext import IPOConfig, IPOTrainer

    trainer = IPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=IPOConfig("Qwen2.5-0.5B-IPO", beta=0.1, log_ratios="sum"),
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    )
    trainer.train()
    ```

    Args:
        model, ref_model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics,
        callbacks, optimizers, quantization_config, peft_config:
            As in [`~trl.DPOTrainer`], with `args` an [`IPOConfig`]. `ref_model` may be a name; by default it is the
            model before training.

    Raises:
        TypeError, ValueError, NotImplementedError: see [`ReferencedTrainer`]; before any weight is loaded.
    """

    panels = DPO_PANELS
    config_class = IPOConfig
    _tag_names = ["trl", "ipo"]
    _name = "IPO"
    _paper = {
        "title": "A General Theoretical Paradigm to Understand Learning from Human Preferences",
        "id": "2310.12036",
        "citation": textwrap.dedent("""\
            @inproceedings{azar2024general,
                title     = {{A General Theoretical Paradigm to Understand Learning from Human Preferences}},
                author    = {Mohammad Gheshlaghi Azar and Mark Rowland and Bilal Piot and Daniel Guo and Daniele
                             Calandriello and Michal Valko and R{\\'{e}}mi Munos},
                booktitle = {Proceedings of the 27th International Conference on Artificial Intelligence and
                             Statistics},
                year      = 2024,
            }"""),
    }

    def loss_from_logps(
        self, logps: CompletionLogps, inputs: dict[str, torch.Tensor], outputs: Any
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        beta, candidates = self.args.beta, inputs["candidate_index"]
        log_ratios = logps.sums - inputs["reference_logps"]
        ratios = log_ratios / logps.lengths.clamp(min=1) if self.args.log_ratios == "mean" else log_ratios
        scores, mask = inputs["scores"], candidates >= 0
        losses = ipo_loss(by_prompt(ratios, candidates), scores, mask, beta=beta)
        self.check_first_loss(losses, log_ratios, logps.lengths)
        with torch.no_grad():
            best, worst, is_worse = best_and_worst(inputs)
            metrics = pair_metrics(beta * by_prompt(ratios, candidates), scores, mask)
            metrics["rewards/chosen"] = beta * ratios[best]
            metrics["rewards/rejected"] = (beta * ratios[worst] * is_worse, is_worse.to(ratios.dtype))
            metrics |= row_metrics("chosen", best, logps) | row_metrics("rejected", worst, logps, is_worse)
        return losses, metrics

    @property
    def expected_first_loss(self) -> str:
        return f"1 / (2 beta)^2 = {(2 * self.args.beta) ** -2:.4f}"
