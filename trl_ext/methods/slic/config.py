"""Settings of SLiC-HF."""

from dataclasses import dataclass, field
from typing import ClassVar

from ...trainers.candidate_config import UNUSED_DPO_FIELDS, CandidateConfig

CALIBRATIONS = ("rank", "margin", "list_rank", "expected_reward")
REG_TYPES = ("cross_entropy", "kl")
LOGPS_REDUCTIONS = ("sum", "mean")
# calibrations in which the size of a score matters, not only the order
SCORE_VALUE_CALIBRATIONS = ("margin", "expected_reward")


@dataclass
class SLiCConfig(CandidateConfig):
    r"""
    Configuration of [`SLiCTrainer`]: the fields below, and everything of [`~trl.DPOConfig`] that has a meaning without
    its loss and its reference model.

    Parameters:
        > The loss: calibration + reg_weight * regularization

        calibration (`str`, *optional*, defaults to `"rank"`):
            How candidates are compared. S is the log-likelihood of a candidate, s its score.

            - `"rank"`: relu(delta - S(y+) + S(y-)), the loss of SLiC-HF. Scores only order.
            - `"margin"`: relu(delta * (s(y+) - s(y-)) - S(y+) + S(y-)). Needs score values.
            - `"list_rank"`: sum over i < j of relu(delta * (j - i) - S(y_i) + S(y_j)), best first. Scores only order.
            - `"expected_reward"`: - sum_i s(y_i) P(y_i) / sum_j P(y_j). Needs score values; `delta` has no part in it.
        delta (`float`, *optional*, defaults to `1.0`):
            Margin in nats (SLiC-HF §4.1 uses 1.0). For `"margin"` nats per unit of score, for `"list_rank"` nats per
            place. Must be positive.
        reg_weight (`float`, *optional*, defaults to `0.1`):
            λ, the weight of the regulariser; at least 0. The paper does not report its value; 0.1 is what later
            comparisons settled on. At 0 the regulariser's own target is not computed at all.
        reg_type (`str`, *optional*, defaults to `"cross_entropy"`):
            - `"cross_entropy"`: - S(y_ref) under the model in training (SLiC-HF). No second model.
            - `"kl"`: KL(model || fine-tuned model), over the whole vocabulary, at each token of y_ref, added up. The
              regulariser of the earlier SLiC paper, and the only setting that holds a reference model. With a
              `peft_config` that is the base model, with a `PeftModel` a copy of its adapter as it starts, otherwise a
              second copy of the weights.
        logps_reduction (`str`, *optional*, defaults to `"sum"`):
            `"sum"`: S adds up the token log-probabilities, as in the paper. `"mean"`: their average per token, in the
            calibration and in the regulariser alike; `delta` is then nats per token.

        > Rows and memory

        max_completions_per_forward (`int`, *optional*):
            Most completions that go through the model at once, see [`CandidateConfig`]. Not with `reg_type="kl"`.
        on_invalid_row (`str`, *optional*, defaults to `"error"`):
            `"error"` or `"drop"`, see [`CandidateConfig`].

    Defaults are those of `DPOConfig`, but for `bf16` on a CPU (see [`CandidateConfig`]); in particular `learning_rate`
    stays at 1e-6, while the paper calibrates T5-Large with 1e-5.
    """

    unused_fields: ClassVar[dict[str, str]] = {
        **UNUSED_DPO_FIELDS,
        "loss_type": "set `calibration`",
        "loss_weights": "set `reg_weight`",
        "beta": "set `delta`, the margin in nats; TRL's hinge with `beta` has the margin 1 / beta and the slope beta",
        "ld_alpha": "set `logps_reduction='mean'` if long answers weigh too much",
        "f_divergence_type": "set `reg_type` and `reg_weight`",
        "f_alpha_divergence_coef": "set `reg_type` and `reg_weight`",
        "precompute_ref_log_probs": (
            "with `reg_type='cross_entropy'` there is nothing to precompute, and the 'kl' regulariser compares whole "
            "distributions over the vocabulary, which one number per answer cannot hold. To save memory with 'kl', "
            "train a LoRA adapter: the base model is then the reference"
        ),
    }

    calibration: str = field(
        default="rank",
        metadata={
            "help": "How candidates are compared: 'rank' (SLiC-HF), 'margin', 'list_rank' or 'expected_reward' (the "
            "earlier SLiC paper). 'margin' and 'expected_reward' need score values.",
            "choices": list(CALIBRATIONS),
        },
    )
    delta: float = field(
        default=1.0,
        metadata={"help": "Margin in nats; per unit of score for 'margin', per place for 'list_rank'. Positive."},
    )
    reg_weight: float = field(
        default=0.1,
        metadata={"help": "Weight of the regulariser, the paper's lambda. At least 0."},
    )
    reg_type: str = field(
        default="cross_entropy",
        metadata={
            "help": "'cross_entropy': negative log-likelihood of y_ref, no reference model. 'kl': KL to the "
            "fine-tuned model at each token of y_ref, the only setting that holds a reference model.",
            "choices": list(REG_TYPES),
        },
    )
    logps_reduction: str = field(
        default="sum",
        metadata={
            "help": "'sum': log-likelihoods add up token log-probabilities (the paper). 'mean': average per token.",
            "choices": list(LOGPS_REDUCTIONS),
        },
    )

    @property
    def uses_reference_model(self) -> bool:
        return self.reg_type == "kl"

    def __post_init__(self):
        self.check_types()
        for name, allowed in (
            ("calibration", CALIBRATIONS),
            ("reg_type", REG_TYPES),
            ("logps_reduction", LOGPS_REDUCTIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if not 0 < self.delta < float("inf"):
            raise ValueError(f"`delta` must be above 0, got {self.delta}: without a margin, ties satisfy the hinge.")
        if not 0 <= self.reg_weight < float("inf"):
            raise ValueError(
                f"`reg_weight` must be 0 (no regulariser) or more, got {self.reg_weight}: a negative weight makes "
                "y_ref less likely."
            )
        if self.calibration == "expected_reward" and self.delta != 1.0:
            raise ValueError(
                f"`delta` must be 1.0, its default, with calibration='expected_reward', got {self.delta}: it has no "
                "effect. Remove it, or choose another `calibration`."
            )
        if self.reg_type == "kl" and self.reg_weight == 0:
            raise ValueError(
                "`reg_weight` must be above 0 with reg_type='kl', got 0: a reference model would be loaded without "
                "effect. Set it above 0, or set reg_type='cross_entropy'."
            )
        if self.reg_type == "kl" and self.max_completions_per_forward is not None:
            raise ValueError(
                "`max_completions_per_forward` must not be set with reg_type='kl', got "
                f"{self.max_completions_per_forward}: that regulariser compares two models over the whole batch. "
                "Remove it, or set reg_type='cross_entropy'."
            )
        super().__post_init__()
