"""TRL's reward trainer on rows prepared here."""

import torch
import trl

from ...data.trl_columns import for_reward
from ...losses import bradley_terry_loss
from ...runs.curves import REWARD_PANELS
from ...trainers.prepared_rows import PreparedRowsMixin


class RewardTrainer(PreparedRowsMixin, trl.RewardTrainer):
    """
    [`~trl.RewardTrainer`] on the best and the worst answer to each prompt, with two ways to keep rewards bounded; see
    [`bradley_terry_loss`]. Rows may have a `margin` (https://huggingface.co/papers/2307.09288, eq. 2). The prompt of a
    pair is computed once (`args.prefix_sharing`).
    """

    panels = REWARD_PANELS
    columns_for = staticmethod(for_reward)
    uses_fused_head = False
    kept_columns = ("margin",)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.args.difference_penalty or self.args.max_difference is not None:
            chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
            margins = inputs.get("margin", torch.zeros_like(chosen))
            settings = {"difference_penalty": self.args.difference_penalty, "max_difference": self.args.max_difference}
            plain = bradley_terry_loss(chosen, rejected, margins)
            loss = loss + (bradley_terry_loss(chosen, rejected, margins, **settings) - plain).mean()
        return (loss, outputs) if return_outputs else loss
