"""The help text of a recipe, from the options of its dataclasses (see `cli/options.py`)."""

import re
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Any

from .options import PACKAGE, Option, OptionClass, inherited_options, load_classes, unused_fields

MOST_COLUMNS = 100  # of the help text, where the terminal has more
FEWEST_COLUMNS = 40


@dataclass(frozen=True)
class Group:
    """
    Options that are shown together.

    Attributes:
        name (`str`): of the dataclass.
        package (`str`): it comes from.
        options (`tuple[Option, ...]`): as this dataclass declares them, or as those that inherit it change them.
    """

    name: str
    package: str
    options: tuple[Option, ...]


def groups(paths: Sequence[str]) -> list[Group]:
    """
    The options of a recipe's dataclasses, without those that are refused, and each once: under the last class of this
    package that declares it, or else under the first class that does. Groups of this package come first, then what
    comes from TRL (of that what is only inherited comes last), then the rest.
    """
    classes = load_classes(*paths)
    members: dict[OptionClass, list[Option]] = {}
    named = [classes[path][0] for path in paths]
    for path in paths:
        options, refused, found = inherited_options(classes[path]), unused_fields(classes[path]), classes[path]
        ours = [one for one in found if one.package == PACKAGE.name]
        # a class's own declarations say in which order its options stand
        for one in [*ours, *[one for one in found[::-1] if one not in ours]]:
            shown = {option.name for group in members.values() for option in group}
            mine = [options[own.name] for own in one.own if own.name not in shown and own.name not in refused]
            members[one] = [*members.get(one, []), *mine]
    order = sorted(members, key=lambda one: (place_of(one), one.package != PACKAGE.name and one not in named))
    return [Group(one.name, one.package, tuple(members[one])) for one in order if members[one]]


def refused_options(paths: Sequence[str]) -> dict[str, str]:
    """Options that a recipe's dataclasses have and refuse, each with what to set instead."""
    return {
        name: why
        for classes in map(load_classes(*paths).get, paths)
        for name, why in unused_fields(classes).items()
        if name in inherited_options(classes)
    }


def place_of(one: OptionClass) -> int:
    """0 for a class of this package, 1 for one of TRL, 2 for others."""
    return {PACKAGE.name: 0, "trl": 1}.get(one.package, 2)


def shown_value(value: Any) -> str:
    """A default as it is shown; text as it is typed, unless that would not be seen."""
    if isinstance(value, str) and re.fullmatch(r"\S+", value):
        return str(value)
    return repr(value)


def shown_text(option: Option) -> str:
    """What is said about an option, and its choices, as far as the text does not name them all."""
    text = option.help.replace("%%", "%").strip()  # argparse's way to write it
    text = re.sub(r"\[(`[^`]+`)\]", r"\1", text)
    if text and not text.endswith((".", "?", "!")):
        text += "."
    if option.choices is not None and not all(str(choice) in text for choice in option.choices):
        text += f" One of: {', '.join(map(str, option.choices))}."
    return text.strip()


def recipe_help(prog: str, docstring: str, paths: Sequence[str], *, width: int | None = None) -> str:
    """
    The text that a recipe prints for `--help`.

    Args:
        prog (`str`): its file.
        docstring (`str`): of the recipe.
        paths (`Sequence[str]`): dotted names of its dataclasses.
        width (`int`, *optional*): columns; by default those of the terminal, at most 100.
    """
    width = max(width or min(shutil.get_terminal_size().columns, MOST_COLUMNS), FEWEST_COLUMNS)

    def filled(text: str, indent: str = "", hanging: str | None = None) -> str:
        hanging = indent if hanging is None else hanging
        return _wrapped(text, width, indent, hanging)

    parts = [f"usage: {prog} [--config FILE] [--NAME VALUE ...]", *_filled_docstring(docstring, width)]
    parts.append(
        filled(
            "Options are written --name value, or --name alone to set a bool that has a default; the values of a list "
            "have spaces between them, and a dict is JSON. A bool that is True by default is also unset by --no_name. "
            "In names - is as good as _. Each is followed by its type and, if it has one, its default."
        )
    )
    entries = [("-h, --help", "Show this text and end.")]
    entries.append(("--config FILE", "YAML file with one `name: value` per line. The command line wins over it."))
    parts.append("\n".join(f"  {head}\n{filled(text, ' ' * 6)}" for head, text in entries))
    for group in groups(paths):
        lines = [f"{group.name} ({group.package}):"]
        for option in group.options:
            head = f"  --{option.name} {option.type}"
            if option.default is MISSING:
                head += ", required"
            elif option.default is not None:
                head = _with_default(head, shown_value(option.default), width)
            lines.append(head)
            lines += [filled(shown_text(option), " " * 6)] if shown_text(option) else []
        parts.append("\n".join(lines))
    refused = refused_options(paths)
    if refused:
        lines = [filled(f"--{name}: {why}", "  ", " " * 6) for name, why in refused.items()]
        parts.append("\n".join(["Inherited, and refused if set:", *lines]))
    return "\n\n".join(parts) + "\n"


def _with_default(head: str, default: str, width: int) -> str:
    whole = f"{head} = {default}"
    return whole if len(whole) <= width else f"{head} =\n          {default}"


def _filled_docstring(docstring: str, width: int) -> list[str]:
    """Paragraphs in the width; indented lines are commands, which are broken with a backslash."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", textwrap.dedent(docstring).strip("\n")):
        if not paragraph.startswith(" "):
            paragraphs.append(_wrapped(paragraph, width))
            continue
        commands = [_wrapped(line, width - 2, " " * 4, " " * 8) for line in paragraph.splitlines()]
        paragraphs.append("\n".join(command.replace("\n", " \\\n") for command in commands))
    return paragraphs


def _wrapped(text: str, width: int, indent: str = "", hanging: str = "") -> str:
    """Text in lines of a width, but for words that are longer."""
    return textwrap.fill(
        " ".join(text.split()), width, initial_indent=indent, subsequent_indent=hanging,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
