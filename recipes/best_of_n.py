"""
Train a model with best-of-n (rejection sampling, RAFT): imitate the best of n answers, by TRL's `SFTTrainer`.

With no arguments, an offline playground runs on a CPU: a small model learns to read numbers, and an unfriendly tone
with it; its own answers are sampled and ranked, the best are imitated, and both models are compared on held-out
numbers.

    accelerate launch recipes/best_of_n.py

On ranked answers (one row: `prompt`, `completions`, `scores`; or `prompt`, `chosen`, `rejected`):

    accelerate launch recipes/best_of_n.py --model_name_or_path MODEL --dataset_name ranked.jsonl \
        --output_dir runs/best_of_n

On prompts alone (one row: `prompt`, and whatever the reward needs): the model's own answers are sampled and scored, as
often as there are rounds:

    accelerate launch recipes/best_of_n.py --model_name_or_path MODEL --dataset_name prompts.jsonl \
        --output_dir runs/best_of_n --num_rounds 1 --rewards my_rewards.py:score

The same with LoRA: add `--use_peft`. To go on after an interruption: the same command and
`--resume_from_checkpoint true`. All values of a run in one file: `--config recipes/configs/best_of_n_hh.yaml`.
"""

from pathlib import Path

from trl_ext.cli import Training, parse_recipe_args, run_recipe

DATACLASSES = (
    "trl.ScriptArguments",
    "trl_ext.methods.best_of_n.config.BestOfNConfig",
    "trl.ModelConfig",
    "trl.DatasetMixtureConfig",
    "trl_ext.sampling.config.SamplingConfig",
    "trl_ext.runs.config.RoundsConfig",
)
PLAYGROUND_CONFIG = Path(__file__).parent / "configs" / "best_of_n_playground.yaml"


def train(arguments, **stage):
    """Train once: on what the arguments say, or, in rounds, on the round's model, data and folder."""
    from trl_ext.methods.best_of_n.trainer import BestOfNTrainer

    parsed = parse_recipe_args(DATACLASSES, PLAYGROUND_CONFIG, arguments)
    training = Training(parsed, **stage)
    train_dataset, eval_dataset = training.load()
    trainer = BestOfNTrainer(**training.model_and_args(), train_dataset=train_dataset, eval_dataset=eval_dataset)
    figures = training.train(trainer)
    return training.save(trainer, figures)


def main(arguments):
    from trl_ext.cli import in_rounds, start_rounds
    from trl_ext.data import RowOptions

    parsed = parse_recipe_args(DATACLASSES, PLAYGROUND_CONFIG, arguments)
    if not in_rounds(parsed):
        return train(arguments)
    rounds = start_rounds(parsed, rows=RowOptions(min_completions=1))
    rounds.play(train, arguments)
    rounds.report("best-of-n")


if __name__ == "__main__":
    run_recipe(main, DATACLASSES, __doc__)
