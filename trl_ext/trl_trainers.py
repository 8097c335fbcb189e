"""
TRL's own trainers as the recipes use them: fed with the rows of this package, resumable, and sharing prefixes where
they can. Losses, metrics and sampling are TRL's.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
import trl
from accelerate.logging import get_logger
from datasets import Dataset, DatasetDict, Features, IterableDataset, Json, List, Value, concatenate_datasets

from ._trl import loaded_whole
from .adapter_checks import (
    check_adapter,
    keeps_base_weights,
    refuse_drifting_reference,
)
from .checks import Limits, check_sampling_strategy, with_lengths
from .columns import as_given, check_features, without_files
from .data import (
    PREPARED_FEATURES,
    PreparationReport,
    RowError,
    RowOptions,
    is_prepared,
    prepare_dataset,
    prompt_of,
)
from .losses import bradley_terry_loss
from .prefix_sharing import refuse_unless_shareable, share_prefixes
from .pretrained import is_adapter, load_processor, model_to_start_from
from .resumable import ResumableTrainer
from .rounds import check_prompts
from .safety import explain_remote_code, weights_only
from .sampling import load_tokenizer, prompt_token_ids
from .scoring import CANDIDATE_COLUMNS, build_scorers, check_scorers, reward_functions
from .tokens import num_repeated_start_tokens, tokenizer_of, without_repeated_start
from .trl_data import for_dpo, for_kto, for_reward, for_sft, labelled, with_mismatched

logger = get_logger(__name__)


class OurRows(ResumableTrainer):
    """
    A base to put before a trainer of TRL in the list of bases: rows are checked, tokenised and cut as for every
    trainer here (`data.py`), before any weight is loaded, and TRL gets the tokens.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]), args, train_dataset, eval_dataset, processing_class:
            As in TRL, with rows as described in `data.py`.
        kwargs: what else TRL's trainer takes.

    Raises:
        ValueError: unusable rows, before any weight is loaded.
    """

    row_options: ClassVar[RowOptions] = RowOptions()
    # what makes TRL's columns of a batch of prepared rows
    columns_for: ClassVar[Callable[[dict[str, list]], dict[str, list]]]
    # whether log-probabilities are computed from the LM head's weight
    uses_fused_head: ClassVar[bool] = True
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
        self.prefix_sharing = None
        peft_config = kwargs.get("peft_config")
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
            with keeps_base_weights(model):
                super().__init__(
                    model=model,
                    args=args,
                    train_dataset=train_dataset,
                    eval_dataset=eval_dataset,
                    processing_class=processing_class,
                    **kwargs,
                )

    def trl_rows(self, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
        """Rows of `data.py` as TRL's trainer reads them; those that it can read already as they are."""
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
                f"No row of the {name} dataset has two answers with different scores, so there is nothing to compare. "
                "Give it such rows."
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
    """Whether rows with these columns have been through [`~OurRows.trl_rows`] already."""
    tokens = {"prompt_ids", "input_ids", "chosen_ids", "prompt_input_ids"}
    return bool(tokens & set(columns)) and not is_prepared(columns)


class DPOTrainer(OurRows, trl.DPOTrainer):
    """
    [`~trl.DPOTrainer`] on the best and the worst answer to each prompt, computing each prompt once for both
    (`args.prefix_sharing`).
    """

    columns_for = staticmethod(for_dpo)

    def __init__(self, model: Any, *, args: Any, peft_config: Any = None, **kwargs: Any):
        if args.prefix_sharing is True:
            refuse_unless_shareable(model, args, peft_config)
        if kwargs.get("ref_model") is None:
            refuse_drifting_reference(model, peft_config, "DPO")
        with share_prefixes(args.prefix_sharing, self_check=args.check_prefix_sharing):
            super().__init__(model, args=args, peft_config=peft_config, **kwargs)


class KTOTrainer(OurRows, trl.KTOTrainer):
    """
    [`~trl.KTOTrainer`] on single answers that are good or bad: rows of `prompt`, `completion` and `label`, or of
    several answers, of which the best is good and the worst bad. They are shuffled by `args.seed`: the reference point
    is estimated from prompts with the answer of the row before, which has to be another prompt's.
    """

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


class RewardTrainer(OurRows, trl.RewardTrainer):
    """
    [`~trl.RewardTrainer`] on the best and the worst answer to each prompt, with two ways to keep rewards bounded; see
    [`bradley_terry_loss`]. Rows may have a `margin` (https://huggingface.co/papers/2307.09288, eq. 2).
    """

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


class BestOfNTrainer(OurRows, trl.SFTTrainer):
    """[`~trl.SFTTrainer`] on the best answer to each prompt, of which the answer alone is learned."""

    row_options = RowOptions(min_completions=1, best_only=True)
    columns_for = staticmethod(for_sft)

    _prepare_dataset = trl.SFTTrainer._prepare_dataset  # which takes tokens as they are, and may pack them


