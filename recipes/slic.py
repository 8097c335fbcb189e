"""
Train a model with SLiC-HF.

With no arguments, an offline playground runs in about two minutes on a CPU: a small model learns to read numbers, its
own answers are sampled and ranked, SLiC-HF trains on the pairs, and both models are compared on held-out numbers.

    accelerate launch recipes/slic.py

On your own data (one row: `prompt`, `chosen`, `rejected`, optionally `reference`; a Hub name, a file or a folder):

    accelerate launch recipes/slic.py --model_name_or_path MODEL --dataset_name pairs.jsonl --output_dir runs/slic

The same with LoRA: add `--use_peft`. To go on after an interruption: the same command and
`--resume_from_checkpoint true`.
All values of a run in one file: `--config recipes/configs/slic_ultrafeedback.yaml`.
"""

from pathlib import Path

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from trl_ext import SLiCConfig
from trl_ext.cli import (
    checkpoint_to_resume,
    is_playground,
    load_datasets,
    model_init_kwargs,
    parse_recipe_args,
    use_all_cpu_cores,
    wants_to_resume,
)

PLAYGROUND_CONFIG = Path(__file__).parent / "configs" / "slic_playground.yaml"


def main(script_args, training_args, model_args, dataset_args):
    from trl import get_peft_config, get_quantization_config

    from trl_ext import SLiCTrainer
    from trl_ext.playground import Playground, build_playground, holds_playground
    from trl_ext.plots import plot_training_curves

    use_all_cpu_cores()
    output_dir = Path(training_args.output_dir)
    on_playground = is_playground(script_args, model_args, dataset_args)
    resume_from = checkpoint_to_resume(training_args, start_afresh=on_playground and holds_playground(output_dir))

    # Data: the playground's own, or the user's
    if on_playground:
        playground = Playground(seed=training_args.seed)
        sft_model, candidates = build_playground(
            playground, output_dir / "playground", reuse=wants_to_resume(training_args)
        )
        model_args.model_name_or_path = str(sft_model)
        train_dataset, eval_dataset = playground.preference_dataset(candidates), None
    else:
        with_eval = training_args.eval_strategy != "no"
        train_dataset, eval_dataset = load_datasets(
            script_args, dataset_args, with_eval=with_eval, seed=training_args.seed
        )

    # Train
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    trainer = SLiCTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    for report in trainer.data_reports.values():
        if not report.worth_a_warning:  # the others were said already
            trainer.accelerator.print(report)
    results = trainer.train(resume_from_checkpoint=resume_from).metrics
    if trainer.prefix_sharing is not None:
        trainer.accelerator.print(trainer.prefix_sharing.statistics)
    if eval_dataset is not None:
        results.update(trainer.evaluate())
    trainer.save_model(training_args.output_dir)
    trainer.save_state()

    # Report
    if on_playground:
        comparison = playground.evaluate(training_args.output_dir, sft_model)
        results.update(comparison.metrics())
        if trainer.is_world_process_zero():
            comparison.print("SLiC-HF")
    trainer.save_metrics("all", results, combined=False)
    if trainer.is_world_process_zero():
        picture = plot_training_curves(
            trainer.state.log_history, output_dir / "training_curves.png", title=f"SLiC-HF, {output_dir.name}"
        )
        print(f"Model, all_results.json and {picture.name} are in {output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


if __name__ == "__main__":
    main(*parse_recipe_args((ScriptArguments, SLiCConfig, ModelConfig, DatasetMixtureConfig), PLAYGROUND_CONFIG))
