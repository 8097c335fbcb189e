"""KTO's config."""

from dataclasses import dataclass

import trl

from ...trainers.common_config import SharingConfig


@dataclass
class KTOConfig(SharingConfig, trl.KTOConfig):
    """[`~trl.KTOConfig`] with the fields of [`SharingConfig`]."""

    def __post_init__(self):
        self.check_types()
        if self.per_device_train_batch_size < 2 and self.loss_type != "apo_zero_unpaired":
            raise ValueError(
                f"`per_device_train_batch_size` must be at least 2, got {self.per_device_train_batch_size}: KTO "
                "estimates its reference point from prompts with the answer of another row of the batch."
            )
        super().__post_init__()
