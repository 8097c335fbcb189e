"""What every recipe reaches on the playground: the committed rows and a fresh run of the first command, to bounds."""

import re
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import playground as figures

ROWS = figures.read_rows()
MEASURED = sorted({recipe for recipe, _ in ROWS})
SECTION = re.search(r"^## The playground$(.*?)^## ", (REPOSITORY / "README.md").read_text(), re.S | re.M)[1]


@pytest.mark.parametrize("recipe", MEASURED)
def test_committed_figures_are_within_bounds(recipe):
    seeds = {seed for name, seed in ROWS if name == recipe}
    assert seeds >= {1, 2, 3} and recipe in figures.BOUNDS
    problems = [
        f"seed {seed}, {problem}"
        for seed in seeds - {figures.TUNED_WITH}
        for problem in figures.out_of_bounds(recipe, ROWS[recipe, seed])
    ]
    assert not problems


def test_figures_of_the_readme_are_those_of_the_rows():
    table = figures.readme_table(ROWS)
    assert table in SECTION, "python benchmarks/playground.py --table"
    prose = SECTION.replace(table, "")
    loose = [number for number in re.findall(r"[-+]?\d+\.\d\d+|\d[\d.]* ?%", prose) if number not in table]
    assert not loose, f"figures without a row: {loose}"


@pytest.mark.slow
def test_the_first_command_ranks(tmp_path):
    """With a seed that tuned nothing: the reward rises, most comparisons are won, and so are the pairs of training."""
    command = [sys.executable, "-m", "accelerate.commands.launch", str(REPOSITORY / "recipes" / "slic.py")]
    command += ["--seed", "1", "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "watched prompts, one answer each at temperature 1" in done.stdout
    rows = figures.rows_of(tmp_path / "run")
    assert [row["model"] for row in rows] == ["start", "round-1"]
    assert not figures.out_of_bounds("slic", rows)
