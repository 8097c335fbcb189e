"""
Compare methods: train them on the same data with the same budget, and see what each does.

With no arguments, an offline playground runs on a CPU, with SFT and every method: SLiC-HF direct and sample-rank, RRHF
in one and in two rounds.

    accelerate launch recipes/compare.py

On your own prompts and reward (one row: `prompt`, and whatever the reward needs; with `chosen` and `rejected` for
SLiC-HF direct, with `reference` for SPIN and CLICK):

    accelerate launch recipes/compare.py --model_name_or_path MODEL --dataset_name prompts.jsonl \\
        --output_dir runs/compare --rewards my_rewards.py:score --methods slic_sample_rank rrhf dpo --seeds 1 2 3 \\
        --max_steps 200

What comes out: `comparison.html`, a page to read; `comparison.md`, a table to paste; `comparison.csv`, every figure.
Options of a method: `--settings '{"dpo": {"beta": 0.3}}'`. To go on after an interruption, or to add methods: the same
command and `--resume_from_checkpoint true`. All values of a run in one file:
`--config recipes/configs/compare_tldr.yaml`.
"""

import sys
from pathlib import Path

from trl_ext.cli import given_options, run_recipe
from trl_ext.runs.settings import is_playground

DATACLASSES = (
    "trl.ScriptArguments",
    "trl_ext.comparison.config.ComparisonConfig",
    "trl.ModelConfig",
    "trl.DatasetMixtureConfig",
    "trl_ext.sampling.config.SamplingConfig",
    "trl_ext.comparison.config.ComparedRoundsConfig",
)
PLAYGROUND_CONFIG = Path(__file__).parent / "configs" / "compare_playground.yaml"


def main(arguments):
    from trl_ext.comparison.arguments import parse_comparison_args
    from trl_ext.comparison.compare import compare
    from trl_ext.comparison.seed_run import has_failed

    parsed = parse_comparison_args(DATACLASSES, PLAYGROUND_CONFIG, arguments)
    given = given_options(arguments, PLAYGROUND_CONFIG if is_playground(*parsed) else None)
    if has_failed(compare(parsed, Path(__file__).parent, given)):
        sys.exit(
            "Some methods failed. The report has their reasons. Correct what they name, and add "
            "`--resume_from_checkpoint true` to resume."
        )


if __name__ == "__main__":
    run_recipe(main, DATACLASSES, __doc__)
