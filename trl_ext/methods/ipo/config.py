"""Settings of IPO."""

from dataclasses import dataclass, field
from typing import ClassVar

from ...trainers.candidate_config import UNUSED_DPO_FIELDS, CandidateConfig

LENGTHS = ("mean", "sum")


@dataclass
class IPOConfig(CandidateConfig):
    r"""
    Configuration of [`IPOTrainer`]: the fields below, and everything of [`~trl.DPOConfig`] that has a meaning for IPO
    (https://huggingface.co/papers/2310.12036).

    Parameters:
        beta (`float`, *optional*, defaults to `0.1`):
            Above 0; the paper's tau. The log-ratios of the two answers are to differ by `1 / (2 beta)` nats.
        log_ratios (`str`, *optional*, defaults to `"mean"`):
            `"mean"`: log-ratios per token, as in TRL's `loss_type="ipo"`, where the authors are said to have confirmed
            it. `"sum"`: of the whole answer, the paper's formula. With the same `beta` the target of the first is as
            many nats *per token* as that of the second is in all: 5 with the default.
        precompute_ref_batch_size (`int`, *optional*):
            Rows per forward while the reference's log-likelihoods are computed; by default
            `per_device_eval_batch_size`.
        on_invalid_row, prefix_sharing, check_prefix_sharing, max_completions_per_forward:
            See [`CandidateConfig`].

    Raises:
        ValueError: a value out of its range, or a setting of `DPOConfig` that means nothing here, with what to set
            instead.
    """

    unused_fields: ClassVar[dict[str, str]] = {
        **{name: why for name, why in UNUSED_DPO_FIELDS.items() if name not in ("beta", "precompute_ref_batch_size")},
        "loss_type": "the loss is IPO's; set `log_ratios`",
        "precompute_ref_log_probs": "they always are, before training",
        "sync_ref_model": "the reference is the model before training",
        "disable_dropout": "the reference is the same model without dropout",
    }

    beta: float = field(default=0.1, metadata={"help": "tau of the paper, above 0: the target is 1 / (2 beta) nats."})
    log_ratios: str = field(
        default="mean",
        metadata={
            "help": "'mean': per token, as in TRL. 'sum': of the whole answer, the paper's formula.",
            "choices": list(LENGTHS),
        },
    )

    def __post_init__(self):
        self.check_types()
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"`beta` must be above 0, got {self.beta}: the target of the loss is 1 / (2 beta).")
        if self.log_ratios not in LENGTHS:
            raise ValueError(f"`log_ratios` must be one of {', '.join(LENGTHS)}, got {self.log_ratios!r}.")
        if self.precompute_ref_batch_size is not None and self.precompute_ref_batch_size < 1:
            raise ValueError(f"`precompute_ref_batch_size` must be at least 1, got {self.precompute_ref_batch_size}.")
        super().__post_init__()
