"""
Everything that is made from the recipes' dataclasses: `options.json`, and a page with every option as Markdown. In the
folder of a checkout:

    python -m trl_ext.cli.options_page
"""

import ast
import json
import re
from collections.abc import Iterable
from dataclasses import MISSING
from pathlib import Path

from ..runtime.files import write_atomically
from .help import place_of, shown_text, shown_value
from .options import PACKAGE, Classes, Option, OptionClass, classes_in, recipe_dataclasses, table_of, unused_fields

INTRODUCTION = """\
# Options of the recipes

Made by `python -m trl_ext.cli.options_page`; do not edit.

Each option is given on the command line (`--name value`) or in a file (`name: value`, with `--config FILE`); the
command line wins. On the command line the values of a list have spaces between them and a dict is JSON; in a file
both are YAML. A default that is not shown is `None`. `python recipes/NAME.py --help` prints the options of one recipe.
The docstrings of the classes say more, with ranges and sources. Of classes of TRL and transformers this page has names
and defaults; `--help` and their own documentation ([TRL](https://huggingface.co/docs/trl),
[transformers](https://huggingface.co/docs/transformers)) have the rest.

## Which recipe has which

A recipe has the options of all classes in its row. Where two of them declare the same option, the one that stands
first counts.
"""


def options_page(folder: Path, classes: Classes) -> str:
    """
    The page about a folder of recipes.

    Args:
        folder (`Path`): every `.py` file in it is a recipe, with the dotted names of its dataclasses as `DATACLASSES`.
        classes (`Classes`): what these names stand for.

    Raises:
        ValueError: a file is not a recipe.
    """
    lines = [INTRODUCTION, "| Recipe | | Classes |", "|---|---|---|"]
    sections, offered = {}, {}
    for file in sorted(folder.glob("*.py")):
        named = [classes[path] for path in recipe_dataclasses(file)]
        declaring = [one for inherited in named for one in inherited if one.own]
        sections.update({_title(one): one for one in declaring})
        offered.update({inherited[0]: unused_fields(inherited) for inherited in named})
        summary = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        links = ", ".join(f"[{one.name}](#{_anchor(_title(one))})" for one in declaring)
        lines.append(f"| `{file.name}` | {_cell(summary)} | {links} |")
    for title, one in sorted(sections.items(), key=lambda item: (place_of(item[1]), item[0].lower())):
        lines += ["", f"## {title}", ""]
        lines += _whole_table(one.own) if one.package == PACKAGE.name else _names(one.own)
        refused = offered.get(one)
        if refused:
            lines += ["", "Inherited, and refused if set:", "", "| Option | Instead |", "|---|---|"]
            lines += [f"| `{name}` | {_cell(why)} |" for name, why in refused.items()]
    return "\n".join(lines) + "\n"


def _title(one: OptionClass) -> str:
    return f"{one.package}.{one.name}"


def _anchor(title: str) -> str:
    return re.sub(r"[^\w-]", "", title.lower())


def _whole_table(options: Iterable[Option]) -> list[str]:
    rows = [f"| `{one.name}` | {_code(one.type)} | {_default(one)} | {_cell(shown_text(one))} |" for one in options]
    return ["| Option | Type | Default | |", "|---|---|---|---|", *rows]


def _names(options: Iterable[Option]) -> list[str]:
    """Names and defaults; TRL and transformers document the rest."""
    shown = [f"`{one.name}`" + (f" = {_default(one)}" if _default(one) else "") for one in options]
    return [", ".join(shown) + "."]


def _default(option: Option) -> str:
    if option.default is MISSING:
        return "required"
    return "" if option.default is None else _code(shown_value(option.default))


def _code(text: str) -> str:
    return _cell(f"`{text}`")


def _cell(text: str) -> str:
    """Text that neither ends a cell of a table nor, outside of code, begins an element of HTML."""
    parts = text.replace("|", "\\|").split("`")
    return "`".join(part if index % 2 else part.replace("<", "&lt;") for index, part in enumerate(parts))


def main() -> None:
    recipes = Path("recipes")
    table = table_of(sorted({path for file in recipes.glob("*.py") for path in recipe_dataclasses(file)}))
    write_atomically(Path(PACKAGE.name, "cli", "options.json"), json.dumps(table, indent=1) + "\n")
    write_atomically(Path("docs", "options.md"), options_page(recipes, classes_in(table)))


if __name__ == "__main__":
    main()
