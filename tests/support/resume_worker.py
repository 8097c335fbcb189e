"""
Train, or resume from a checkpoint, through a recipe's `Training`; run under `accelerate launch`.

    resume_worker.py MODEL DATA OUTPUT_DIR [ARGUMENTS OF recipes/slic.py]
"""

import sys
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "recipes"))

import slic  # noqa: E402

from trl_ext.cli.run import run_recipe  # noqa: E402

SETTINGS = {
    "per_device_train_batch_size": 1,
    "learning_rate": 1e-2,
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "report_to": "none",
    "bf16": "false",
    "activation_checkpointing": "false",
    "disable_tqdm": "true",
    "optim": "adamw_torch",
    "use_cpu": "true",
}


def main(arguments: list[str]) -> None:
    model, data, output_dir, *others = arguments
    settings = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
    paths = ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", output_dir]
    slic.main([*paths, *settings, *others])


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_recipe(main)
