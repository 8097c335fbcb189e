"""
Train a model with CLICK: keep it from certain answers, at little cost to the task.

With no arguments, an offline playground runs on a CPU: a small model learns to read numbers, and a rude tone with it;
its own answers are labelled polite or not and paired by their likelihood; CLICK trains on the pairs beside the task's
data.

    accelerate launch recipes/train_click.py

On prompts (one row: `prompt`, the task's own target as `reference`, and whatever the classifier needs). The classifier
is a reward function or a reward model; answers that score above `--positive_above` are good:

    accelerate launch recipes/train_click.py --model_name_or_path MODEL --dataset_name prompts.jsonl \
        --output_dir runs/click --num_rounds 1 --num_candidates 20 --temperature 1 --top_p 0.9 \
        --pair_rule likelihood_near --rewards my_classifier.py:is_clean

On pairs you have (one row: `prompt`, `chosen`, `rejected`, `reference`):

    accelerate launch recipes/train_click.py --model_name_or_path MODEL --dataset_name pairs.jsonl \
        --output_dir runs/click

LoRA: `--use_peft`. To go on after an interruption: the same command and `--resume_from_checkpoint true`.

(Not called `click.py`: that would hide the package `click` from whatever the recipes import.)
"""

from pathlib import Path

from trl_ext.cli import Training, parse_recipe_args, run_recipe

DATACLASSES = (
    "trl.ScriptArguments",
    "trl_ext.CLICKConfig",
    "trl.ModelConfig",
    "trl.DatasetMixtureConfig",
    "trl_ext.sampling.config.SamplingConfig",
    "trl_ext.runs.config.RoundsConfig",
)
PLAYGROUND_CONFIG = Path(__file__).parent / "configs" / "click_playground.yaml"


def train(arguments, **stage):
    """Train once: on what the arguments say, or, in rounds, on the round's model, data and folder."""
    from trl_ext import CLICKTrainer

    parsed = parse_recipe_args(DATACLASSES, PLAYGROUND_CONFIG, arguments)
    training = Training(parsed, **stage)
    train_dataset, eval_dataset = training.load()
    trainer = CLICKTrainer(**training.model_and_args(), train_dataset=train_dataset, eval_dataset=eval_dataset)
    figures = training.train(trainer)
    return training.save(trainer, figures)


def main(arguments):
    from trl_ext.cli import in_rounds, start_rounds
    from trl_ext.data import RowOptions

    parsed = parse_recipe_args(DATACLASSES, PLAYGROUND_CONFIG, arguments)
    if not in_rounds(parsed):
        return train(arguments)
    rounds = start_rounds(parsed, rows=RowOptions(min_completions=1, reference=True))
    rounds.play(train, arguments)
    rounds.report("CLICK")


if __name__ == "__main__":
    run_recipe(main, DATACLASSES, __doc__)
