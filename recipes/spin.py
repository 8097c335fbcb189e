"""
Train a model with SPIN: self-play against itself, with nothing but the answers of SFT.

With no arguments, an offline playground runs on a CPU: a small model learns to read numbers; then three iterations of
SPIN on the same examples. Beside them, SFT goes on for as many updates.

    accelerate launch recipes/spin.py

All iterations, on SFT data (one row: `prompt` and `completion`, or `messages`; a Hub name, a file or a folder):

    accelerate launch recipes/spin.py --model_name_or_path MODEL --dataset_name sft.jsonl --output_dir runs/spin

A single iteration, on answers you have generated (one row: `prompt`, `chosen` for the real one, `rejected` for the
generated one) with the same model:

    accelerate launch recipes/spin.py --model_name_or_path MODEL --dataset_name pairs.jsonl --output_dir runs/spin

LoRA: `--use_peft`, one adapter per iteration, merged after it. To go on after an interruption: the same command and
`--resume_from_checkpoint true`. All values of a run in one file: `--config recipes/configs/spin_ultrachat.yaml`.
"""

from pathlib import Path

from trl_ext.cli import Training, parse_recipe_args, run_recipe
from trl_ext.data.load import load_datasets
from trl_ext.runs.settings import is_playground

DATACLASSES = (
    "trl.ScriptArguments",
    "trl_ext.SPINConfig",
    "trl.ModelConfig",
    "trl.DatasetMixtureConfig",
)
PLAYGROUND_CONFIG = Path(__file__).parent / "configs" / "spin_playground.yaml"


def train(arguments, **stage):
    """One iteration, on pairs of a real and a generated answer."""
    from trl_ext import SPINTrainer

    parsed = parse_recipe_args(DATACLASSES, PLAYGROUND_CONFIG, arguments)
    training = Training(parsed, **stage)
    train_dataset, eval_dataset = training.load()
    trainer = SPINTrainer(**training.model_and_args(), train_dataset=train_dataset, eval_dataset=eval_dataset)
    figures = training.train(trainer)
    return training.save(trainer, figures)


def main(arguments):
    from trl_ext import SPINTrainer
    from trl_ext.cli import start_self_play
    from trl_ext.methods.spin.rows import is_sft_data
    from trl_ext.playground.stages import continue_sft

    parsed = parse_recipe_args(DATACLASSES, PLAYGROUND_CONFIG, arguments)
    script_args, config, _, dataset_args = parsed
    if is_playground(*parsed):
        game = start_self_play(parsed, SPINTrainer, more_stages=2 * config.num_iterations)
        game.play()
        return game.report(continue_sft(game))
    datasets = load_datasets(script_args, dataset_args, with_eval=config.eval_strategy != "no", seed=config.seed)
    if not is_sft_data(datasets[0]):
        return train(arguments)
    game = start_self_play(parsed, SPINTrainer, *datasets)
    game.play()
    game.report()


if __name__ == "__main__":
    run_recipe(main, DATACLASSES, __doc__)
