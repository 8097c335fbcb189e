"""DPO's config."""

from dataclasses import dataclass
from typing import ClassVar

import trl

from ...trainers.common_config import SharingConfig


@dataclass
class DPOConfig(SharingConfig, trl.DPOConfig):
    """[`~trl.DPOConfig`] with the fields of [`SharingConfig`]."""

    unused_fields: ClassVar[dict[str, str]] = {
        "truncation_mode": "cut prompts before training; completions are cut at the end"
    }
