"""The config of best-of-n."""

from dataclasses import dataclass, field
from typing import ClassVar

import trl

from ...trainers.common_config import TOKENISED, CommonConfig


@dataclass
class BestOfNConfig(CommonConfig, trl.SFTConfig):
    """[`~trl.SFTConfig`] with the fields of [`CommonConfig`]; the prompt is never learned."""

    unused_fields: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("chat_template_path", "eos_token", "dataset_text_field", "dataset_kwargs"), TOKENISED),
        "assistant_only_loss": "the answer alone is learned in any case",
    }

    completion_only_loss: bool | None = field(
        default=True, metadata={"help": "Learn the answer alone; nothing else is offered here."}
    )

    def __post_init__(self):
        self.check_types()
        if self.completion_only_loss is not True:
            raise ValueError(
                f"`completion_only_loss` must be True, got {self.completion_only_loss}: best-of-n learns answers "
                "alone. To learn the prompts too, run TRL's `trl sft` on the file of best answers."
            )
        super().__post_init__()
