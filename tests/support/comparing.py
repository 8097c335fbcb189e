"""A comparison on a tiny model as a command."""

from tests.support.data import REPOSITORY
from trl_ext.cli.options import recipe_dataclasses
from trl_ext.cli.parse import given_options
from trl_ext.comparison.arguments import parse_comparison_args
from trl_ext.comparison.seed_run import SeedRun

RECIPES = REPOSITORY / "recipes"
RECIPE = RECIPES / "compare.py"
PLAYGROUND = RECIPES / "configs" / "compare_playground.yaml"


def parsed_from(arguments):
    return parse_comparison_args(recipe_dataclasses(RECIPE), PLAYGROUND, list(arguments))


def one_seed(*arguments):
    """What a comparison knows before it begins anything."""
    parsed = parsed_from(arguments)
    game = SeedRun.__new__(SeedRun)
    game.config, game.model_args, game.sampling, game.seed, game.recipes = parsed[1], parsed[2], parsed[4], 1, RECIPES
    game.given = given_options(list(arguments), PLAYGROUND)
    return game
