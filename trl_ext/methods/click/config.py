"""Settings of CLICK."""

from dataclasses import dataclass, field
from typing import ClassVar

from ...trainers.candidate_config import UNUSED_DPO_FIELDS, CandidateConfig


@dataclass
class CLICKConfig(CandidateConfig):
    r"""Configuration of [`CLICKTrainer`]: the fields below, and everything of [`~trl.DPOConfig`] that has a meaning
    without its loss and its reference model.

    Parameters:
        > The loss: lm + pair_weight * hinge

        margin (`float`, *optional*, defaults to `15.0`):
            Margin in nats of summed log-likelihood. Positive. 20 for detoxification, 15 for sentiment and repetition
            in the authors' code, whose command line calls it `alpha`.
        pair_weight (`float`, *optional*, defaults to `0.3`):
            Weight of the hinge; at least 0. 0.5 for detoxification, 0.1 for sentiment, 0.3 for repetition. At 0 what
            is left is the language-modelling loss.

        > Rows and memory

        max_completions_per_forward (`int`, *optional*):
            Most completions that go through the model at once, see [`CandidateConfig`].
        on_invalid_row (`str`, *optional*, defaults to `"error"`):
            `"error"` or `"drop"`, see [`CandidateConfig`].

    Defaults are those of `DPOConfig`, but for `bf16` on a CPU (see [`CandidateConfig`]); in particular `learning_rate`
    stays at 1e-6, while the authors use 5e-5.
    """

    unused_fields: ClassVar[dict[str, str]] = {
        **UNUSED_DPO_FIELDS,
        "loss_type": "set `margin` and `pair_weight`",
        "loss_weights": "set `pair_weight`",
        "beta": "set `margin`, in nats",
    }

    margin: float = field(default=15.0, metadata={"help": "Margin in nats of summed log-likelihood. Positive."})
    pair_weight: float = field(
        default=0.3, metadata={"help": "Weight of the hinge beside the language-modelling loss. At least 0."}
    )

    def __post_init__(self):
        self.check_types()
        if not 0 < self.margin < float("inf"):
            raise ValueError(f"`margin` must be above 0, got {self.margin}: without a margin, ties satisfy the hinge.")
        if not 0 <= self.pair_weight < float("inf"):
            raise ValueError(
                f"`pair_weight` must be 0 (no pairs) or more, got {self.pair_weight}: a negative weight prefers the "
                "negatives."
            )
        if self.pair_weight == 0 and self.margin != 15.0:
            raise ValueError(
                f"`margin` must be 15.0, its default, with pair_weight=0, got {self.margin}: without pairs it has no "
                "effect. Remove `margin`, or set `pair_weight` above 0."
            )
        super().__post_init__()
