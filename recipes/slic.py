"""
Train a model with SLiC-HF.

With no arguments, an offline playground runs on a CPU: a small model learns to read numbers, and an unfriendly tone
with it; its own answers are sampled and ranked, SLiC-HF trains on the pairs, and both models are compared on held-out
numbers.

    accelerate launch recipes/slic.py

SLiC-HF direct, on preferences you have (one row: `prompt`, `chosen`, `rejected`, optionally `reference`; a Hub name, a
file or a folder):

    accelerate launch recipes/slic.py --model_name_or_path MODEL --dataset_name pairs.jsonl --output_dir runs/slic

SLiC-HF sample-rank, on prompts alone (one row: `prompt`, and whatever the reward needs): the model's own answers are
sampled, scored and paired by a knock-out tournament; the regulariser's target is the best of them:

    accelerate launch recipes/slic.py --model_name_or_path MODEL --dataset_name prompts.jsonl --output_dir runs/slic \
        --num_rounds 1 --num_candidates 8 --temperature 0.7 --top_k 40 --pair_rule tournament \
        --rewards my_rewards.py:score

The same with LoRA: add `--use_peft`. To go on after an interruption: the same command and
`--resume_from_checkpoint true`. All values of a run in one file: `--config recipes/configs/slic_ultrafeedback.yaml`.
"""

from pathlib import Path

from trl_ext.cli import Training, parse_recipe_args, run_recipe

DATACLASSES = (
    "trl.ScriptArguments",
    "trl_ext.SLiCConfig",
    "trl.ModelConfig",
    "trl.DatasetMixtureConfig",
    "trl_ext.sampling.config.SamplingConfig",
    "trl_ext.runs.config.RoundsConfig",
)
PLAYGROUND_CONFIG = Path(__file__).parent / "configs" / "slic_playground.yaml"


def train(arguments, **stage):
    """Train once: on what the arguments say, or, in rounds, on the round's model, data and folder."""
    from trl_ext import SLiCTrainer

    parsed = parse_recipe_args(DATACLASSES, PLAYGROUND_CONFIG, arguments)
    training = Training(parsed, **stage)
    train_dataset, eval_dataset = training.load()
    trainer = SLiCTrainer(**training.model_and_args(), train_dataset=train_dataset, eval_dataset=eval_dataset)
    figures = training.train(trainer)
    return training.save(trainer, figures)


def main(arguments):
    from trl_ext.cli import in_rounds, start_rounds
    from trl_ext.data import RowOptions

    parsed = parse_recipe_args(DATACLASSES, PLAYGROUND_CONFIG, arguments)
    if not in_rounds(parsed):
        return train(arguments)
    rounds = start_rounds(parsed, rows=RowOptions(), best_as_reference=True)
    rounds.play(train, arguments)
    rounds.report("SLiC-HF")


if __name__ == "__main__":
    run_recipe(main, DATACLASSES, __doc__)
