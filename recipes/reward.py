"""
Train a reward model on preferences with the Bradley-Terry loss, by TRL's `RewardTrainer`.

With no arguments, an offline playground runs on a CPU: a small model learns to read numbers, and an unfriendly tone
with it; its own answers are ranked, and a reward model learns the ranking, and is tried on answers to other numbers.

    accelerate launch recipes/reward.py

On preferences (one row: `prompt`, `chosen`, `rejected`, optionally `margin`; or `prompt`, `completions`, `scores`; a
Hub name, a file or a folder):

    accelerate launch recipes/reward.py --model_name_or_path MODEL --dataset_name pairs.jsonl --output_dir runs/reward

Rewards that grow without bound, as certain preferences make them: `--difference_penalty 0.01` or `--max_difference 4`.
The model goes wherever rewards are named: `--rewards runs/reward`. LoRA:
`--use_peft --lora_task_type SEQ_CLS --lora_modules_to_save score`; merge the adapter before use. To go on after an
interruption: the same command and `--resume_from_checkpoint true`. All values of a run in one file:
`--config recipes/configs/reward_ultrafeedback.yaml`.
"""

from pathlib import Path

from trl_ext.cli import Training, parse_recipe_args, run_recipe
from trl_ext.runs.settings import is_playground

DATACLASSES = (
    "trl.ScriptArguments",
    "trl_ext.methods.reward.config.RewardConfig",
    "trl.ModelConfig",
    "trl.DatasetMixtureConfig",
)
PLAYGROUND_CONFIG = Path(__file__).parent / "configs" / "reward_playground.yaml"


def train(arguments, **stage):
    """Train once: on what the arguments say, or, on the playground, on the stage's model, data and folder."""
    from trl_ext.methods.reward.trainer import RewardTrainer

    parsed = parse_recipe_args(DATACLASSES, PLAYGROUND_CONFIG, arguments)
    training = Training(parsed, **stage)
    train_dataset, eval_dataset = training.load()
    trainer = RewardTrainer(**training.model_and_args(), train_dataset=train_dataset, eval_dataset=eval_dataset)
    figures = training.train(trainer)
    return training.save(trainer, figures)


def main(arguments):
    from trl_ext.cli import start_playground
    from trl_ext.playground.stages import pair_accuracy

    parsed = parse_recipe_args(DATACLASSES, PLAYGROUND_CONFIG, arguments)
    if not is_playground(*parsed):
        return train(arguments)
    if parsed[2].use_peft:
        raise ValueError(
            "`use_peft` must be False on the playground, got True: it tests its reward model, and an adapter would "
            "have to be merged first. Remove `--use_peft`, or train on your own data."
        )
    rounds = start_playground(parsed, num_stages=7)
    data = rounds.make_candidates("candidates", rounds.model)
    model = rounds.train("reward", train, rounds.model, data, arguments)
    pair_accuracy(rounds, model)


if __name__ == "__main__":
    run_recipe(main, DATACLASSES, __doc__)
