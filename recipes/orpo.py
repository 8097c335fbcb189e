"""
Train a model with ORPO, by TRL's `ORPOTrainer`.

With no arguments, an offline playground runs on a CPU: a small model learns to read numbers, and an unfriendly tone
with it; its own answers are sampled and ranked, ORPO trains on the pairs, and both models are compared on held-out
numbers.

    accelerate launch recipes/orpo.py

On preferences (one row: `prompt`, `chosen`, `rejected`; or `prompt`, `completions`, `scores`; a Hub name, a file or a
folder):

    accelerate launch recipes/orpo.py --model_name_or_path MODEL --dataset_name pairs.jsonl --output_dir runs/orpo

On prompts alone (one row: `prompt`, and whatever the reward needs): the model's own answers are sampled, scored, and
the best is set against the worst, as often as there are rounds:

    accelerate launch recipes/orpo.py --model_name_or_path MODEL --dataset_name prompts.jsonl --output_dir runs/orpo \
        --num_rounds 1 --rewards my_rewards.py:score

The same with LoRA: add `--use_peft`. To go on after an interruption: the same command and
`--resume_from_checkpoint true`. All values of a run in one file: `--config recipes/configs/orpo_ultrafeedback.yaml`.
"""

from pathlib import Path

from trl_ext.cli import Training, parse_recipe_args, run_recipe

DATACLASSES = (
    "trl.ScriptArguments",
    "trl_ext.methods.orpo.config.ORPOConfig",
    "trl.ModelConfig",
    "trl.DatasetMixtureConfig",
    "trl_ext.sampling.config.SamplingConfig",
    "trl_ext.runs.config.RoundsConfig",
)
PLAYGROUND_CONFIG = Path(__file__).parent / "configs" / "orpo_playground.yaml"


def train(arguments, **stage):
    """Train once: on what the arguments say, or, in rounds, on the round's model, data and folder."""
    from trl_ext.methods.orpo.trainer import ORPOTrainer

    parsed = parse_recipe_args(DATACLASSES, PLAYGROUND_CONFIG, arguments)
    training = Training(parsed, **stage)
    train_dataset, eval_dataset = training.load()
    trainer = ORPOTrainer(**training.model_and_args(), train_dataset=train_dataset, eval_dataset=eval_dataset)
    figures = training.train(trainer)
    return training.save(trainer, figures)


def main(arguments):
    from trl_ext.cli import in_rounds, start_rounds
    from trl_ext.data import RowOptions

    parsed = parse_recipe_args(DATACLASSES, PLAYGROUND_CONFIG, arguments)
    if not in_rounds(parsed):
        return train(arguments)
    rounds = start_rounds(parsed, rows=RowOptions())
    rounds.play(train, arguments)
    rounds.report("ORPO")


if __name__ == "__main__":
    run_recipe(main, DATACLASSES, __doc__)
