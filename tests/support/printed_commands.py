"""The commands that the project prints: in Markdown, docstrings, and comments of configs and of the batch script."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.data import REPOSITORY

# where commands are printed, as patterns of paths in the repository
SOURCES = (
    "*.md",
    "docs/**/*.md",
    "recipes/*.md",
    "recipes/*.py",
    "recipes/configs/*.yaml",
    "recipes/slurm/*",
    "accelerate_configs/*",
    "benchmarks/**/*.md",
    "benchmarks/**/*.py",
    "trl_ext/**/*.py",
    "tests/upstream/run_against.py",
)
START = re.compile(
    r"(?:[A-Z_]+=\S+ )*"
    r"(?:accelerate launch|(?:\S+/)?(?:python3? (?:-m|\S*\.py)|pip install|pytest|sbatch|ruff|trl|trl-ext))(?= |$)"
)
FENCE = re.compile(r" *```")
INLINE = re.compile(r"`([^`]+)`")
CONTINUED = re.compile(r"\s*\\+$")  # two in a docstring
REMARK = re.compile(r"\s{2,}# .*$")
# what a test of its own runs as printed
RUN = (
    "python -m trl_ext.cli.options_page",
    "python benchmarks/claims/summary.py",
    "python benchmarks/playground.py --table",
    "python benchmarks/plot.py FOLDER",
    "python benchmarks/scaling.py",
    "trl reward --config reward.yaml",
)
# how a command is tried -> which commands are of this kind; the first that fits counts
KINDS = {
    "run": "|".join(map(re.escape, RUN)),
    # run with an `--output_dir` and a `--seed`, by tests/runs/test_playground_runs.py
    "playground": r"accelerate launch recipes/\w+\.py",
    # read by the recipe's own parser, and its trainer built
    "recipe": r"(?:[A-Z_]+=\S+ )*(?:accelerate launch|sbatch) .*recipes/\w+\.py.*|trl-ext .+",
    "help": r"python recipes/\w+\.py --help",  # run for every recipe, by tests/runs/test_recipe_help.py
    "small model": r"python -m trl_ext\.playground [\w-]+",  # run
    # measures for minutes or hours, or downloads packages: its options are parsed
    "script": r"python (?:benchmarks|tests)/\S+\.py.*",
    # runs the tests or downloads packages, as .ci/run does: what it names is there
    "suite": r"pytest.*|(?:\S+/)?pip install .+|python -m venv ENV",
}
# between backticks, what is only named: a program, or a part of a command
PART = re.compile(r"(accelerate launch|pip install|sbatch|ruff|trl|trl-ext)( \w+| --\w+)?$|.*(\.\.\.|…)")


@dataclass(frozen=True)
class Printed:
    """
    A command as it is printed.

    Attributes:
        command (`str`): on one line, with single spaces, without what a shell takes for a remark.
        where (`str`): `file:line`, relative to the repository.
    """

    command: str
    where: str


def kind_of(command: str) -> str | None:
    """How a command is tried, a key of `KINDS`; `None` if no pattern there fits."""
    return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, command)), None)


def printed_commands(root: Path = REPOSITORY) -> list[Printed]:
    """Every command that is printed in `SOURCES` under `root`, as often as it is printed."""
    files = sorted({file for pattern in SOURCES for file in root.glob(pattern) if file.is_file()})
    return [found for file in files for found in commands_of(file, root)]


def commands_of(file: Path, root: Path = REPOSITORY) -> list[Printed]:
    """The commands of one file, in the order of their lines."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        found = [*_of_blocks(text), *_inline(_outside_fences(text.splitlines()))]
    elif file.suffix == ".py":
        lines = _outside_fences(_docstring_lines(text))
        found = [*_indented(lines), *_inline(lines)]
    else:
        lines = [re.sub(r"^# ?", "", line) if line.startswith("#") else "" for line in text.splitlines()]
        found = [*_indented(lines), *_inline(lines)]
    return [Printed(command, f"{file.relative_to(root)}:{number}") for number, command in sorted(found)]


def _of_blocks(text: str) -> Iterator[tuple[int, str]]:
    """Of fenced blocks: their lines, whatever stands before a command on its line."""
    lines, fenced = text.splitlines(), False
    for index, line in enumerate(lines):
        if FENCE.match(line):
            fenced = not fenced
        elif fenced and not _continues(lines, index):
            yield from _split(index + 1, _joined(lines, index))


def _indented(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Of prose: lines that are set in by two spaces or more."""
    for index, line in enumerate(lines):
        if line.startswith("  ") and not _continues(lines, index):
            yield from _split(index + 1, _joined(lines, index))


def _continues(lines: list[str], index: int) -> bool:
    return index > 0 and bool(CONTINUED.search(lines[index - 1]))


def _joined(lines: list[str], index: int) -> str:
    """A line and those that continue it."""
    whole = REMARK.sub("", lines[index])
    while CONTINUED.search(whole) and index + 1 < len(lines):
        index += 1
        whole = f"{CONTINUED.sub('', whole)} {REMARK.sub('', lines[index]).strip()}"
    return whole


def _split(number: int, line: str) -> Iterator[tuple[int, str]]:
    """The commands of a line, which a shell would run one after the other."""
    for part in line.split("&&"):
        command = " ".join(part.split())
        if START.match(command):
            yield number, command


def _inline(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Of prose: whole commands between backticks, which may go over the end of a line."""
    text = "\n".join(lines)
    for match in INLINE.finditer(text):
        for number, command in _split(text.count("\n", 0, match.start()) + 1, match[1]):
            if not PART.match(command):
                yield number, command


def _outside_fences(lines: list[str]) -> list[str]:
    """Lines of Markdown, with empty ones for those of fenced blocks."""
    prose, fenced = [], False
    for line in lines:
        is_fence = bool(FENCE.match(line))
        prose.append("" if fenced or is_fence else line)
        fenced ^= is_fence
    return prose


def _docstring_lines(text: str) -> list[str]:
    """The lines of a module with empty ones for all that stands in no docstring."""
    written = text.splitlines()
    lines = [""] * len(written)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            first, last = docstring.lineno - 1, docstring.end_lineno
            lines[first:last] = (line.replace('"""', "   ") for line in written[first:last])
    return lines
