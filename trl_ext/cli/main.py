"""
The `trl-ext` command: `trl-ext slic --config my.yaml --num_processes 2` launches the recipe through accelerate.

It starts the same scripts as `accelerate launch recipes/slic.py`, which are installed with the package. Options that
the recipe has go to the recipe, the others to `accelerate launch`. Nothing heavy is imported before the launcher.
"""

import ast
import importlib.util
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from ..runtime.settings import did_you_mean
from .arguments import with_config_apart
from .mistakes import is_known, print_mistake
from .options import options_of, recipe_dataclasses
from .preflight import check_before_imports
from .run import asks_for_help, print_help

PACKAGE = Path(__file__).parents[1]


def folder_of(name: str) -> Path:
    """The folder `recipes` or `accelerate_configs`: inside an installed package, or beside it in a checkout."""
    installed = PACKAGE / name
    return installed if installed.is_dir() else PACKAGE.parent / name


@cache
def recipes() -> dict[str, Path]:
    """Every recipe's script by its command."""
    return {file.stem.removeprefix("train_"): file for file in sorted(folder_of("recipes").glob("*.py"))}


def overview() -> str:
    """The text of `trl-ext --help`."""
    lines = [
        "usage: trl-ext RECIPE [--config FILE] [--NAME VALUE ...]",
        "",
        "Recipes, each on its playground when no model and no data are named:",
        "",
    ]
    for name, file in recipes().items():
        said = " ".join((ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split())
        lines.append(f"  {name:<17}{textwrap.shorten(re.split('[.:] ', said)[0].rstrip('.'), 90, placeholder=' …')}")
    configs = ", ".join(sorted(file.stem for file in folder_of("accelerate_configs").glob("*.yaml")))
    lines += [
        "",
        "`trl-ext RECIPE --help` lists a recipe's options. Options of `accelerate launch`, such as --num_processes 8,",
        f"are handed to it. --accelerate_config takes a file, or one of: {configs}.",
        "--config takes a file, or the name of one in recipes/configs, such as slic_ultrafeedback.yaml.",
    ]
    return "\n".join(lines) + "\n"


@cache
def launcher_options() -> dict[str, bool]:
    """
    The options of `accelerate launch`, read from its source: whether a value follows, by name.
    """
    source = Path(str(importlib.util.find_spec("accelerate").submodule_search_locations[0])) / "commands" / "launch.py"
    found: dict[str, bool] = {}
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            names = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            action = next((one.value for one in node.keywords if one.arg == "action"), None)
            takes_value = not (isinstance(action, ast.Constant) and str(action.value).startswith("store_"))
            found.update({name: takes_value for name in names if name.startswith("-")})
    return found


def split_options(args: Sequence[str], known: Mapping[str, object]) -> tuple[list[str], list[str]]:
    """
    The words for `accelerate launch` and the words for the recipe.

    Args:
        args (`Sequence[str]`): the command line behind the recipe's name.
        known (`Mapping`): the recipe's options by name.

    Raises:
        ValueError: an option that neither has.
    """
    launcher, names = launcher_options(), {*known, "config"}
    ours: list[str] = []
    theirs: list[str] = []
    words = list(args)
    while words:
        word = words.pop(0)
        option, _, value = word.partition("=")
        name = option.lstrip("-").replace("-", "_")
        if not word.startswith("--") or name in names or name.removeprefix("no_") in names:
            ours.append(word)
        elif name == "accelerate_config":
            value = value or (words.pop(0) if words else "")
            theirs += ["--config_file", str(_shipped(value, "accelerate_configs", ".yaml"))]
        elif option in launcher or f"--{name}" in launcher:
            takes_value = launcher.get(option, launcher.get(f"--{name}"))
            theirs.append(word)
            if takes_value and not value and words:
                theirs.append(words.pop(0))
        else:
            near = {*names, "accelerate_config", *(one.lstrip("-") for one in launcher)}
            raise ValueError(f"Unknown option `{option[:80]}`. {did_you_mean(name, near, '--')}")
    ours = with_config_apart(ours)
    if "--config" in ours:
        index = ours.index("--config") + 1
        ours[index] = str(_shipped(ours[index], "recipes/configs", ".yaml"))
    return theirs, ours


def _shipped(name: str, folder: str, ending: str) -> Path | str:
    """A file of the user's, or else the one of this name that is installed with the package."""
    first, _, rest = folder.partition("/")
    shipped = folder_of(first) / rest / (name if name.endswith(ending) else name + ending)
    return name if Path(name).exists() or not shipped.is_file() else shipped


def main() -> None:
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help"):
        print(overview(), end="")
        return
    name, *args = args
    if name == "--version":
        from importlib.metadata import version

        print(version("trl_ext"))
        return
    script = recipes().get(name)
    if script is None:
        print_mistake(ValueError(f"Unknown recipe `{name[:80]}`. {did_you_mean(name, recipes())}"), wait=False)
        sys.exit(2)
    if asks_for_help(args):
        sys.argv[0] = f"trl-ext {name}"
        print_help(recipe_dataclasses(script), ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "")
        return
    try:
        dataclasses = recipe_dataclasses(script)
        launcher, words = split_options(args, options_of(*dataclasses))
        check_before_imports(dataclasses, words)
    except Exception as error:
        if not is_known(error):
            raise
        print_mistake(error, wait=False)
        sys.exit(1)
    from accelerate.commands.launch import main as launch

    sys.argv = ["accelerate launch", *launcher, str(script), *words]
    launch()


if __name__ == "__main__":
    main()
