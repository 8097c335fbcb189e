"""Settings of RRHF."""

from dataclasses import dataclass, field
from typing import ClassVar

from ...trainers.candidate_config import UNUSED_DPO_FIELDS, CandidateConfig

ARITHMETICS = ("paper", "official")
SFT_REDUCTIONS = ("sum", "mean")


@dataclass
class RRHFConfig(CandidateConfig):
    r"""
    Configuration of [`RRHFTrainer`]: the fields below, and everything of [`~trl.DPOConfig`] that has a meaning without
    its loss and its reference model.

    Parameters:
        > The loss: rank_weight * rank + sft_weight * sft

        rank_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the rank term; at least 0. At 0 what is left is fine-tuning on the best candidate of each prompt
            (rejection sampling, best of n), and in training the others are not computed at all.
        sft_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the likelihood of the best candidate; at least 0, and not 0 together with `rank_weight`.
        length_penalty (`float`, *optional*, defaults to `1.0`):
            What candidates are compared by is p_i = S_i / |y_i| ** length_penalty, S the log-likelihood and |y| the
            length in tokens. 1 is the paper's average per token, 0 the sum. At least 0.
        sft_reduction (`str`, *optional*, defaults to `"sum"`):
            `"sum"`: - S of the best candidate, as in the paper. `"mean"`: the same per token of it.
        arithmetic (`str`, *optional*, defaults to `"paper"`):
            - `"paper"`: as above.
            - `"official"`: what the authors' code computes. Both terms are divided by W, the longest prompt +
              completion among the prompt's candidates, in tokens, and not by the length of each answer:
              p_i = S_i / W ** length_penalty, and the second term is - S / W of the best candidate. So candidates are
              compared by their sums. `sft_reduction` has no part in it.

        > Rows and memory

        max_completions_per_forward (`int`, *optional*):
            Most completions that go through the model at once, so that memory does not grow with the length of the
            lists, see [`CandidateConfig`].
        on_invalid_row (`str`, *optional*, defaults to `"error"`):
            `"error"` or `"drop"`, see [`CandidateConfig`].

    Defaults are those of `DPOConfig`, but for `bf16` on a CPU (see [`CandidateConfig`]); in particular `learning_rate`
    stays at 1e-6, while the paper trains LLaMA-7B with 2e-5 and batches of 64 prompts.
    """

    unused_fields: ClassVar[dict[str, str]] = {
        **UNUSED_DPO_FIELDS,
        "loss_type": "set `rank_weight` and `sft_weight`",
        "loss_weights": "set `rank_weight` and `sft_weight`",
        "beta": "the rank term has neither a margin nor a slope; set `rank_weight`",
        "ld_alpha": "set `length_penalty`",
    }

    rank_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the rank term. At least 0; 0 is fine-tuning on the best candidate alone."},
    )
    sft_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the likelihood of the best candidate. At least 0."},
    )
    length_penalty: float = field(
        default=1.0,
        metadata={
            "help": "Exponent of the length by which log-likelihoods are divided before they are compared: 1 is the "
            "average per token (the paper), 0 the sum."
        },
    )
    sft_reduction: str = field(
        default="sum",
        metadata={
            "help": "'sum': log-likelihood of the best candidate (the paper). 'mean': average per token of it.",
            "choices": list(SFT_REDUCTIONS),
        },
    )
    arithmetic: str = field(
        default="paper",
        metadata={
            "help": "'paper', or 'official' for what the authors' code computes: both terms divided by the length of "
            "the prompt's longest row instead of the length of each answer.",
            "choices": list(ARITHMETICS),
        },
    )

    def __post_init__(self):
        self.check_types()
        for name, allowed in (("arithmetic", ARITHMETICS), ("sft_reduction", SFT_REDUCTIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if not 0 <= self.rank_weight < float("inf"):
            raise ValueError(
                f"`rank_weight` must be 0 (no ranking) or more, got {self.rank_weight}: a negative weight reverses "
                "the ranking."
            )
        if not 0 <= self.sft_weight < float("inf"):
            raise ValueError(
                f"`sft_weight` must be 0 (no SFT term) or more, got {self.sft_weight}: a negative weight makes the "
                "best candidate less likely."
            )
        if self.rank_weight == self.sft_weight == 0:
            raise ValueError("`rank_weight` or `sft_weight` must be above 0, got 0 for both: that leaves no loss.")
        if not 0 <= self.length_penalty < float("inf"):
            raise ValueError(
                f"`length_penalty` must be 0 (compare sums) or more, got {self.length_penalty}: a negative one "
                "multiplies by the length."
            )
        if self.rank_weight == 0 and self.length_penalty != 1.0:
            raise ValueError(
                f"`length_penalty` must be 1.0, its default, with rank_weight=0, got {self.length_penalty}: nothing "
                "is compared, so it has no effect. Remove it, or set `rank_weight` above 0."
            )
        if self.rank_weight == 0 and self.arithmetic == "official":
            raise ValueError(
                "`rank_weight` must be above 0 with arithmetic='official', got 0: it divides by the longest of a "
                "prompt's candidates, of which only the best is computed. Set arithmetic='paper', or `rank_weight` "
                "above 0."
            )
        if self.arithmetic == "official" and self.sft_reduction != "sum":
            raise ValueError(
                f"`sft_reduction` must be 'sum', its default, with arithmetic='official', got {self.sft_reduction!r}: "
                "'official' divides by the prompt's longest row. Remove it, or set arithmetic='paper'."
            )
        if self.sft_weight == 0 and self.sft_reduction != "sum":
            raise ValueError(
                f"`sft_reduction` must be 'sum', its default, with sft_weight=0, got {self.sft_reduction!r}: it has "
                "no effect. Remove it, or set `sft_weight` above 0."
            )
        super().__post_init__()
