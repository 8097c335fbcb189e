"""The frame that papers' claims are tried in, and the claims' committed outcomes."""

import csv
import dataclasses
import importlib
import json
import math

import dpo_displacement
import on_playground
import pytest
import summary
import yaml
from claim import TEXTS, Claim, Expectation, judge, main

from tests.support.data import REPOSITORY
from trl_ext.cli.options import recipe_dataclasses
from trl_ext.comparison.arguments import parse_comparison_args

FOLDER = REPOSITORY / "benchmarks" / "claims"
NAMES = sorted(file.stem for file in FOLDER.glob("*.py") if "\nCLAIM = " in file.read_text())


def small_claim(run=None, **changes) -> Claim:
    """A claim whose result is its seed times `settings["factor"]`."""
    claim = Claim(
        name="small",
        title="Seeds are small",
        source="Nowhere",
        paper="Seeds are small.",
        settings={"factor": 2, "sizes": (1, 2)},
        seeds=(1, 2, 3),
        run=run or (lambda seed, settings: {"rows": [{"value": seed * settings["factor"]}]}),
        draw=lambda results, path: path.write_text(str(results)),
        expectations=[Expectation("small", lambda result: result["rows"][0]["value"], below=10)],
        decided_by="The factor.",
    )
    return dataclasses.replace(claim, **changes)


@pytest.mark.parametrize(
    ("values", "above", "below", "outcome"),
    [
        # mean 2, interval 2 -+ 2.484 (t of 2 degrees of freedom, 4.303, by 1 by 1 / sqrt(3))
        ([1.0, 2.0, 3.0], -0.5, None, "came true"),
        ([1.0, 2.0, 3.0], None, 4.5, "came true"),
        ([1.0, 2.0, 3.0], -0.5, 4.5, "came true"),
        ([1.0, 2.0, 3.0], -0.4, 4.5, "open"),
        ([1.0, 2.0, 3.0], -0.5, 4.4, "open"),
        ([1.0, 2.0, 3.0], 1.0, None, "open"),
        ([1.0, 2.0, 3.0], 3.0, None, "open"),
        ([1.0, 2.0, 3.0], 4.5, None, "did not come true"),
        ([1.0, 2.0, 3.0], None, -0.5, "did not come true"),
        ([1.0, 1.0], 0.0, None, "came true"),
        ([1.0, 1.0], 1.0, None, "did not come true"),  # a bound is not within the bounds
        ([1.0], 0.0, None, "open"),  # nothing says how much a single seed means
    ],
)
def test_an_interval_within_the_bounds_outside_or_across(values, above, below, outcome):
    assert judge(values, above, below)["outcome"] == outcome


def test_the_interval_by_hand():
    judged = judge([1.0, 2.0, 3.0], 0.0, None)
    assert judged["mean"] == 2
    assert judged["interval"] == pytest.approx([2 - 2.4841, 2 + 2.4841], abs=1e-4)
    assert judge([5.0], 0.0, None)["interval"] is None


def test_the_outcome_is_written_whichever_way(tmp_path):
    measure = small_claim().expectations[0].measure
    sides = [Expectation("under", measure, below=100), Expectation("over", measure, above=100)]
    main(small_claim(expectations=sides), [], runs=tmp_path / "runs", results=tmp_path / "results")
    written = json.loads((tmp_path / "results" / "small.json").read_text())
    assert [expectation["outcome"] for expectation in written["expectations"]] == ["came true", "did not come true"]
    assert [expectation["values"] for expectation in written["expectations"]] == [[2, 4, 6]] * 2
    with (tmp_path / "results" / "small.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["value"]) for row in rows] == [("1", "2"), ("2", "4"), ("3", "6")]
    assert all(row["versions"] and row["commit"] and row["command"] for row in rows)
    assert (tmp_path / "results" / "small.png").exists()
    page = summary.readme(tmp_path / "results")
    assert "- [small](#small): over: 4 [-0.9683, 8.968], expected above 100" in page
    assert "**Open**: nothing." in page
    assert "| over | above 100 | 2, 4, 6 | 4 [-0.9683, 8.968] | **did not come true** |" in page
    assert "**What decided.** The factor." in page and "Rows older" not in page
    assert "| [small](#small): Seeds are small | 1 | 1 | 0 |  |" in page


def test_a_finished_seed_is_not_run_again(tmp_path):
    started = []

    def run(seed, settings):
        started.append(seed)
        if seed == 2 and started.count(2) == 1:
            raise KeyboardInterrupt
        return {"rows": [{"value": seed}]}

    places = {"runs": tmp_path / "runs", "results": tmp_path / "results"}
    with pytest.raises(KeyboardInterrupt):
        main(small_claim(run), [], **places)
    assert not (tmp_path / "results").exists()
    main(small_claim(run), [], **places)
    assert started == [1, 2, 2, 3]
    main(small_claim(run), ["--seeds", "4", "1"], **places)
    assert started == [1, 2, 2, 3, 4]
    assert json.loads((tmp_path / "results" / "small.json").read_text())["seeds"] == [4, 1]


def test_seeds_of_other_settings_are_refused(tmp_path):
    places = {"runs": tmp_path / "runs", "results": tmp_path / "results"}
    main(small_claim(), ["--seeds", "1"], **places)
    other = small_claim(settings={"factor": 3, "sizes": (1, 2), "new": 1})
    with pytest.raises(
        ValueError, match=r"seed-1.json was made with other settings \(factor, new\).*Move .*small away"
    ):
        main(other, ["--seeds", "1", "2"], **places)
    assert not (tmp_path / "runs" / "small" / "seed-2.json").exists()


def test_what_cannot_be_judged_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="has no bound"):
        Expectation("anything", lambda result: 0.0)
    diverged = small_claim(lambda seed, settings: {"rows": [{"value": math.nan}]})
    with pytest.raises(ValueError, match=r"'small' measured \[nan, nan, nan\] for seeds \[1, 2, 3\]"):
        main(diverged, [], runs=tmp_path, results=tmp_path / "results")
    assert not (tmp_path / "results").exists()
    with pytest.raises(SystemExit):
        main(small_claim(), ["--seeds", "1", "1"], runs=tmp_path, results=tmp_path)
    assert "counts a seed twice" in capsys.readouterr().err


