"""What every recipe reaches on the playground: the committed rows, to bounds. `test_playground_runs.py` runs them."""

import re
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