class RLOOTrainer(ResumableTrainer, trl.RLOOTrainer):
    """
    [`~trl.RLOOTrainer`] towards `args.rewards`, which are checked with the prompts before any weight is loaded. A
    reward gets what [`FunctionScorer`] gives it, and a reward model reads what it was trained on, see
    [`reward_functions`].

    Raises:
        ValueError: no rewards, prompts that cannot be used, or columns that a reward function does not take.
        NotImplementedError: a stream.
    """

    def __init__(self, model: Any, *, args: Any, train_dataset: Dataset, eval_dataset: Any = None, **kwargs: Any):
        if not args.rewards:
            raise ValueError(
                "There is nothing to train towards. Set `rewards` to functions (file.py:function) or reward models, "
                "such as `recipes/reward.py` trains."
            )
        name = model if isinstance(model, str) else model.config._name_or_path
        revision = (args.model_init_kwargs or {}).get("revision") or "main"
        peft_config = kwargs.get("peft_config")
        check_adapter(model, args, peft_config)
        if args.beta:
            refuse_drifting_reference(model, peft_config, "RLOO")
        limits = Limits(model, args)
        tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=args.trust_remote_code)
        train_dataset = _usable_prompts(train_dataset, tokenizer, args, "train")
        if eval_dataset is not None:
            eval_dataset = _usable_prompts(eval_dataset, tokenizer, args, "eval")
        _check_prompt_lengths(train_dataset, tokenizer, limits, args)
        options = args.scorer_options()
        check_scorers(args.rewards, args.reward_weights, columns=train_dataset.column_names, **options)
        with loaded_whole():
            scorers = build_scorers(args.rewards, args.reward_weights, **options)
        if is_adapter(model, revision):
            kwargs.setdefault("processing_class", tokenizer)
        model = model_to_start_from(model, args, gets_adapter=peft_config is not None)
        with explain_remote_code(), weights_only():
            super().__init__(
                model=model,
                reward_funcs=reward_functions(scorers, lambda ids: ids[-1] not in self.eos_token_ids),
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                **kwargs,
            )


def _check_prompt_lengths(dataset: Dataset, tokenizer: Any, limits: Limits, args: Any) -> None:
    """Refuse prompts that with `max_completion_length` exceed the model's positions, or have unknown tokens."""
    ids = [prompt_token_ids(tokenizer, row) for row in dataset.select_columns("prompt")]
    limits.check(Dataset.from_dict({"prompt_ids": ids}), "train", tokenizer, None)
    longest, answer = max(map(len, ids)), args.max_completion_length
    what = f"The longest prompt has {longest} tokens, with max_completion_length={answer} {longest + answer}"
    limits.check_length(longest + answer, what, answer, "max_completion_length")


def _usable_prompts(dataset: Any, tokenizer: Any, args: Any, name: str) -> Dataset:
    if not isinstance(dataset, Dataset):
        raise NotImplementedError(
            f"The {name} dataset is a {type(dataset).__name__}; its prompts are checked before anything is sampled. "
            "Pass a `Dataset` (leave `--dataset_streaming` out)."
        )
    if "prompt" not in dataset.column_names and not {"chosen", "rejected"} <= set(dataset.column_names):
        raise ValueError(
            f"The {name} dataset has the columns {sorted(dataset.column_names)} and no `prompt` to answer. Rename or "
            "add it."
        )
    dataset = without_files(dataset, name)
    check_features(dataset.features, name)
    given, unread = [as_given(row, dataset.features) for row in dataset], ("tools", "chat_template_kwargs")
    if idle := [column for column in unread if any(row.get(column) for row in given)]:
        raise ValueError(
            f"The {name} dataset has a column {' and '.join(map(repr, idle))}, and TRL's RLOO renders prompts without "
            "what a row says there. Leave the column out; `chat_template_kwargs` of the config holds for all rows."
        )
    rows = []
    for number, row in enumerate(given):
        try:
            rows.append({**row, "prompt": prompt_of(row), "_number": number})
        except RowError as error:
            raise ValueError(f"Row {number} of the {name} dataset: {error}. Give each row its `prompt`.") from None
    usable = check_prompts(rows, tokenizer, RowOptions(), (), args.on_invalid_row)
    if len(usable) < len(rows):
        dataset = dataset.select([row["_number"] for row in usable])
    # the answers of ranked lists would pass for those that are sampled
    dataset = dataset.remove_columns([c for c in (*CANDIDATE_COLUMNS, *unread) if c in dataset.column_names])
    prompts = [row["prompt"] for row in usable]
    if repeated := sum(num_repeated_start_tokens(tokenizer, prompt) > 0 for prompt in prompts):
        logger.warning(
            f"{name} data: {repeated} prompts begin with the start token that the tokenizer adds as well. It is kept "
            "once."
        )
        prompts = [without_repeated_start(tokenizer, prompt) for prompt in prompts]
    if "prompt" in dataset.column_names:
        if dataset["prompt"][:] == prompts:
            return dataset
        dataset = dataset.remove_columns("prompt")
    feature = Value("string") if all(isinstance(prompt, str) for prompt in prompts) else List(Json())
    column = Dataset.from_dict({"prompt": prompts}, features=Features({"prompt": feature}))
    return concatenate_datasets([dataset, column], axis=1) if dataset.column_names else column
