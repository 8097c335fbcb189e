"""Training once, and saving what came out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.load import load_datasets
from ..runs.settings import model_init_kwargs, use_for_stage


def train_and_save(
    trainer_class: type,
    parsed: Sequence[Any],
    *,
    panels: dict[str, dict[str, str]],
    model: str | None = None,
    data: str | None = None,
    output_dir: str | None = None,
) -> dict[str, float]:
    """
    Train with a trainer, evaluate if asked to, and save the model, the figures and the curves.

    Args:
        trainer_class (`type`): the trainer.
        parsed (`Sequence`): what [`parse_recipe_args`] returned.
        panels (`dict`): for [`plot_training_curves`].
        model, data, output_dir (`str`, *optional*): as a stage of rounds, see [`use_for_stage`].

    Returns:
        `dict`: the figures, which are also in `all_results.json`.
    """
    from trl import get_peft_config, get_quantization_config

    from ..runs.curves import plot_training_curves
    from ..runs.next_commands import after_training, print_next
    from ..runtime.checkpoints import checkpoint_to_resume

    if output_dir is not None:
        use_for_stage(parsed, model=model, data=data, output_dir=output_dir)
    script_args, training_args, model_args, dataset_args, *_ = parsed
    resume_from = checkpoint_to_resume(training_args)
    train_dataset, eval_dataset = load_datasets(
        script_args, dataset_args, with_eval=training_args.eval_strategy != "no", seed=training_args.seed
    )
    columns = train_dataset.column_names or []
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    trainer = trainer_class(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    for report in getattr(trainer, "data_reports", {}).values():
        if not report.worth_a_warning:  # the others were said already
            trainer.accelerator.print(report)
    results = trainer.train(resume_from_checkpoint=resume_from).metrics
    report = getattr(trainer, "data_reports", {}).get("train")
    if report is not None:
        results["train_prompts"] = report.num_prompts  # without the rows that were dropped
    if getattr(trainer, "prefix_sharing", None) is not None:
        trainer.accelerator.print(trainer.prefix_sharing.statistics)
    if eval_dataset is not None:
        results.update(trainer.evaluate())
    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    trainer.save_metrics("all", results, combined=False)
    if trainer.is_world_process_zero():
        folder = Path(training_args.output_dir)
        picture = plot_training_curves(
            trainer.state.log_history,
            folder / "training_curves.png",
            title=f"{trainer._name}, {folder.name if output_dir is None else folder.parent.name}",
            panels=panels,
        )
        print(f"Model, all_results.json and {picture.name} are in {folder}")
        if output_dir is None:
            print_next(after_training(script_args, model_args.model_name_or_path, str(folder), columns))
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.accelerator.wait_for_everyone()  # or one tears the group down while another still uses it
    if output_dir is None:  # a stage has to wait for all processes itself, when it has written what it found
        trainer.end()
    return results
