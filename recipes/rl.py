"""
Train a model by reinforcement learning towards a reward, by TRL's `RLOOTrainer`.

With no arguments, an offline playground runs on a CPU: a small model learns to read numbers, and an unfriendly tone
with it; a reward model learns from its ranked answers; RLOO trains towards the reward model, and both models are
compared on held-out numbers by the true reward, which the training has never seen.

    accelerate launch recipes/rl.py

On prompts (one row: `prompt`, and whatever the reward needs; a Hub name, a file or a folder), towards a reward model
such as `recipes/reward.py` trains, or a function:

    accelerate launch recipes/rl.py --model_name_or_path MODEL --dataset_name prompts.jsonl --output_dir runs/rl \
        --rewards runs/reward

LoRA: add `--use_peft`. To go on after an interruption: the same command and `--resume_from_checkpoint true`. All
values of a run in one file: `--config recipes/configs/rl_tldr.yaml`.
"""

from pathlib import Path

from trl_ext.cli import Training, parse_recipe_args, run_recipe
from trl_ext.runs.settings import is_playground

DATACLASSES = (
    "trl.ScriptArguments",
    "trl_ext.methods.rloo.config.RLOOConfig",
    "trl.ModelConfig",
    "trl.DatasetMixtureConfig",
)
PLAYGROUND_CONFIG = Path(__file__).parent / "configs" / "rl_playground.yaml"


def train(arguments, **stage):
    """Train once: on what the arguments say, or, on the playground, on the stage's model, data and folder."""
    from trl_ext.methods.rloo.trainer import RLOOTrainer

    parsed = parse_recipe_args(DATACLASSES, PLAYGROUND_CONFIG, arguments)
    training = Training(parsed, **stage)
    train_dataset, eval_dataset = training.load()
    trainer = RLOOTrainer(**training.model_and_args(), train_dataset=train_dataset, eval_dataset=eval_dataset)
    figures = training.train(trainer)
    return training.save(trainer, figures)


def main(arguments):
    from trl_ext.cli import start_playground
    from trl_ext.playground.stages import reward_stage

    parsed = parse_recipe_args(DATACLASSES, PLAYGROUND_CONFIG, arguments)
    if not is_playground(*parsed):
        return train(arguments)
    rewards = parsed[1].rewards
    rounds = start_playground(parsed, num_stages=4 if rewards else 7)
    rounds.evaluate("start", rounds.model)
    if not rewards:  # a reward model of ranked answers
        data = rounds.make_candidates("candidates", rounds.model)
        rounds.run.stage("reward/model", reward_stage, inputs={"model": Path(rounds.model), "data": data},
                         seed=rounds.seed, title="training a reward model on the answers")  # fmt: skip
        rewards = [str(rounds.run.path("reward", "model"))]
    model = rounds.train("trained", train, rounds.model, rounds.prompts, [*arguments, "--rewards", *rewards])
    rounds.evaluate("trained", model)
    rounds.model_to_take = str(model)
    rounds.write_report()
    rounds.report("RLOO")


if __name__ == "__main__":
    run_recipe(main, DATACLASSES, __doc__)
