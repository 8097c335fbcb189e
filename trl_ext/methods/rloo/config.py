"""RLOO's config."""

from dataclasses import dataclass, field

import trl

from ...scoring.config import ScorerConfig
from ...trainers.common_config import SharingConfig


@dataclass
class RLOOConfig(ScorerConfig, SharingConfig, trl.RLOOConfig):
    """
    [`~trl.RLOOConfig`] with the fields of [`SharingConfig`] and of [`ScorerConfig`], and

    Parameters:
        rewards (`list[str]`, *optional*): what the policy is trained towards: `file.py:function`,
            `package.module:function` with TRL's reward-function signature, or a reward model (a folder or a name of
            the Hub), such as `recipes/reward.py` trains. Several are added up with `reward_weights`.

    Raises:
        ValueError: a value out of its range.
    """

    rewards: list[str] | None = field(
        default=None,
        metadata={"help": "What scores: file.py:function, package.module:function, or a reward model. Added up."},
    )

    def __post_init__(self):
        self.check_types()
        if isinstance(self.rewards, str):
            self.rewards = [self.rewards]
        super().__post_init__()
