"""Starting rounds on the user's own data or on the playground."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from accelerate import PartialState
from trl import get_peft_config

from ..data.limits import Limits
from ..data.load import load_prompts
from ..data.prompts import check_prompts, hold_out
from ..data.rows import RowOptions
from ..playground.stages import NUM_CANDIDATES
from ..runs.config import RoundsConfig
from ..runs.manifest import settings_of, start_afresh
from ..runs.rounds import SFT_TITLE, STAGES_OF_ROUND, Rounds
from ..runs.run import Run, all_processes
from ..runs.settings import (
    MAY_CHANGE,
    changed_fields,
    is_playground,
    loading_for_sampling,
    local_model,
    run_settings,
    unset_value,
)
from ..runs.stages import merged_start
from ..runtime.checkpoints import RESUME_LAST, wants_to_resume
from ..runtime.headings import Headings
from ..runtime.models import is_adapter, load_tokenizer
from ..runtime.processes import all_gather_objects
from ..sampling.config import SamplingConfig
from ..trainers.adapter_checks import check_adapter


def start_playground(parsed: Sequence[Any], *, num_stages: int) -> Rounds:
    """
    The playground with its SFT model, to sample, rank, train and evaluate on.

    Args:
        parsed (`Sequence`): what [`parse_recipe_args`] returned, without a model and data.
        num_stages (`int`): stages with a heading, that of the SFT model included.
    """
    sampling = SamplingConfig(
        num_candidates=NUM_CANDIDATES, temperature=1.0, max_new_tokens=16, sampling_batch_size=512
    )
    ranking = RoundsConfig(
        num_rounds=1,
        rewards=["trl_ext.playground:friendly_number_reward"],
        judge="trl_ext.playground:accuracy",
        pair_rule="best_worst",
    )
    return start_rounds((*parsed, sampling, ranking), rows=RowOptions(), headings=Headings(num_stages))


def in_rounds(parsed: Sequence[Any]) -> bool:
    """
    Whether a recipe is to sample and train in rounds, given what [`parse_recipe_args`] returned.

    Raises:
        ValueError: it is not, and sampling has settings that would do nothing.
    """
    sampling, config = parsed[4:6]
    if config.num_rounds == 0 and (idle := changed_fields(sampling)):
        raise ValueError(
            f"`num_rounds` must be at least 1 where {', '.join(idle)} are set, got 0. Set it to 1, or remove them."
        )
    return config.num_rounds > 0


def start_rounds(
    parsed: Sequence[Any],
    *,
    rows: RowOptions,
    best_as_reference: bool = False,
    more_stages: int = 0,
    headings: Headings | None = None,
) -> Rounds:
    """
    Begin the rounds of a recipe, or take them up where they were interrupted. Everything that can be known to fail
    fails here, before a model is loaded.

    Args:
        parsed (`Sequence`): what [`parse_recipe_args`] returned, with a [`SamplingConfig`] and a [`RoundsConfig`] as
            the fifth and the sixth. Without a model and data, on the playground, an SFT model is trained first.
        rows ([`RowOptions`]): what the recipe's trainer wants of its rows. With `reference`, the playground's rows get
            one of the task.
        best_as_reference (`bool`, defaults to `False`): train towards the best sampled answer to a prompt, and not
            towards the dataset's `reference`, as in SLiC-HF's sample-rank.
        more_stages (`int`, defaults to 0): stages with a heading that the recipe adds to those of the rounds.
        headings ([`Headings`], *optional*): numbers the stages; by default those of the rounds and `more_stages`.

    Raises:
        FileExistsError, ValueError: see [`Run`], [`check_scorers`], [`check_prompts`] and [`hold_out`]; or a setting
            that has no meaning in rounds.
    """
    script_args, training_args, model_args, dataset_args, sampling, config, *_ = parsed
    _check_for_rounds(training_args, model_args, dataset_args)
    on_playground, resume = is_playground(*parsed), wants_to_resume(training_args)
    if on_playground:
        from ..playground.stages import sft_stage
        from ..playground.task import Playground

        playground = Playground(seed=training_args.seed)
        prompts, watched = playground.rows("train", reference=rows.reference), playground.rows("held_out")
        before = all_gather_objects(settings_of(training_args.output_dir))[0]  # the same decision on all processes
        if not resume and before is not None and not (before["model_name_or_path"] or before["dataset_name"]):
            start_afresh(training_args.output_dir)  # over a playground only
    else:
        trust = training_args.trust_remote_code
        model, prompts = local_model(model_args, trust_remote_code=trust), load_prompts(script_args, dataset_args)
        tokenizer = load_tokenizer(model, trust_remote_code=trust)
        rows = replace(rows, max_length=training_args.max_length)
        check_adapter(model, training_args, get_peft_config(model_args))
        prompts = check_prompts(
            prompts,
            tokenizer,
            rows,
            config.mix_in or (),
            training_args.on_invalid_row,
            limits=Limits(model, training_args),
            max_new_tokens=sampling.max_new_tokens,
        )
        prompts, watched = hold_out(prompts, config.num_watched_prompts, training_args.seed)
    if best_as_reference and "reference" in prompts[0]:
        PartialState().print("The column `reference` is not used as the target: the best sampled answers are.")
    config.check_scorers(list(prompts[0]))
    settings = {**run_settings(parsed), "num_processes": all_processes().num_processes}
    if headings is None:
        stages = on_playground + 1 + STAGES_OF_ROUND * config.num_rounds + more_stages
        headings = Headings(stages, at_most=config.num_rounds > 1)
    run = Run(
        training_args.output_dir,
        settings,
        resume=resume,
        may_change=MAY_CHANGE,
        default_of=partial(unset_value, parsed),
        patience=training_args.ddp_timeout,
        headings=headings,
    )
    if on_playground:
        run.stage("sft", sft_stage, title=SFT_TITLE, playground=playground)
        model = run.path("sft")
    elif is_adapter(model):
        model = merged_start(run, model, trust_remote_code=trust)
    rounds = Rounds(
        run,
        config,
        sampling,
        prompts=prompts,
        watched=watched,
        model=model,
        load=loading_for_sampling(model_args, training_args),
        seed=training_args.seed,
        min_completions=rows.min_completions,
        best_as_reference=best_as_reference,
    )
    rounds.start_name = "SFT" if on_playground else "start"
    return rounds


def _check_for_rounds(training_args, model_args, dataset_args) -> None:
    """Refuse settings that training alone has a use for."""
    if training_args.push_to_hub:
        raise ValueError(
            "`push_to_hub` must not be set in rounds: it would push the model of every round over the one before. "
            "Remove it, and push the model to take at the end: `hf upload NAME OUTPUT_DIR/round-N/model`."
        )
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError(
            "`load_in_4bit` and `load_in_8bit` must not be set in rounds, which sample from whole models, adapters "
            "merged into them. Remove them; LoRA (`--use_peft`) works."
        )
    if wants_to_resume(training_args) and str(training_args.resume_from_checkpoint).lower() not in RESUME_LAST:
        raise ValueError(
            f"`resume_from_checkpoint` must be 'true' in rounds, got {training_args.resume_from_checkpoint!r}. They "
            "resume where they stopped."
        )
    evaluates, splits = training_args.eval_strategy != "no", dataset_args.test_split_size is not None
    if evaluates != splits:
        raise ValueError(
            "In rounds `eval_strategy` and `test_split_size` must be set together, got "
            f"{training_args.eval_strategy!r} and {dataset_args.test_split_size}. Set both, to evaluate the loss on a "
            "part of the sampled data, or neither. The models are evaluated on held-out prompts in any case."
        )
