"""The config of reward models."""

from dataclasses import dataclass, field
from typing import ClassVar

import trl

from ...trainers.common_config import TOKENISED, SharingConfig


@dataclass
class RewardConfig(SharingConfig, trl.RewardConfig):
    """
    [`~trl.RewardConfig`] with the fields of [`SharingConfig`], and

    Parameters:
        difference_penalty (`float`, *optional*, defaults to `0.0`):
            Weight of the squared difference of the two rewards, which keeps it finite where preferences are certain.
        max_difference (`float`, *optional*):
            Largest difference of the two rewards that is still rewarded: beyond it a pair has no gradient.

    Raises:
        ValueError: a value out of its range.
    """

    unused_fields: ClassVar[dict[str, str]] = {"chat_template_path": TOKENISED, "eos_token": TOKENISED}

    difference_penalty: float = field(
        default=0.0, metadata={"help": "Weight of the squared difference of the two rewards; 0: none."}
    )
    max_difference: float | None = field(
        default=None, metadata={"help": "Largest difference of the two rewards that the loss still asks for."}
    )

    def __post_init__(self):
        self.check_types()
        if not 0 <= self.difference_penalty < float("inf"):
            raise ValueError(
                f"`difference_penalty` must be 0 (no penalty) or more, got {self.difference_penalty}: a negative "
                "penalty drives rewards apart."
            )
        if self.max_difference is not None and not self.max_difference > 0:
            raise ValueError(
                f"`max_difference` must be above 0, got {self.max_difference}: below that, the gradient ends before a "
                "pair is in order. Remove it for no limit."
            )
        super().__post_init__()
