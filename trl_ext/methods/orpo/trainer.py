"""TRL's trainer for ORPO as the recipe uses it; apart from the others, as TRL has it among its experiments."""

from typing import Any

from transformers import BitsAndBytesConfig
from trl.experimental.orpo import ORPOTrainer as TRLORPOTrainer

from ...data.trl_columns import for_orpo
from ...runs.curves import ORPO_PANELS
from ...trainers.prepared_rows import PreparedRowsMixin


class ORPOTrainer(PreparedRowsMixin, TRLORPOTrainer):
    """
    TRL's `ORPOTrainer` on the best and the worst answer to each prompt, computing each prompt once for both
    (`args.prefix_sharing`).
    """

    panels = ORPO_PANELS
    columns_for = staticmethod(for_orpo)
    uses_fused_head = False

    def __init__(self, model: Any, *, args: Any, quantization_config: BitsAndBytesConfig | None = None, **kwargs: Any):
        if isinstance(model, str):
            # TRL would spread the model over all devices, which several processes cannot each do
            args.model_init_kwargs = {"device_map": None, **(args.model_init_kwargs or {})}
            if quantization_config is not None:
                args.model_init_kwargs["quantization_config"] = quantization_config
        super().__init__(model, args=args, **kwargs)

    def tokenize_row(self, feature, model=None):
        """They are tokens already."""
        return feature
