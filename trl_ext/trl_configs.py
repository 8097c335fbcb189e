"""Configs of the recipes whose trainers are TRL's: TRL's own, and what all recipes share."""

from dataclasses import dataclass, field
from typing import ClassVar

import trl

from .common_config import CommonConfig, SharingConfig
from .scoring import ScorerConfig

_TOKENISED = "rows are tokenised before; prepare the tokenizer of the model instead"


@dataclass
class DPOConfig(SharingConfig, trl.DPOConfig):
    """[`~trl.DPOConfig`] with the fields of [`SharingConfig`]."""

    unused_fields: ClassVar[dict[str, str]] = {
        "truncation_mode": "cut prompts before training; completions are cut at the end"
    }


@dataclass
class KTOConfig(CommonConfig, trl.KTOConfig):
    """[`~trl.KTOConfig`] with the fields of [`CommonConfig`]."""

    def __post_init__(self):
        self.check_types()
        if self.per_device_train_batch_size < 2 and self.loss_type != "apo_zero_unpaired":
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size}: KTO estimates its reference point "
                "from prompts with the answer of another row of the batch. Set it to 2 or more."
            )
        super().__post_init__()


@dataclass
class RewardConfig(CommonConfig, trl.RewardConfig):
    """
    [`~trl.RewardConfig`] with the fields of [`CommonConfig`], and

    Parameters:
        difference_penalty (`float`, *optional*, defaults to `0.0`):
            Weight of the squared difference of the two rewards, which keeps it finite where preferences are certain.
        max_difference (`float`, *optional*):
            Largest difference of the two rewards that is still rewarded: beyond it a pair has no gradient.

    Raises:
        ValueError: a value out of its range.
    """

    unused_fields: ClassVar[dict[str, str]] = {"chat_template_path": _TOKENISED, "eos_token": _TOKENISED}

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
                f"difference_penalty={self.difference_penalty} would drive rewards apart. Set it to 0 (none) or more."
            )
        if self.max_difference is not None and not self.max_difference > 0:
            raise ValueError(
                f"max_difference={self.max_difference} would end the gradient before a pair is in order. Set it above "
                "0, or leave it out."
            )
        super().__post_init__()


@dataclass
class BestOfNConfig(CommonConfig, trl.SFTConfig):
    """[`~trl.SFTConfig`] with the fields of [`CommonConfig`]; the prompt is never learned."""

    unused_fields: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("chat_template_path", "eos_token", "dataset_text_field", "dataset_kwargs"), _TOKENISED),
        "assistant_only_loss": "the answer alone is learned in any case",
    }

    completion_only_loss: bool | None = field(
        default=True, metadata={"help": "Learn the answer alone; nothing else is offered here."}
    )

    def __post_init__(self):
        self.check_types()
        if self.completion_only_loss is not True:
            raise ValueError(
                f"completion_only_loss={self.completion_only_loss} would learn the prompts too. Leave it out; for "
                "that use TRL's `trl sft` on the file of best answers."
            )
        super().__post_init__()


@dataclass
class RLOOConfig(ScorerConfig, CommonConfig, trl.RLOOConfig):
    """
    [`~trl.RLOOConfig`] with the fields of [`CommonConfig`] and of [`ScorerConfig`], and

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
