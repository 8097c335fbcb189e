"""The training stage of a SPIN iteration."""

from pathlib import Path
from statistics import fmean
from typing import Any

from ...runtime.checkpoints import checkpoint_to_resume
from ...runtime.jsonl import read_jsonl
from .config import SPINConfig
from .rows import as_dataset


def train_stage(
    folder: Path,
    *,
    model: Path,
    trainer_class: type,
    settings: dict[str, Any],
    trainer_kwargs: dict[str, Any],
    initial: Path | None = None,
    **generated: Path,
) -> dict[str, Any]:
    """
    One iteration of [`SPINTrainer`] on the pairs of one or more files, going on where an interrupted attempt stopped.

    The rows stay in memory: nothing of them can be found in a cache by another iteration.
    """
    from ...runs.curves import SPIN_PANELS, plot_training_curves

    config = SPINConfig(**{**settings, "output_dir": str(folder), "resume_from_checkpoint": "true"})
    resume_from = checkpoint_to_resume(config)
    trainer = trainer_class(
        model=str(model),
        ref_model=None if initial is None else str(initial),
        args=config,
        train_dataset=as_dataset([row for name in sorted(generated) for row in read_jsonl(generated[name])]),
        **trainer_kwargs,
    )
    results = trainer.train(resume_from_checkpoint=resume_from).metrics
    trainer.save_model(str(folder))
    trainer.save_state()
    trainer.save_metrics("all", results, combined=False)
    logged = [log for log in trainer.state.log_history if "loss" in log]
    if trainer.is_world_process_zero():
        plot_training_curves(
            trainer.state.log_history,
            folder / "training_curves.png",
            title=f"SPIN, {folder.parent.name}",
            panels=SPIN_PANELS,
        )
    figures = {
        "num_pairs": len(trainer.train_dataset),
        "steps": trainer.state.global_step,
        "first_loss": logged[0]["loss"],
        "train_loss": fmean(log["loss"] for log in logged),  # `Trainer`'s begins anew where a run goes on
        **{name: logged[-1][f"rewards/{name}"] for name in ("margins", "accuracies")},
    }
    return figures  # without `trainer.end()`: the stage itself still has to wait for all processes
