"""
A page with every option of every recipe, as Markdown:

    python -m trl_ext.cli.options_page recipes > docs/options.md
"""

import argparse
import ast
import re
from collections.abc import Iterable
from dataclasses import MISSING
from pathlib import Path

from .help import (
    OUR_PACKAGE,
    Option,
    declaring_classes,
    package_of,
    place_of,
    read_dataclass,
    recipe_dataclasses,
    shown_text,
    shown_value,
    unused_fields,
)

INTRODUCTION = """\
# Options of the recipes

Made by `python -m trl_ext.cli.options_page recipes > docs/options.md`; do not edit.

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


def options_page(folder: Path) -> str:
    """
    The page about a folder of recipes.

    Args:
        folder (`Path`): every `.py` file in it is a recipe, with the dotted names of its dataclasses as `DATACLASSES`.

    Raises:
        ValueError: a file is none, or a dataclass cannot be read.
    """
    lines = [INTRODUCTION, "| Recipe | | Classes |", "|---|---|---|"]
    sections, offered = {}, set()
    for file in sorted(folder.glob("*.py")):
        named = [read_dataclass(path) for path in recipe_dataclasses(file)]
        classes = [one for reading in named for one in declaring_classes(reading) if one.own]
        sections.update({_title(one): one for one in classes})
        offered.update(named)
        summary = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        links = ", ".join(f"[{one.__name__}](#{_anchor(_title(one))})" for one in classes)
        lines.append(f"| `{file.name}` | {_cell(summary)} | {links} |")
    for title, one in sorted(sections.items(), key=lambda item: (place_of(item[1]), item[0].lower())):
        lines += ["", f"## {title}", ""]
        lines += _whole_table(one.own.values()) if package_of(one) == OUR_PACKAGE else _names(one.own.values())
        refused = unused_fields(one) if one in offered else {}
        if refused:
            lines += ["", "Inherited, and refused if set:", "", "| Option | Instead |", "|---|---|"]
            lines += [f"| `{name}` | {_cell(why)} |" for name, why in refused.items()]
    return "\n".join(lines) + "\n"


def _title(reading: type) -> str:
    return f"{package_of(reading)}.{reading.__name__}"


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
    parser = argparse.ArgumentParser(description="Print a page with every option of every recipe, as Markdown.")
    parser.add_argument("folder", type=Path, help="Folder of the recipes.")
    print(options_page(parser.parse_args().folder), end="")


if __name__ == "__main__":
    main()
