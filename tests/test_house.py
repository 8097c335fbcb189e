"""Rules of the house that no linter knows."""

from tests.support.data import REPOSITORY

MOST_LINES, MOST_OF_A_RECIPE = 500, 70


def test_no_file_is_longer_than_a_sitting():
    files = [
        file
        for folder in ("trl_ext", "recipes", "benchmarks", "tests")
        for file in (REPOSITORY / folder).rglob("*.py")
    ]
    lengths = {str(file.relative_to(REPOSITORY)): len(file.read_text().splitlines()) for file in files}
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES}
    recipes = {name: length for name, length in lengths.items() if name.startswith("recipes")}
    assert recipes and max(recipes.values()) <= MOST_OF_A_RECIPE, recipes
