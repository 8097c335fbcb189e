"""The steps of a recipe that trains once: loading, training and saving. The recipe itself builds the trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.load import load_datasets
from ..runs.settings import model_init_kwargs, use_for_stage


class Training:
    """
    One training.

    Args:
        parsed (`Sequence`): what [`parse_recipe_args`] returned.
        model, data, output_dir (`str`, *optional*): as a stage of rounds, see [`use_for_stage`].
    """

    def __init__(
        self,
        parsed: Sequence[Any],
        *,
        model: str | None = None,
        data: str | None = None,
        output_dir: str | None = None,
    ):
        from ..runtime.checkpoints import checkpoint_to_resume

        self.is_stage = output_dir is not None
        if self.is_stage:
            use_for_stage(parsed, model=model, data=data, output_dir=output_dir)
        self.script_args, self.args, self.model_args, self.dataset_args, *_ = parsed
        self.resume_from = checkpoint_to_resume(self.args)

    def load(self) -> tuple[Any, Any]:
        """The dataset to train on, and the one to evaluate on or `None`."""
        train_dataset, eval_dataset = load_datasets(
            self.script_args, self.dataset_args, with_eval=self.args.eval_strategy != "no", seed=self.args.seed
        )
        self.columns, self.evaluates = train_dataset.column_names or [], eval_dataset is not None
        return train_dataset, eval_dataset

    def model_and_args(self) -> dict[str, Any]:
        """Arguments of the trainer: the model, its adapter and quantisation, and the settings."""
        from trl import get_peft_config, get_quantization_config

        self.args.model_init_kwargs = model_init_kwargs(self.model_args, self.args)
        return {
            "model": self.model_args.model_name_or_path,
            "args": self.args,
            "quantization_config": get_quantization_config(self.model_args),
            "peft_config": get_peft_config(self.model_args),
        }

    def train(self, trainer: Any) -> dict[str, float]:
        """
        Train, from the checkpoint to resume if there is one, and evaluate if asked to.

        Returns:
            `dict`: the figures.
        """
        for report in getattr(trainer, "data_reports", {}).values():
            if not report.worth_a_warning:  # the others were said already
                trainer.accelerator.print(report)
        figures = trainer.train(resume_from_checkpoint=self.resume_from).metrics
        report = getattr(trainer, "data_reports", {}).get("train")
        if report is not None:
            figures["train_prompts"] = report.num_prompts  # without the rows that were dropped
        if getattr(trainer, "prefix_sharing", None) is not None:
            trainer.accelerator.print(trainer.prefix_sharing.statistics)
        if self.evaluates:
            figures.update(trainer.evaluate())
        return figures

    def save(self, trainer: Any, figures: dict[str, float]) -> dict[str, float]:
        """Save the model, the figures that [`train`] returned, and the curves of the trainer's `panels`."""
        from ..runs.curves import plot_training_curves
        from ..runs.next_commands import after_training, print_next

        trainer.save_model(self.args.output_dir)
        trainer.save_state()
        trainer.save_metrics("all", figures, combined=False)
        if trainer.is_world_process_zero():
            folder = Path(self.args.output_dir)
            picture = plot_training_curves(
                trainer.state.log_history,
                folder / "training_curves.png",
                title=f"{trainer._name}, {folder.parent.name if self.is_stage else folder.name}",
                panels=trainer.panels,
            )
            print(f"Model, all_results.json and {picture.name} are in {folder}")
            if not self.is_stage:
                model = self.model_args.model_name_or_path
                print_next(after_training(self.script_args, model, str(folder), self.columns))
        if self.args.push_to_hub:
            trainer.push_to_hub(dataset_name=self.script_args.dataset_name)
        trainer.accelerator.wait_for_everyone()  # or one tears the group down while another still uses it
        if not self.is_stage:  # a stage has to wait for all processes itself, when it has written what it found
            trainer.end()
        return figures
