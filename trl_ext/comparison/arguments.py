"""The settings of a comparison that each method gets."""

import argparse
import dataclasses
import functools
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..cli.arguments import read_config, typed_options, with_config_apart
from ..cli.options import recipe_dataclasses
from ..cli.parse import imported, option_hints, parse_recipe_args
from ..runtime.settings import did_you_mean
from .config import IDLE, ComparisonConfig
from .methods import METHODS, RESERVED, settings_by_name

# fields of the comparison that are no options of its methods, or are set one by one
NOT_HANDED_ON = (
    *RESERVED, *IDLE, "methods", "seeds", "settings", "click_threshold", "num_checkpoints", "num_checkpoint_prompts",
    "max_length", "on_invalid_row", "model_revision",
)  # fmt: skip


def shared_settings(config: ComparisonConfig, model_args: Any, given: Collection[str]) -> dict[str, Any]:
    """The training settings that were given, for all methods, in YAML's types."""
    found = {}
    for part in (config, model_args):
        for entry in dataclasses.fields(part):
            if entry.init and entry.name in given and entry.name not in NOT_HANDED_ON:
                value = getattr(part, entry.name)
                found[entry.name] = value.to_dict() if hasattr(value, "to_dict") else getattr(value, "value", value)
    return {name: value for name, value in found.items() if not name.endswith("_token")}


def parse_comparison_args(
    dataclass_types: Sequence[str | type], playground_config: str | Path, args: Sequence[str]
) -> tuple[Any, ...]:
    """
    Parse as [`parse_recipe_args`] does, and join `--settings` with those of the config file (the playground's, if
    there is neither a file nor a model). The command line wins: an option that it has for all methods replaces the
    one in the file's settings of a method.

    Raises:
        ValueError, TypeError, FileNotFoundError: see [`parse_recipe_args`].
    """
    types, words = imported(dataclass_types), with_config_apart(args)
    typed = typed_options(word for word in words if word != "--config")
    file = None if {"model_name_or_path", "dataset_name"} & typed else playground_config
    file = words[words.index("--config") + 1] if "--config" in words else file
    if file is None:
        return parse_recipe_args(types, playground_config, words)
    in_file = settings_by_name(read_config(file, option_hints(types)).get("settings"))
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--settings", nargs="?")
    own = settings_by_name(parser.parse_known_args(words)[0].settings)
    shared = {entry.name for one in types[1:3] for entry in dataclasses.fields(one)} - set(NOT_HANDED_ON)
    replaced_by = {*own.get("all", {}), *(typed & {*shared, "max_length", "on_invalid_row"})}
    kept = {
        name: {key: value for key, value in values.items() if key not in replaced_by}
        for name, values in in_file.items()
    }
    settings = {name: {**kept.get(name, {}), **own.get(name, {})} for name in {**kept, **own}}
    return parse_recipe_args(types, playground_config, [*words, "--settings", json.dumps(settings, default=str)])


def check_shared(config: ComparisonConfig, recipes: Path) -> None:
    """
    Refuse options in `settings` that nobody reads.

    Raises:
        ValueError: an option of `all` that no method has.
    """
    known = set().union(
        *(_options(recipes / f"{method.recipe}.py") for method in METHODS.values() if method.recipe is not None)
    )
    unknown = sorted(set(config.settings.get("all", {})) - known)
    if unknown:
        raise ValueError(
            f"Unknown options {', '.join(f'`{name}`' for name in unknown)} in `settings` of 'all'. "
            + did_you_mean(unknown[0], known, otherwise="Remove them.")
        )


@functools.cache
def _options(recipe: Path) -> set[str]:
    """Names of a recipe's options."""
    classes = imported(recipe_dataclasses(recipe))
    return {entry.name for one in classes for entry in dataclasses.fields(one) if entry.init}
