"""Starting self-play on the user's own data or on the playground."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from datasets import Dataset

from ..data.limits import Limits
from ..methods.spin.rows import train_and_watched
from ..methods.spin.self_play import SelfPlay
from ..runs.manifest import settings_of, start_afresh
from ..runs.rounds import SFT_TITLE
from ..runs.run import Run
from ..runs.settings import is_playground, local_model, model_init_kwargs, run_settings, unset_value
from ..runtime.checkpoints import RESUME_LAST, wants_to_resume
from ..runtime.models import load_tokenizer
from ..runtime.processes import all_gather_objects
from ..trainers.adapter_checks import check_adapter


def start_self_play(
    parsed: Sequence[Any],
    trainer_class: type,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    *,
    more_stages: int = 0,
) -> SelfPlay:
    """
    Begin the game of the recipe, or take it up where it was interrupted.

    Args:
        parsed (`Sequence`): what [`parse_recipe_args`] returned. Without a model and data, on the playground, an SFT
            model is trained first.
        trainer_class (`type`): [`SPINTrainer`], or a subclass that can be imported.
        train_dataset, eval_dataset: what [`load_datasets`] returned; the playground has its own.
        more_stages (`int`, defaults to 0): stages with a heading that the recipe adds.

    Raises:
        FileExistsError, ValueError: see [`Run`] and [`sft_rows`].
    """
    from trl import get_peft_config, get_quantization_config

    _, config, model_args, _ = parsed
    if wants_to_resume(config) and str(config.resume_from_checkpoint).lower() not in RESUME_LAST:
        raise ValueError(
            f"`resume_from_checkpoint` must be 'true' in self-play, got {config.resume_from_checkpoint!r}. It resumes "
            "where it stopped."
        )
    on_playground, resume = is_playground(*parsed), wants_to_resume(config)
    if on_playground:
        from ..playground.model import byte_level_tokenizer
        from ..playground.task import spin_playground

        playground = spin_playground(config.seed)
        tokenizer, limits = byte_level_tokenizer(), None
        train_dataset = playground.sft_dataset()
        eval_dataset = Dataset.from_list(
            [{**row, "completion": row["reference"]} for row in playground.rows("held_out", reference=True)]
        )
    else:
        config.model_init_kwargs = model_init_kwargs(model_args, config)
        model = local_model(model_args, trust_remote_code=config.trust_remote_code)
        tokenizer = load_tokenizer(model, trust_remote_code=config.trust_remote_code)
        check_adapter(model, config, get_peft_config(model_args))
        limits = Limits(model, config)
        if not isinstance(train_dataset, Dataset):
            raise ValueError("Self-play goes over all rows in every iteration. Remove `--dataset_streaming`.")
        # with it the loop evaluates each model; the pairs it trains on have no held-out part
        config.eval_strategy = "no"
    rows, watched = train_and_watched(train_dataset, eval_dataset, tokenizer, config, limits)
    game = SelfPlay(
        config,
        rows,
        watched,
        trainer_class=trainer_class,
        trainer_kwargs={
            "peft_config": get_peft_config(model_args),
            "quantization_config": get_quantization_config(model_args),
        },
    )
    before = all_gather_objects(settings_of(config.output_dir))[0]  # the same decision on all processes
    if on_playground and not resume and before is not None:
        if not any(before.get(name) for name in ("model_name_or_path", "dataset_name", "model")):  # a playground
            start_afresh(config.output_dir)
    others = run_settings([part for part in parsed if part is not config])
    settings, may_change = game.settings(**others), game.may_change()
    run = Run(
        config.output_dir,
        settings,
        resume=resume,
        may_change=may_change,
        default_of=partial(unset_value, parsed),
        patience=config.ddp_timeout,
        headings=game.headings(on_playground + more_stages),
    )
    if on_playground:
        from ..playground.stages import sft_stage

        run.stage("sft", sft_stage, title=SFT_TITLE, playground=playground)
        model = run.path("sft")
    game.start_name = "SFT" if on_playground else "start"
    return game.open(run, model)
