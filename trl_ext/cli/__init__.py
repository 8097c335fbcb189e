"""The command line of the recipes."""

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Training": "train",
        "given_options": "parse",
        "in_rounds": "start",
        "parse_args": "parse",
        "parse_recipe_args": "parse",
        "refuse_all_but": "parse",
        "run_recipe": "run",
        "start_playground": "start",
        "start_rounds": "start",
        "start_self_play": "start_spin",
    },
)