def test_there_are_claims():
    assert "ipo_bandit" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_outcome_is_of_the_committed_script(name):
    claim = importlib.import_module(name).CLAIM
    assert claim.name == name
    assert (FOLDER / "results" / f"{name}.png").stat().st_size > 10_000
    written = json.loads((FOLDER / "results" / f"{name}.json").read_text())
    for part in TEXTS:
        assert written[part] == getattr(claim, part), part
    assert written["settings"] == json.loads(json.dumps(claim.settings))
    assert written["seeds"] == list(claim.seeds)
    assert len(claim.seeds) > 1
    for expectation, outcome in zip(claim.expectations, written["expectations"], strict=True):
        assert (expectation.text, expectation.above, expectation.below) == (
            outcome["text"],
            outcome["above"],
            outcome["below"],
        )
        again = judge(outcome["values"], outcome["above"], outcome["below"])
        assert (again["mean"], again["interval"]) == (
            pytest.approx(outcome["mean"]),
            pytest.approx(outcome["interval"]),
        )
        assert again["outcome"] == outcome["outcome"]
        assert len(outcome["values"]) == len(claim.seeds)
    with (FOLDER / "results" / f"{name}.csv").open() as file:
        assert {int(row["seed"]) for row in csv.DictReader(file)} == set(claim.seeds)


# what is judged there is not all in rows: curves of training, where the guard stops
NOT_OF_ROWS = {"ipo_bandit", "rrhf_online_refresh"}


def of_csv(text: str):
    """What a figure was before it was written to a .csv."""
    try:
        return float(text) if "." in text or "e" in text else int(text)
    except ValueError:
        return text or None


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_OF_ROWS])
def test_committed_figures_are_those_of_the_committed_rows(name):
    claim = importlib.import_module(name).CLAIM
    with (FOLDER / "results" / f"{name}.csv").open() as file:
        rows = [{key: of_csv(text) for key, text in row.items()} for row in csv.DictReader(file)]
    written = json.loads((FOLDER / "results" / f"{name}.json").read_text())
    for expectation, outcome in zip(claim.expectations, written["expectations"], strict=True):
        found = [
            expectation.measure({"rows": [row for row in rows if row["seed"] == seed]}) for seed in written["seeds"]
        ]
        assert found == pytest.approx(outcome["values"], rel=1e-4, abs=1e-5), expectation.text


@pytest.mark.parametrize("methods", [{}, {"rrhf": {}}, {"dpo": {"beta": 0.3}}, {"mine": {"method": "slic_direct"}}])
def test_what_a_claim_does_not_set_is_the_playgrounds(methods, tmp_path):
    words = on_playground.arguments_of(1, methods, tmp_path)
    classes = recipe_dataclasses(on_playground.RECIPES / "compare.py")
    parsed = parse_comparison_args(classes, on_playground.PLAYGROUND, words)
    settings = yaml.safe_load(on_playground.PLAYGROUND.read_text())["settings"]
    assert parsed[1].settings == settings | {name: settings.get(name, {}) | of for name, of in methods.items()}


def test_rloos_values_are_kept_where_it_is_trained():
    assert {"rl", "reward_model"} <= set(on_playground.settings(mine={"method": "rl"})["playground"]["settings"])
    assert not {"rl", "reward_model"} & set(on_playground.settings(dpo={})["playground"]["settings"])


def test_no_outcome_is_left_of_a_script_that_is_gone():
    assert sorted({file.stem for file in (FOLDER / "results").iterdir()}) == NAMES


def test_chance_is_said_of_all_expectations():
    count = sum(len(importlib.import_module(name).CLAIM.expectations) for name in NAMES)
    page = " ".join((FOLDER / "README.md").read_text().split())
    assert f"Of the {count} expectations here chance alone would miss about {0.05 * count:.0f}," in page


def test_orpos_weight_on_the_page_is_that_of_its_runs():
    settings = dpo_displacement.CLAIM.settings["playground"]["settings"]
    assert f"λ = {settings['orpo']['beta']:g}" in (FOLDER / "README.md").read_text()
    assert f"lambda = {settings['orpo']['beta']:g}" in dpo_displacement.CLAIM.decided_by


def test_the_seed_that_values_were_chosen_with_is_in_no_table():
    assert "tried with seed 42" in " ".join(on_playground.PLAYGROUND.read_text().replace("#", "").split())
    assert not any(42 in importlib.import_module(name).CLAIM.seeds for name in NAMES)


def test_the_readme_is_what_summary_would_write():
    assert (FOLDER / "README.md").read_text() == summary.readme(FOLDER / "results")
