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


RUNS = "tests/runs/test_playground_runs.py::"
PLAYGROUNDS = RUNS + "test_playgrounds_as_the_readme_has_them"
HELP = "tests/unit/cli/test_recipe_help.py::test_help_takes_less_than_two_seconds"
HERE = "tests/docs/test_printed_commands.py::"
# run as printed; by which test. The playgrounds get an `--output_dir` and a `--seed`, nothing else but what is said
RUN = {
    "accelerate launch recipes/slic.py": PLAYGROUNDS + "[slic]",
    # go on, with `--resume_from_checkpoint true`, from what the one above has made and they would have made themselves
    "accelerate launch recipes/rrhf.py": PLAYGROUNDS + "[rrhf]",
    "accelerate launch recipes/train_click.py": PLAYGROUNDS + "[train_click]",
    "accelerate launch recipes/dpo.py": PLAYGROUNDS + "[dpo]",
    "accelerate launch recipes/ipo.py": PLAYGROUNDS + "[ipo]",
    "accelerate launch recipes/orpo.py": PLAYGROUNDS + "[orpo]",
    "accelerate launch recipes/kto.py": PLAYGROUNDS + "[kto]",
    "accelerate launch recipes/best_of_n.py": PLAYGROUNDS + "[best_of_n]",
    "accelerate launch recipes/reward.py": RUNS + "test_the_playground_of_a_reward_model",
    "accelerate launch recipes/rl.py": PLAYGROUNDS + "[rl]",
    # likewise, with `--seeds 1 --methods dpo`
    "accelerate launch recipes/compare.py": RUNS + "test_the_playground_of_a_comparison",
    "accelerate launch recipes/spin.py": RUNS + "test_the_playground_of_spin",  # with `--num_iterations 1`
    "python recipes/slic.py --help": HELP,
    "python recipes/NAME.py --help": HELP,
    "python -m trl_ext.playground DIRECTORY": HERE + "test_a_small_model",
    "python -m trl_ext.playground tiny-model": HERE + "test_a_small_model",
    # TRL's own script, called as its launcher does; with `bf16: false` and `max_steps: 1` in the file
    "trl reward --config reward.yaml": HERE + "test_trls_reward_script",
    "python -m trl_ext.cli.options_page recipes > docs/options.md": HERE + "test_pages_that_are_made",
    "python benchmarks/claims/summary.py": HERE + "test_pages_that_are_made",
    "python benchmarks/plot.py FOLDER": HERE + "test_committed_measurements_are_drawn_and_printed",
    "python benchmarks/playground.py --table": HERE + "test_committed_measurements_are_drawn_and_printed",
    "python benchmarks/scaling.py": HERE + "test_committed_measurements_are_drawn_and_printed",
}
