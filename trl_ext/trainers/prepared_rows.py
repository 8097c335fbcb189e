"""TRL's trainers on rows prepared here."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict, IterableDataset

from ..data.limits import Limits
from ..data.prepare import PREPARED_FEATURES, PreparationReport, is_prepared, prepare_dataset
from ..data.rows import RowOptions
from ..data.tokens import tokenizer_of
from ..execution.prefix_sharing import refuse_unless_shareable, sharing_from_the_start
from ..runtime.models import load_processor, model_to_start_from
from ..runtime.trust import explain_remote_code, weights_only
from .adapter_checks import check_adapter, keeps_base_weights
from .checks import check_sampling_strategy, with_lengths
from .resumable import ResumableTrainer


class PreparedRowsMixin(ResumableTrainer):
    """
    A base to put before a trainer of TRL in the list of bases: rows are checked, tokenised and cut as for every
    trainer here (`data/`), before any weight is loaded, and TRL gets the tokens.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]), args, train_dataset, eval_dataset, processing_class:
            As in TRL, with rows as described in `data/`.
        kwargs: what else TRL's trainer takes.

    Raises:
        ValueError: unusable rows, before any weight is loaded.
    """

    row_options: ClassVar[RowOptions] = RowOptions()
    # what makes TRL's columns of a batch of prepared rows
    columns_for: ClassVar[Callable[[dict[str, list]], dict[str, list]]]
    # whether log-probabilities are computed from the LM head's weight
    uses_fused_head: ClassVar[bool] = True
    # it follows its config, whatever `share_prefixes` is around its constructor
    shares_by_config = True
    # columns that are kept beside the tokens
    kept_columns: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: Any,
        *,
        args: Any,
        train_dataset: Dataset | IterableDataset,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        self.data_reports: dict[str, PreparationReport] = {}
        self.prefix_sharing, mode = None, getattr(args, "prefix_sharing", False)
        peft_config = kwargs.get("peft_config")
        if mode is True:
            refuse_unless_shareable(model, args, peft_config)
        check_sampling_strategy(args, train_dataset)
        check_adapter(model, args, peft_config, fused_head=self.uses_fused_head)
        self._limits = Limits(model, args)
        with explain_remote_code(), weights_only():
            if processing_class is None:
                name = model if isinstance(model, str) else model.config._name_or_path
                revision = (args.model_init_kwargs or {}).get("revision")
                processing_class = load_processor(name, revision=revision, trust_remote_code=args.trust_remote_code)
            train_dataset = self.trl_rows(train_dataset, processing_class, args, "train")
            if isinstance(eval_dataset, dict):
                eval_dataset = DatasetDict(  # which has a `map`, that TRL's ORPO calls
                    {name: self.trl_rows(rows, processing_class, args, name) for name, rows in eval_dataset.items()}
                )
            elif eval_dataset is not None:
                eval_dataset = self.trl_rows(eval_dataset, processing_class, args, "eval")
            model = model_to_start_from(model, args, gets_adapter=peft_config is not None)
            self_check = getattr(args, "check_prefix_sharing", False)
            with keeps_base_weights(model), sharing_from_the_start(self, mode, self_check=self_check):
                super().__init__(
                    model=model,
                    args=args,
                    train_dataset=train_dataset,
                    eval_dataset=eval_dataset,
                    processing_class=processing_class,
                    **kwargs,
                )

    def trl_rows(self, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
        """Rows of `data/` as TRL's trainer reads them; those that it can read already as they are."""
        columns = dataset.column_names or list(next(iter(dataset), {}))
        if has_trl_columns(columns):
            return dataset
        kept = [column for column in self.kept_columns if column in columns]
        eos_token = tokenizer_of(processing_class).eos_token
        options = replace(self.row_options, max_length=args.max_length, eos_token=eos_token)
        dataset, report = prepare_dataset(
            dataset,
            processing_class,
            options,
            name=name,
            num_proc=args.dataset_num_proc,
            on_invalid_row=args.on_invalid_row,
            keep_columns=bool(kept),
        )
        if report is not None:
            self.data_reports[name] = report
        dataset = self._limits.check(dataset, name, tokenizer_of(processing_class), args.max_length)
        names = [*PREPARED_FEATURES, *kept]
        dataset = dataset.select_columns(names).map(type(self).columns_for, batched=True, remove_columns=names)
        if isinstance(dataset, Dataset) and not len(dataset):
            raise ValueError(
                f"The {name} dataset must have rows with two answers of different scores, got none. Add such rows."
            )
        return dataset

    def _get_train_sampler(self, train_dataset=None):
        return super()._get_train_sampler(with_lengths(train_dataset or self.train_dataset, self.args))

    def _get_eval_sampler(self, eval_dataset):
        return super()._get_eval_sampler(with_lengths(eval_dataset, self.args))

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """What TRL would tokenise: rows for `evaluate` and `predict`, and those of the constructor once more."""
        return self.trl_rows(dataset, processing_class, args, dataset_name)


def has_trl_columns(columns: list[str]) -> bool:
    """Whether rows with these columns have been through [`~PreparedRowsMixin.trl_rows`] already."""
    tokens = {"prompt_ids", "input_ids", "chosen_ids", "prompt_input_ids"}
    return bool(tokens & set(columns)) and not is_prepared(columns)
