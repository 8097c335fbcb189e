"""Settings of the recipe for ORPO, whose trainer is TRL's."""

from dataclasses import dataclass
from typing import ClassVar

from trl.experimental.orpo import ORPOConfig as TRLORPOConfig

from ...trainers.common_config import SharingConfig


@dataclass
class ORPOConfig(SharingConfig, TRLORPOConfig):
    """TRL's `ORPOConfig` with the fields of [`SharingConfig`]."""

    unused_fields: ClassVar[dict[str, str]] = {
        "max_completion_length": "answers are cut by `max_length`",
        "is_encoder_decoder": "models are decoders",
        "generate_during_eval": "it needs an account of a tracking service; sample with `recipes/sample_and_rank.py`",
        "padding_value": "set the padding token of the model's tokenizer",
    }
