"""
Train a model with RRHF: rank K answers to each prompt.

With no arguments, an offline playground runs on a CPU: a small model learns to read numbers, and an unfriendly tone
with it; two rounds of RRHF train it on its own ranked answers. Beside it, one is trained on the best of them alone.

    accelerate launch recipes/rrhf.py

On ranked answers you have (one row: `prompt`, `completions`, `scores`; or `prompt`, `chosen`, `rejected`):

    accelerate launch recipes/rrhf.py --model_name_or_path MODEL --dataset_name ranked.jsonl --output_dir runs/rrhf

On prompts alone (one row: `prompt`, and whatever the reward needs), in rounds of sampling, scoring and training:

    accelerate launch recipes/rrhf.py --model_name_or_path MODEL --dataset_name prompts.jsonl --output_dir runs/rrhf \
        --num_rounds 2 --rewards my_rewards.py:score

Best-of-n (rejection sampling): `--rank_weight 0`. LoRA: `--use_peft`. To go on after an interruption: the same command
and `--resume_from_checkpoint true`. All values of a run in one file: `--config recipes/configs/rrhf_hh.yaml`.
"""

from pathlib import Path

from trl_ext.cli import Training, parse_recipe_args, run_recipe
from trl_ext.runs.settings import is_playground

DATACLASSES = (
    "trl.ScriptArguments",
    "trl_ext.RRHFConfig",
    "trl.ModelConfig",
    "trl.DatasetMixtureConfig",
    "trl_ext.sampling.config.SamplingConfig",
    "trl_ext.runs.config.RoundsConfig",
)
PLAYGROUND_CONFIG = Path(__file__).parent / "configs" / "rrhf_playground.yaml"


def train(arguments, **stage):
    """Train once: on what the arguments say, or, in rounds, on the round's model, data and folder."""
    from trl_ext import RRHFTrainer

    parsed = parse_recipe_args(DATACLASSES, PLAYGROUND_CONFIG, arguments)
    training = Training(parsed, **stage)
    train_dataset, eval_dataset = training.load()
    trainer = RRHFTrainer(**training.model_and_args(), train_dataset=train_dataset, eval_dataset=eval_dataset)
    figures = training.train(trainer)
    return training.save(trainer, figures)


def main(arguments):
    from trl_ext.cli import in_rounds, start_rounds
    from trl_ext.data import RowOptions

    parsed = parse_recipe_args(DATACLASSES, PLAYGROUND_CONFIG, arguments)
    if not in_rounds(parsed):
        return train(arguments)
    more_stages = 2 if is_playground(*parsed) else 0
    rounds = start_rounds(parsed, rows=RowOptions(min_completions=1), more_stages=more_stages)
    if more_stages:  # for comparison: the same candidates without ranking, imitation of the best
        rounds.evaluate("start", rounds.model)
        data = rounds.make_candidates("round-1", rounds.model)
        imitation = [*arguments, "--rank_weight", "0", "--sft_weight", "1", "--length_penalty", "1"]
        best_of_n = rounds.train("best-of-n", train, rounds.model, data, [*imitation, "--arithmetic", "paper"])
        rounds.evaluate("best-of-n", best_of_n)
    rounds.play(train, arguments)
    rounds.report("RRHF")


if __name__ == "__main__":
    run_recipe(main, DATACLASSES, __doc__)
