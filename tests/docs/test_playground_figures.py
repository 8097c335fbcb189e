"""What every recipe reaches on the playground: the committed rows, to bounds. `test_playground_runs.py` runs them."""

import csv
import re

import playground as figures
import plot
import pytest

from tests.support.data import REPOSITORY

ROWS = figures.read_rows()
MEASURED = sorted({recipe for recipe, _ in ROWS})
PAGE = (REPOSITORY / "docs" / "playground.md").read_text()


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


def test_figures_of_the_page_are_those_of_the_rows():
    table = figures.table(ROWS)
    assert table in PAGE, "python benchmarks/playground.py --table"
    prose = PAGE.replace(table, "")
    loose = [number for number in re.findall(r"[-+]?\d+\.\d\d+|\d[\d.]* ?%", prose) if number not in table]
    assert not loose, f"figures without a row: {loose}"


def test_the_picture_is_of_the_rows():
    """The values are in its description; `python benchmarks/plot.py docs/images` draws it anew."""
    picture = (REPOSITORY / "docs" / "images" / "playground.svg").read_text()
    values = re.search("<dc:description>(.+?)</dc:description>", picture, re.S)[1]
    assert " ".join(values.split()) == plot.description(plot.rewards_by_recipe())


def test_the_answers_of_the_readme_are_committed():
    with (REPOSITORY / "benchmarks" / "results" / "playground_answers.csv").open(newline="") as file:
        rows = [f"| {row['prompt']} | {row['before']} | {row['after']} |" for row in csv.DictReader(file)]
    assert len(rows) == 4 and "\n".join(rows) in (REPOSITORY / "README.md").read_text()
