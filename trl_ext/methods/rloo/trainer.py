"""TRL's RLOO with the scorers of this package."""

import logging
from typing import Any

import trl
from datasets import Dataset, Features, Json, List, Value, concatenate_datasets

from ..._trl import loaded_whole
from ...data.columns import as_given, check_features, without_files
from ...data.limits import Limits
from ...data.prompts import check_prompts, prompt_token_ids
from ...data.row_error import RowError
from ...data.rows import RowOptions, prompt_of
from ...data.tokens import num_repeated_start_tokens, without_repeated_start
from ...execution.prefix_sharing import enable_prefix_sharing, refuse_unless_shareable
from ...runs.curves import RL_PANELS
from ...runtime.models import is_adapter, load_tokenizer, model_to_start_from
from ...runtime.trust import explain_remote_code, weights_only
from ...scoring.build import build_scorers, check_scorers
from ...scoring.functions import CANDIDATE_COLUMNS
from ...scoring.rewards_of_trl import reward_functions
from ...trainers.adapter_checks import check_adapter, refuse_drifting_reference
from ...trainers.resumable import ResumableTrainer

logger = logging.getLogger(__name__)


class RLOOTrainer(ResumableTrainer, trl.RLOOTrainer):
    """
    [`~trl.RLOOTrainer`] towards `args.rewards`, which are checked with the prompts before any weight is loaded. A
    reward gets what [`FunctionScorer`] gives it, and a reward model reads what it was trained on, see
    [`reward_functions`]. Where log-probabilities are computed, a prompt is computed once for all its answers in a
    micro-batch (`args.prefix_sharing`).

    Raises:
        ValueError: no rewards, prompts that cannot be used, or columns that a reward function does not take.
        NotImplementedError: a stream.
    """

    panels = RL_PANELS

    def __init__(self, model: Any, *, args: Any, train_dataset: Dataset, eval_dataset: Any = None, **kwargs: Any):
        if not args.rewards:
            raise ValueError(
                "`rewards` must name at least one scorer, got none. Set it to functions (file.py:function) or reward "
                "models, such as `recipes/reward.py` trains."
            )
        name = model if isinstance(model, str) else model.config._name_or_path
        revision = (args.model_init_kwargs or {}).get("revision") or "main"
        peft_config = kwargs.get("peft_config")
        self.prefix_sharing = None
        if args.prefix_sharing is True:
            refuse_unless_shareable(model, args, peft_config)
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
        if args.prefix_sharing is not False:
            enable_prefix_sharing(self, args.prefix_sharing, self_check=args.check_prefix_sharing)


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
            f"The {name} dataset must be a `Dataset`, got {type(dataset).__name__}: its prompts are checked before "
            "anything is sampled. Remove `--dataset_streaming`."
        )
    if "prompt" not in dataset.column_names and not {"chosen", "rejected"} <= set(dataset.column_names):
        raise ValueError(
            f"The {name} dataset must have a column `prompt`, got the columns {sorted(dataset.column_names)}. Rename "
            "or add it."
        )
    dataset = without_files(dataset, name)
    check_features(dataset.features, name)
    given, unread = [as_given(row, dataset.features) for row in dataset], ("tools", "chat_template_kwargs")
    if idle := [column for column in unread if any(row.get(column) for row in given)]:
        raise ValueError(
            f"The {name} dataset must not have values in {' and '.join(f'`{column}`' for column in idle)}: TRL's RLOO "
            "does not read them. Remove the column, or set `chat_template_kwargs` in the config for all rows."
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
