"""TRL's DPO on rows prepared here."""

from typing import Any

import trl

from ...data.trl_columns import for_dpo
from ...runs.curves import DPO_PANELS
from ...trainers.adapter_checks import refuse_drifting_reference
from ...trainers.prepared_rows import PreparedRowsMixin


class DPOTrainer(PreparedRowsMixin, trl.DPOTrainer):
    """
    [`~trl.DPOTrainer`] on the best and the worst answer to each prompt, computing each prompt once for both
    (`args.prefix_sharing`).
    """

    panels = DPO_PANELS
    columns_for = staticmethod(for_dpo)

    def __init__(self, model: Any, *, args: Any, peft_config: Any = None, **kwargs: Any):
        if kwargs.get("ref_model") is None:
            refuse_drifting_reference(model, peft_config, "DPO")
        super().__init__(model, args=args, peft_config=peft_config, **kwargs)
