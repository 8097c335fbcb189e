"""TRL's KTO on rows prepared here."""

import logging
from typing import Any

import trl
from datasets import Dataset, Features, IterableDataset, List, Value

from ...data.columns import without_files
from ...data.rows import RowOptions
from ...data.tokens import tokenizer_of
from ...data.trl_columns import for_kto, labelled, with_mismatched
from ...runs.curves import KTO_PANELS
from ...trainers.adapter_checks import refuse_drifting_reference
from ...trainers.prepared_rows import PreparedRowsMixin, has_trl_columns

logger = logging.getLogger(__name__)


class KTOTrainer(PreparedRowsMixin, trl.KTOTrainer):
    """
    [`~trl.KTOTrainer`] on single answers that are good or bad: rows of `prompt`, `completion` and `label`, or of
    several answers, of which the best is good and the worst bad. They are shuffled by `args.seed`: the reference point
    is estimated from prompts with the answer of the row before, which has to be another prompt's. So a batch seldom
    holds a prompt twice, and prefix sharing (`args.prefix_sharing`) mostly leaves out padding.
    """

    panels = KTO_PANELS

    row_options = RowOptions(min_completions=1)
    columns_for = staticmethod(for_kto)

    def __init__(self, model: Any, *, args: Any, peft_config: Any = None, **kwargs: Any):
        if kwargs.get("ref_model") is None:
            refuse_drifting_reference(model, peft_config, "KTO")
        super().__init__(model, args=args, peft_config=peft_config, **kwargs)

    def trl_rows(self, dataset, processing_class, args, name):
        columns = dataset.column_names or list(next(iter(dataset), {}))
        if has_trl_columns(columns):
            return dataset
        if {"completion", "label"} <= set(columns):
            dataset = without_files(dataset, name)
            features = None
            if dataset.features is not None:
                completions, scores = List(dataset.features["completion"]), List(Value("float64"))
                features = Features({**dataset.features, "completions": completions, "scores": scores})
                del features["completion"], features["label"]
            dataset = dataset.map(
                labelled, with_indices=True, remove_columns=["completion", "label"], features=features
            )
        dataset = super().trl_rows(dataset, processing_class, args, name).shuffle(seed=args.seed)
        if name == "train" and isinstance(dataset, Dataset):
            _say_if_unbalanced(dataset["label"], args)
        if args.loss_type == "apo_zero_unpaired":  # the one loss without a reference point
            return dataset
        size = args.per_device_train_batch_size if name == "train" else args.per_device_eval_batch_size
        dataset = dataset.map(with_mismatched, batched=True, batch_size=size)
        if isinstance(dataset, IterableDataset):
            return dataset
        return self._limits.check(dataset, name, tokenizer_of(processing_class), args.max_length)


def _say_if_unbalanced(labels: list[bool], args: Any) -> None:
    """KTO (https://huggingface.co/papers/2402.01306, eq. 8) wants good and bad answers of about equal total weight."""
    good = sum(labels)
    weights = args.desirable_weight * good, args.undesirable_weight * (len(labels) - good)
    if min(weights) == 0 or not 1 <= weights[0] / weights[1] <= 3 / 2:
        logger.log(
            logging.WARNING,
            f"{good} answers are good and {len(labels) - good} bad, with the weights {args.desirable_weight} and "
            f"{args.undesirable_weight}. KTO advises weights with which good over bad is between 1 and 3/2: set "
            "`desirable_weight` or `undesirable_weight`.",
        )
