"""Recipes as modules, as command lines, and the dataclasses of their options."""

import functools
import importlib.util
import sys

from tests.support.data import REPOSITORY, REWARDS
from trl_ext.cli.options import recipe_dataclasses


def command(recipe, model_dir, prompts, output_dir, launcher=(), **kwargs):
    settings = {
        "model_name_or_path": model_dir, "dataset_name": prompts, "output_dir": output_dir, "bf16": False,
        "report_to": "none", "use_cpu": True, "per_device_train_batch_size": 2, "num_train_epochs": 2,
        "learning_rate": 3e-3, "logging_steps": 1, "save_strategy": "steps", "save_steps": 3, "num_rounds": 2,
        "rewards": f"{REWARDS}:vowels", "num_watched_prompts": 4, "max_new_tokens": 8, "temperature": 1.0,
        "num_candidates": 3, "max_length": 128, "activation_checkpointing": False, **kwargs,
    }  # fmt: skip
    arguments = [item for key, value in settings.items() if value is not None for item in (f"--{key}", str(value))]
    return [*(launcher or (sys.executable,)), str(REPOSITORY / "recipes" / recipe), *arguments]


RECIPES = {file.stem: file for file in sorted((REPOSITORY / "recipes").glob("*.py"))}
DATACLASSES = {name: recipe_dataclasses(file) for name, file in RECIPES.items()}


@functools.cache
def recipe_module(name):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", REPOSITORY / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
