"""SFT on the best of n answers."""

import trl

from ...data.rows import RowOptions
from ...data.trl_columns import for_sft
from ...runs.curves import SFT_PANELS
from ...trainers.prepared_rows import PreparedRowsMixin


class BestOfNTrainer(PreparedRowsMixin, trl.SFTTrainer):
    """[`~trl.SFTTrainer`] on the best answer to each prompt, of which the answer alone is learned."""

    panels = SFT_PANELS
    row_options = RowOptions(min_completions=1, best_only=True)
    columns_for = staticmethod(for_sft)

    _prepare_dataset = trl.SFTTrainer._prepare_dataset  # which takes tokens as they are, and may pack them
