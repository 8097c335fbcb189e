"""The report of a comparison: statistics against slow versions of them, files, and the page in a real browser."""

import base64
import csv
import hashlib
import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize

from tests.support import browser
from trl_ext.comparison.figures import path_plot
from trl_ext.comparison.html import THEMES
from trl_ext.comparison.page import write_report
from trl_ext.comparison.results import ComparisonResults, MethodResult
from trl_ext.comparison.statistics import (
    RIDGE,
    Estimate,
    length_controlled_win_rate,
    mean_interval,
    perplexity_interval,
    perplexity_ratio_interval,
    win_rate,
)
from trl_ext.comparison.summary import MethodSummary, mean_curve, results_by_method, summarize, win_rate_matrix
from trl_ext.comparison.text import CSV_COLUMNS
from trl_ext.runs.evaluation import perplexity

# method -> label, invented: chance of a reward, of the judge's approval, tokens, KL, nats per token, chosen logp's way
INVENTED = {
    "sft": ("SFT", 0.42, 0.55, 14, 0.0, 0.9, None),
    "best_of_n": ("Best-of-n", 0.74, 0.66, 14, 1.6, 0.9, None),
    "slic_direct": ("SLiC-HF direct", 0.78, 0.68, 15, 4.0, 0.95, -2),
    "slic_sample_rank": ("SLiC-HF sample-rank", 0.80, 0.69, 15, 4.6, 0.95, -1),
    "rrhf": ("RRHF", 0.70, 0.63, 13, 3.0, 0.92, 1),
    "rrhf_two_rounds": ("RRHF, two rounds", 0.75, 0.64, 13, 4.4, 0.94, 1),
    "spin": ("SPIN", 0.52, 0.57, 16, 2.0, 0.9, 2),
    "click": ("CLICK", 0.66, 0.62, 14, 3.3, 0.93, 0),
    "dpo": ("DPO", 0.83, 0.60, 22, 9.0, 1.1, -14),
    "ipo": ("IPO", 0.72, 0.64, 17, 5.0, 1.0, -5),
    "orpo": ("ORPO", 0.61, 0.60, 14, 2.2, 0.9, 2),
    "kto": ("KTO", 0.69, 0.63, 16, 3.6, 0.96, -3),
    "rloo": ("RLOO with a reward model", 0.90, 0.41, 31, 24.0, 1.7, None),
}


def invented_comparison(prompts: int = 120, seeds: tuple[int, ...] = (0, 1), methods=INVENTED) -> ComparisonResults:
    """Made-up figures in the shape of real ones. Nothing in them was measured."""
    results = []
    for seed in seeds:
        difficulty = np.random.default_rng(seed).normal(size=prompts)
        for number, method in enumerate(methods):
            label, reward, judge, length, kl, nats, way = INVENTED[method]
            generator = np.random.default_rng([seed, number])
            level = generator.normal(0, 0.02) + 0.1 * difficulty
            lengths = generator.poisson(length, size=prompts) + 1
            shares = np.linspace(0, 1, 6)
            curve = [
                {
                    "share": float(share),
                    "updates": int(120 * share),
                    "reward": float(0.42 + (reward - 0.42) * share**0.5 + generator.normal(0, 0.01)),
                    "kl": float(kl * share),
                    "chosen_logps": None if way is None else -18 + way * float(share),
                    "rejected_logps": None if way is None else -19 + (2 * min(way, 0) - 6) * float(share),
                }
                for share in shares
            ]
            results.append(
                MethodResult(
                    method=method,
                    label=label,
                    seed=seed,
                    status="done",
                    scores={
                        "reward": (generator.random(prompts) < reward + level).astype(float).tolist(),
                        "judge": np.clip(generator.normal(judge + level, 0.2), 0, 1).tolist(),
                    },
                    lengths=lengths.tolist(),
                    kl=generator.normal(kl, 0.3 + kl / 4, size=prompts).tolist() if kl else [0.0] * prompts,
                    nll=(lengths * generator.normal(nats, 0.1, size=prompts)).tolist(),
                    examples=[
                        {
                            "prompt": f"In words: {value}",
                            "answer": f"{value} is invented, says {label}.",
                            "reward": 1.0,
                        }
                        for value in (17, 204)
                    ],
                    curve=[] if method in ("sft", "best_of_n") else curve,
                    updates=0 if method == "sft" else 120,
                    completions_sampled=0 if method in ("sft", "dpo", "spin") else 8 * 320,
                    seconds=20 + 9.0 * number,
                    sampling_seconds=0.0 if method == "sft" else 11.5,
                    tokens_per_second=None if method == "sft" else 5200 - 210.0 * number,
                    peak_memory_mib=410 + 35.0 * number,
                    models_resident="2" if method in ("dpo", "ipo", "kto", "rloo") else "1",
                    notes=["no training: of 8 answers per prompt the best is kept"] if method == "best_of_n" else [],
                )
            )
    return ComparisonResults(
        title="Invented figures for a test",
        base="sft",
        prompts=prompts,
        results=results,
        settings={"steps": 120, "learning_rate": 1e-4, "seeds": list(seeds)},
        notes=["All figures are made up by the test's generator."],
        command="python -m pytest tests/unit/comparison/test_comparison_report.py",
    )


# --- statistics ---


def slow_intervals(rows, same_prompts: bool, statistic, draws: int = 3000) -> tuple[float, float]:
    """A bootstrap by loops: seeds are drawn, prompts are drawn, and the values that were drawn are listed."""
    generator, found = np.random.default_rng(5), []
    for _ in range(draws):
        seeds = generator.integers(len(rows), size=len(rows))
        drawn = {
            key: generator.integers(len(rows[0]), size=len(rows[0]))
            for key in ([0] if same_prompts else range(len(rows)))
        }
        found.append(
            statistic([rows[seed][prompt] for seed in seeds for prompt in drawn[0 if same_prompts else seed]])
        )
    return tuple(np.quantile(found, [0.025, 0.975]))


@pytest.mark.parametrize("same_prompts", [True, False])
@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_intervals_are_those_of_a_slow_bootstrap(seeds, same_prompts):
    generator = np.random.default_rng(1)
    rows = generator.normal(size=(seeds, 1)) + generator.normal(0, 2, size=40) + generator.normal(size=(seeds, 40))
    found = mean_interval(rows, None if same_prompts else list(range(seeds)))
    low, high = slow_intervals(rows, same_prompts, np.mean, draws=2000)
    assert found.value == pytest.approx(rows.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.08 * (high - low))
    assert (found.num_seeds, found.num_values) == (seeds, 40 * seeds)


def test_the_interval_of_one_seed_is_that_of_the_normal_approximation():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    found = mean_interval([values])
    half = 1.96 * values.std() / 20
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


@pytest.mark.parametrize(
    ("seeds", "spread", "stated"), [(2, 0.0, 0.99), (2, 0.1, 0.92), (2, 0.3, 0.73), (5, 0.3, 0.87)]
)
def test_intervals_cover_as_often_as_is_said(seeds, spread, stated):
    generator, covered = np.random.default_rng(2), 0
    for _ in range(300):
        rows = spread * generator.normal(size=(seeds, 1)) + 0.5 * generator.normal(size=200)
        found = mean_interval(rows + generator.normal(size=(seeds, 200)))
        covered += found.low <= 0 <= found.high
    assert covered / 300 == pytest.approx(stated, abs=0.05)


def test_perplexity_is_of_tokens_and_not_of_answers():
    nll, lengths = [[math.log(2), 3 * math.log(8)], [0.0, math.nan]], [[1, 3], [6, 2]]
    found = perplexity_interval(nll, lengths)
    assert found.value == pytest.approx(perplexity([(-math.log(2), 1), (-3 * math.log(8), 3), (0.0, 6)]))
    assert found.low <= found.value <= found.high and found.num_values == 3
    doubled = [
        [value + math.log(2) * length for value, length in zip(*pair, strict=True)]
        for pair in zip(nll, lengths, strict=True)
    ]
    ratio = perplexity_ratio_interval(doubled, lengths, nll, lengths)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2, 2, 2))  # the same draws on both sides


def test_missing_values_are_left_out_and_nothing_is_nothing():
    assert mean_interval([[1.0, math.nan, 3.0]]).value == 2.0
    assert mean_interval([[1.0, math.nan, 3.0]]).num_values == 2
    for empty in ([], [[]], [[math.nan, math.nan]], [[], []]):
        assert math.isnan(mean_interval(empty).value) and math.isnan(win_rate(empty, empty).value)
        assert math.isnan(length_controlled_win_rate(empty, empty, empty, empty).value)
    one = mean_interval([[5.0]])
    assert one.value == 5.0 and math.isnan(one.low) and not one.lies_off(0)


def test_values_that_make_no_pairs_are_refused():
    with pytest.raises(ValueError, match="make no pairs"):
        win_rate([[1.0, 2.0]], [[1.0]])
    with pytest.raises(ValueError, match="of other answers"):
        length_controlled_win_rate([[1.0, 2.0]], [[1.0, 3.0]], [[1]], [[1]])
    with pytest.raises(ValueError, match="for the same prompts 'p'"):
        mean_interval([[1.0, 2.0], [1.0]], ["p", "p"])


@st.composite
def two_sides(draw):
    size, seeds = draw(st.integers(1, 25)), draw(st.integers(1, 3))

    def some(values):
        return [draw(st.lists(values, min_size=size, max_size=size)) for _ in range(seeds)]

    score = st.sampled_from([0.0, 0.5, 1.0, math.nan])
    return some(score), some(score), some(st.integers(0, 40)), some(st.integers(0, 40))


@settings(max_examples=60, deadline=None)
@given(two_sides())
def test_win_rates_are_counts_and_symmetric(sides):
    a, b, lengths_a, lengths_b = sides
    outcomes = [
        1.0 if one > other else 0.0 if one < other else 0.5
        for row_a, row_b in zip(a, b, strict=True)
        for one, other in zip(row_a, row_b, strict=True)
        if not math.isnan(one + other)
    ]
    there, back = win_rate(a, b), win_rate(b, a)
    assert there.value == pytest.approx(sum(outcomes) / len(outcomes) if outcomes else math.nan, nan_ok=True)
    assert (back.value, back.low, back.high) == pytest.approx(
        (1 - there.value, 1 - there.high, 1 - there.low), nan_ok=True
    )
    there = length_controlled_win_rate(a, b, lengths_a, lengths_b)
    back = length_controlled_win_rate(b, a, lengths_b, lengths_a)
    assert (back.value, back.low, back.high) == pytest.approx(
        (1 - there.value, 1 - there.high, 1 - there.low), nan_ok=True, abs=1e-6
    )
    assert math.isnan(there.value) or 0 < there.value < 1


def slow_length_control(outcomes, differences) -> float:
    """Penalised maximum likelihood by a general optimiser, term by term."""
    spread = np.std(differences)

    def loss(parameters):
        theta, phi = parameters
        total = RIDGE / 2 * (theta**2 + phi**2)
        for won, difference in zip(outcomes, differences, strict=True):
            logit = theta + phi * math.tanh(difference / spread)
            total += np.logaddexp(0, logit) - won * logit
        return total

    found = minimize(loss, [0.3, -0.3], method="BFGS", options={"gtol": 1e-8})
    return 1 / (1 + math.exp(-found.x[0]))


@pytest.mark.parametrize("kind", ["mixed", "ties", "separable", "by length alone"])
def test_length_control_is_the_regression(kind):
    generator = np.random.default_rng(3)
    lengths_a, lengths_b = generator.integers(5, 60, size=50), generator.integers(5, 30, size=50)
    longer = lengths_a - lengths_b
    won = {
        "mixed": (generator.random(50) < 0.6).astype(float),
        "ties": generator.choice([0.0, 0.5, 1.0], size=50),
        "separable": np.ones(50),
        "by length alone": (longer > 0).astype(float),
    }[kind]
    found = length_controlled_win_rate([won], [np.full(50, 0.5)], [lengths_a], [lengths_b])
    assert found.value == pytest.approx(slow_length_control(won, longer), abs=1e-5)
    assert 0 < found.low <= found.value <= found.high < 1


def test_a_method_that_wins_by_length_alone_loses_its_lead():
    generator = np.random.default_rng(4)
    lengths_a, lengths_b = generator.poisson(24, size=800), generator.poisson(20, size=800)
    chance = 1 / (1 + np.exp(-2 * np.tanh((lengths_a - lengths_b) / np.std(lengths_a - lengths_b))))
    won, half = (generator.random(800) < chance).astype(float), np.full(800, 0.5)
    raw, controlled = win_rate([won], [half]), length_controlled_win_rate([won], [half], [lengths_a], [lengths_b])
    assert raw.low > 0.6
    assert controlled.low < 0.5 < controlled.high and controlled.high - controlled.low < 0.15


def test_length_control_at_equal_and_at_constant_difference():
    won, lost, lengths = [[1.0] * 100], [[0.0] * 100], [[7] * 100]
    found = length_controlled_win_rate(won, lost, lengths, lengths)
    theta = brentq(lambda theta: 100 * (1 - 1 / (1 + math.exp(-theta))) - RIDGE * theta, 0, 20)
    assert found.value == pytest.approx(1 / (1 + math.exp(-theta))) and found.value > 0.99
    assert math.isnan(length_controlled_win_rate(won, lost, [[9] * 100], lengths).value)


def test_the_matrix_is_all_pairs_and_adds_up():
    comparison = invented_comparison(prompts=30, methods=["sft", "dpo", "spin"])
    comparison.results[4].status = "failed"  # dpo, seed 1
    rates = win_rate_matrix(comparison)
    by_method = results_by_method(comparison)
    assert len(rates) == 6
    for (one, other), rate in rates.items():
        assert rate.value + rates[other, one].value == pytest.approx(1)
        assert rate.low + rates[other, one].high == pytest.approx(1)
        seeds = 1 if "dpo" in (one, other) else 2
        a, b = ([result.scores["reward"] for result in by_method[key][:seeds]] for key in (one, other))
        assert rate.value == pytest.approx(win_rate(a, b).value) and rate.num_seeds == seeds


def test_only_the_same_seed_is_compared():
    comparison = invented_comparison(prompts=30, seeds=(0, 1, 2), methods=["sft", "dpo"])
    results = results_by_method(comparison)
    summary = summarize(results["dpo"][1:], results["sft"][:2])
    one, other = results["dpo"][1].scores["reward"], results["sft"][1].scores["reward"]
    assert summary.differences["reward"].value == pytest.approx(np.mean(one) - np.mean(other))
    assert summary.differences["reward"].num_seeds == 1 and summary.scores["reward"].num_seeds == 2


def test_curves_of_several_seeds_are_interpolated():
    def result(seed, points):
        curve = [
            {"share": share, "updates": 0, "reward": reward, "kl": None, "chosen_logps": None, "rejected_logps": None}
            for share, reward in points
        ]
        return MethodResult("a", "A", seed, "done", curve=curve)

    results = [result(0, [(0.0, 1.0), (0.5, 2.0), (1.0, 4.0)]), result(1, [(0.25, 3.0), (0.8, None), (0.75, 5.0)])]
    assert mean_curve(results, "reward") == [(0.25, 2.25), (0.5, 3.0), (0.75, 4.0)]  # where both were looked at
    assert mean_curve(results, "kl") == []


# --- files ---


def small_comparison(**changes) -> ComparisonResults:
    comparison = invented_comparison(prompts=20, methods=["sft", "dpo", "slic_direct"])
    for name, value in changes.items():
        setattr(comparison, name, value)
    return comparison


def test_results_come_back_as_they_were_saved(tmp_path):
    comparison = small_comparison()
    comparison.results[1].scores["judge"][3] = math.nan
    comparison.results[1].seconds = math.nan
    comparison.results[2] = MethodResult("ipo", "IPO", 0, "failed", "it broke")
    comparison.results[3].lengths = [np.int64(value) for value in comparison.results[3].lengths]
    comparison.save(tmp_path / "results.json")
    assert "NaN" not in (tmp_path / "results.json").read_text()
    loaded = ComparisonResults.load(tmp_path / "results.json")
    assert math.isnan(loaded.results[1].scores["judge"][3]) and math.isnan(loaded.results[1].seconds)
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "results.json").read_text()
    assert loaded.results[0] == comparison.results[0] and loaded.settings == comparison.settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved.update(version=3), "has version 3"),
        (lambda saved: saved.pop("version"), "has version None"),
        (lambda saved: saved.update(results={}), "no list of results"),
        (lambda saved: saved.update(results=[]), "has no results"),
        (lambda saved: saved.update(extra=1), "extra, which is not known"),
        (lambda saved: saved.pop("base"), "lacks base"),
        (lambda saved: saved.update(base="ppo"), "'ppo' is not among"),
        (lambda saved: saved.update(prompts="20"), "prompts='20'"),
        (lambda saved: saved["results"][1].pop("kl"), "Result 1 lacks kl"),
        (lambda saved: saved["results"][1].update(seed=True), "seed=True"),
        (lambda saved: saved["results"][1].update(status="running"), "status 'running'"),
        (lambda saved: saved["results"][1].update(method="sft", label="SFT"), "is there twice"),
        (lambda saved: saved["results"][1].update(label="other"), "one label"),
        (lambda saved: [row.update(label="SFT") for row in saved["results"]], "Several methods are called"),
        (lambda saved: saved["results"][1]["lengths"].pop(), "19 values in lengths"),
        (lambda saved: saved["results"][1]["scores"].update(reward="high"), "'high' in scores"),
        (lambda saved: saved["results"][1]["curve"][0].pop("kl"), "on its curve"),
        (lambda saved: saved["results"][1]["examples"][0].pop("reward"), "has an example with prompt, answer"),
        (lambda saved: saved["results"][1].update(prompts_key="other"), "make no pairs"),
    ],
)
def test_what_makes_no_report_is_refused_by_name(tmp_path, change, message):
    file = tmp_path / "results.json"
    small_comparison().save(file)
    saved = json.loads(file.read_text())
    change(saved)
    file.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        ComparisonResults.load(file)
    assert str(file) in str(raised.value)


def test_what_is_no_json_is_refused(tmp_path):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        ComparisonResults.load(tmp_path / "results.json")
    comparison = small_comparison()
    comparison.results[0].scores["reward"][0] = None
    with pytest.raises(ValueError, match="Give NaN for a value"):
        write_report(comparison, tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.fixture(scope="module")
def small_report(tmp_path_factory):
    comparison, folder = small_comparison(), tmp_path_factory.mktemp("small")
    comparison.results[-1] = MethodResult("slic_direct", "SLiC-HF direct", 1, "failed", "CUDA out of memory")
    write_report(comparison, folder)
    return comparison, folder


def test_the_csv_is_tidy_and_right(small_report):
    comparison, folder = small_report
    with (folder / "comparison.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert list(rows[0]) == list(CSV_COLUMNS)
    keys = ["method", "seed", "figure", "scorer", "over"]
    found = {tuple(row[key] for key in keys): row for row in rows}
    assert len(found) == len(rows)
    assert {row["figure"] for row in rows} - {""} <= set(re.findall(r"\w+", CSV_COLUMNS["figure"]))
    rewards = {(one.method, one.seed): one.scores.get("reward") for one in comparison.results}
    dpo = found["dpo", "1", "score", "reward", ""]
    assert float(dpo["value"]) == pytest.approx(np.mean(rewards["dpo", 1])) and dpo["seeds"] == "1"
    both = found["dpo", "all", "difference", "reward", "sft"]
    change = np.mean([rewards["dpo", 0], rewards["dpo", 1]]) - np.mean([rewards["sft", 0], rewards["sft", 1]])
    assert float(both["value"]) == pytest.approx(change, rel=1e-5) and both["values"] == "40"
    failed = found["slic_direct", "1", "", "", ""]
    assert (failed["status"], failed["error"], failed["value"]) == ("failed", "CUDA out of memory", "")
    assert found["slic_direct", "all", "score", "reward", ""]["seeds"] == "1"
    over_dpo = found["slic_direct", "all", "win_rate", "reward", "dpo"]
    assert float(over_dpo["value"]) == pytest.approx(win_rate([rewards["slic_direct", 0]], [rewards["dpo", 0]]).value)
    assert found["sft", "all", "tokens_per_second", "", ""]["value"] == ""


def test_the_table_to_paste_is_one_table(small_report):
    comparison, folder = small_report
    text = (folder / "comparison.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert "1, 1 failed" in table[-2] + table[-1] + table[-3] and "CUDA out of memory" in text
    assert comparison.command in text and comparison.notes[0] in text


def conclusions(comparison: ComparisonResults, folder: Path) -> str:
    write_report(comparison, folder)
    text = (folder / "comparison.md").read_text()
    return text[: text.index("| method")]


def test_conclusions_follow_from_the_figures(tmp_path):
    """Constant figures, so that what follows is plain: a gains, b gains and pays for it, c loses, d is as before."""
    prompts = 40

    def result(method, seed, gain, judge, nats):
        noise = np.random.default_rng(seed).normal(size=prompts)
        return MethodResult(
            method,
            method.upper(),
            seed,
            "done",
            scores={"reward": (noise + gain).tolist(), "judge": (noise + judge).tolist()},
            lengths=[10] * prompts,
            nll=[10 * nats] * prompts,
        )

    cases = {"sft": (0, 0, 1), "a": (1, 0.5, 1), "b": (2, -1, 2), "c": (-1, 0, 1), "d": (0, 0, 1)}
    results = [result(method, seed, *case) for method, case in cases.items() for seed in (0, 1)]
    said = conclusions(ComparisonResults("t", "sft", prompts, results), tmp_path)
    assert "More reward than SFT, by more than the 95 % interval: B (+2.00) and A (+1.00)." in said
    assert "Less reward than SFT, by more than the 95 % interval: C (−1.00)." in said
    assert "Not to be told apart from SFT by reward: D." in said
    assert "read the answers. A higher perplexity: B. A lower judge: B.\n" in said
    assert "prompts and 2 training runs, which is few" in said

    results = [one for one in results if one.method in ("sft", "a") and one.seed == 0]
    said = conclusions(ComparisonResults("t", "sft", prompts, results), tmp_path)
    assert "None of those with more reward is worse by judge or perplexity." in said
    assert "one training run of each" in said


HOSTILE = (
    "<script>document.title = 'owned'</script><img src=https://example.org/a.png onerror=alert(1)> "
    "\"'&\x00\ud800 $x_1$"
)


def hostile_comparison(**size) -> ComparisonResults:
    """Markup wherever a model, a data set or a user can put text."""
    comparison = invented_comparison(**size)
    comparison.title = comparison.command = HOSTILE
    comparison.notes.append(HOSTILE)
    comparison.settings[HOSTILE] = HOSTILE
    for number, result in enumerate(comparison.results[:3]):
        result.notes.append(HOSTILE)
        result.examples.append({"prompt": [{"role": "user", "content": HOSTILE}], "answer": HOSTILE, "reward": None})
        if number:
            result.models_resident = HOSTILE
    label = comparison.results[1].label + HOSTILE
    for result in comparison.results:
        if result.method == comparison.results[1].method:
            result.label = label
        result.scores[HOSTILE] = result.scores.pop("judge")
    failed = MethodResult("grpo", "A method that has failed, with a long name", 0, "failed", f"Traceback:\n{HOSTILE}")
    comparison.results.append(failed)
    return comparison


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_markup_in_what_models_say_stays_text(tmp_path):
    write_report(hostile_comparison(prompts=20, methods=["sft", "dpo"]), tmp_path)
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    names = [name for name, _ in tags.found]
    assert names.count("script") == 1 and "img" not in names and page.count("&lt;script&gt;") > 10
    assert not any(key.startswith("on") for _, attributes in tags.found for key in attributes)
    ids = [attributes["id"] for _, attributes in tags.found if "id" in attributes]
    assert len(ids) == len(set(ids)) > 20
    script = re.search(r"<script>(.*)</script>", page, flags=re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "<script>" not in re.sub(r"\\[<>]", "", (tmp_path / "comparison.md").read_text().split("\n    ")[0])


def test_the_same_results_make_the_same_files(small_report, tmp_path):
    comparison, folder = small_report
    comparison.save(tmp_path / "results.json")
    write_report(ComparisonResults.load(tmp_path / "results.json"), tmp_path)
    for name in ("comparison.csv", "comparison.md", "comparison.html"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def without_figures(comparison):
    for one in comparison.results:
        one.scores, one.lengths, one.kl, one.nll, one.examples, one.curve = {}, [], [], [], [], []


def with_odd_values(comparison):
    for one in comparison.results[1:]:
        one.scores["reward"] = [math.nan] * 10 + [math.inf] * 5 + [1e30] * 5
        one.kl, one.nll = [-1.0] * 20, [1e6] * 20
        one.lengths = [0] * 20
        one.curve[1:] = (
            [dict.fromkeys(one.curve[0]) | {"share": 0.5, "updates": 3, "reward": math.nan}] if one.curve else []
        )
        one.examples = [{"prompt": {"a": 1}, "answer": "", "reward": math.nan}]
        one.seconds, one.peak_memory_mib, one.models_resident = math.nan, math.inf, ""


def with_failures(which):
    def change(comparison):
        comparison.results = [
            MethodResult(one.method, one.label, one.seed, "failed", None) if which(one) else one
            for one in comparison.results
        ]

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_figures, "Not measured for any method: KL, perplexity and length."),
        (with_odd_values, "DPO: values that are missing and left out: 30 of reward."),
        (with_failures(lambda one: one.method == "sft"), "Nothing can be compared with SFT"),
        (with_failures(lambda one: True), "Failed: SFT (seeds 0 and 1)"),
        (lambda comparison: comparison.results.__delitem__(slice(1, None)), "0 methods and SFT"),
    ],
    ids=["nothing measured", "odd values", "base failed", "all failed", "base alone"],
)
@pytest.mark.filterwarnings("error")
def test_what_is_missing_is_a_dash(tmp_path, change, said):
    comparison = small_comparison()
    change(comparison)
    write_report(comparison, tmp_path)
    page = html.unescape((tmp_path / "comparison.html").read_text(encoding="utf-8"))
    assert said in page and ">–<" in page
    for word in (r">\W*nan\b", r">\W*None\b", r">\W*inf\b"):
        assert not re.search(word, page, flags=re.I)
    assert "| – |" in (tmp_path / "comparison.md").read_text()


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", THEMES)
def test_lines_and_marks_stand_out(theme):
    """3 to 1 for what is no text, by WCAG 2.1, 1.4.11."""
    colours = THEMES[theme]
    page = luminance(colours["page"])
    drawn = [*colours["series"].split(), colours["up"], colours["down"], colours["muted"]]
    assert len(drawn) == 10
    for colour in drawn:
        light, dark = sorted((luminance(colour), page), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3


# --- the page, looked at ---

in_browser = pytest.mark.skipif(browser.FOUND is None, reason=browser.WHY_NOT)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser.Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def full_page(tmp_path_factory):
    comparison, folder = hostile_comparison(prompts=40), tmp_path_factory.mktemp("full")
    write_report(comparison, folder)
    return comparison, folder / "comparison.html"


SIZES = """
(() => [...document.querySelectorAll("figure")].map(figure => {
  const svg = figure.querySelector("svg").getBoundingClientRect(), box = figure.firstChild.getBoundingClientRect();
  const outside = [...figure.querySelectorAll("text")].filter(text => {
    const own = text.getBoundingClientRect();
    return Math.min(own.left - svg.left, svg.right - own.right, own.top - svg.top, svg.bottom - own.bottom) < -2;
  });
  return {
    width: svg.width, height: svg.height, left: box.left, right: box.right,
    outside: outside.map(one => one.textContent),
    label: figure.querySelector("svg").getAttribute("aria-label"),
    caption: figure.querySelector("figcaption").textContent,
    texts: [...figure.querySelectorAll("text")].map(one => one.textContent),
  };
}))()
"""


def two_methods(tmp_path, *, length=10, nll=9.0, reward=0.5, curve=()) -> tuple[str, dict[str, str]]:
    """Page of a method beside SFT, whose figures are 10 tokens, 9 nats and 0.5, and its captions by section."""
    noise = np.random.default_rng(0).normal(0, 0.01, size=50)

    def result(method, length, nll, reward, curve):
        scores = {"reward": (reward + noise).tolist()}
        return MethodResult(method, method.upper(), 1, "done", scores=scores, lengths=[length] * 50,
                            nll=[nll] * 50, kl=[0.0] * 50, curve=list(curve))  # fmt: skip

    results = [result("sft", 10, 9.0, 0.5, ()), result("new", length, nll, reward, curve)]
    write_report(ComparisonResults("two", "sft", 50, results), tmp_path)
    page = (tmp_path / "comparison.html").read_text()
    captions = re.findall(r'<section id="([^"]+)">(?:(?!</section>).)*?<figcaption>(.*?)</figcaption>', page, re.S)
    return page, dict(captions)


def test_more_of_what_is_worse_is_no_praise(tmp_path):
    page, captions = two_methods(tmp_path, nll=18.0, length=12, reward=0.9)
    marks = re.findall(r'<span class="(\w+)" role="img" aria-label="([^"]+)">(.)</span>', page)
    assert ("down", "above the base, worse", "▲") in marks  # perplexity
    assert ("neither", "above the base", "▲") in marks  # tokens
    assert ("up", "above the base, better", "▲") in marks  # reward
    assert "(orange: worse)" in captions["perplexity"] and "blue" not in captions["perplexity"]
    page, captions = two_methods(tmp_path, nll=4.0)
    assert ("up", "below the base, better", "▼") in re.findall(
        r'<span class="(\w+)" role="img" aria-label="([^"]+)">(.)</span>', page
    )
    assert "▼: below SFT" in captions["perplexity"] and "(blue: better)" in captions["perplexity"]


def test_captions_speak_of_what_is_drawn(tmp_path):
    page, captions = two_methods(tmp_path)
    for section, caption in captions.items():
        for absent in ("▲", "▼", "blue", "orange", "Bold", "Lines", "dotted"):
            assert absent not in caption, (section, absent)
    assert "○: not to be told apart from SFT. ◆: SFT." in captions["scores-0"]
    assert "only watched" not in captions["scores-0"]  # there is no other scorer
    point = {"updates": 1, "chosen_logps": None, "rejected_logps": None}
    curve = [{**point, "share": share, "reward": 0.5, "kl": share} for share in (0.5, 1.0)]
    page, captions = two_methods(tmp_path, reward=0.9, curve=curve)
    assert "Lines: what was measured along training" in captions["paths"]
    assert "Bold and coloured" in captions["wins-0"] and "▲: above SFT" in captions["scores-0"]
    assert "▼" not in captions["scores-0"] and "orange" not in captions["scores-0"]


@in_browser
@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_reads_well(chromium, full_page, width, dark):
    comparison, file = full_page
    page = chromium.open(file, width=width, dark=dark)
    assert page.problems == []
    assert page.addresses == [file.resolve().as_uri()]
    assert page.evaluate("document.title").startswith("<script>")
    assert page.evaluate("document.documentElement.scrollWidth") <= width

    figures = page.evaluate(SIZES)
    assert len(figures) == 7
    for figure in figures:
        assert figure["width"] > 300 and figure["height"] > 150 and figure["outside"] == []
        assert 0 <= figure["left"] < figure["right"] <= width
        assert len(figure["label"]) > 20 and len(figure["caption"]) > 40
    shown = [*INVENTED.values()]
    for label in (label for label, *_ in shown if label != INVENTED["best_of_n"][0]):
        for figure in figures[:6]:
            assert any(text.startswith(label) for text in figure["texts"])
        assert page.evaluate(f"document.querySelector('#results').innerText.includes({json.dumps(label)})")
    assert page.evaluate("document.querySelector('#failed').innerText").count("A method that has failed") == 1

    contrasts = page.evaluate(browser.CONTRASTS)
    assert len(contrasts) > 1000
    assert [one for one in contrasts if one[1] < 4.5] == []
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(",")
    assert (sum(map(int, brightness)) < 200) is dark


@in_browser
@pytest.mark.parametrize(("width", "least"), [(400, 9), (1200, 0)])
def test_what_is_wider_than_the_page_says_that_it_scrolls(chromium, full_page, width, least):
    page = chromium.open(full_page[1], width=width)
    boxes = page.evaluate(
        """[...document.querySelectorAll(".scroll")].map(box => [
             box.scrollWidth > box.clientWidth + 1,
             getComputedStyle(box, "::before").content.includes("scroll sideways")
           ])"""
    )
    assert sum(wide for wide, _ in boxes) >= least
    assert all(wide == said for wide, said in boxes)


@in_browser
def test_labels_of_ends_that_are_close_do_not_hide_each_other(chromium, tmp_path):
    def exactly(value):
        return Estimate(value, value, value, num_seeds=1, num_values=9)

    ends = [
        MethodSummary(
            method,
            label,
            (0,),
            {},
            scores={"reward": exactly(0.7 + 0.01 * number if number else 0.1)},
            kl=exactly(4 + 0.1 * (number % 3) if number else 0.0),
        )
        for number, (method, (label, *_)) in enumerate(INVENTED.items())
    ]
    svg = path_plot("paths", "ends", ends, {end.method: [] for end in ends}, "sft")
    (tmp_path / "paths.html").write_text(f"<!DOCTYPE html><meta charset=utf-8>{svg}", encoding="utf-8")
    page = chromium.open(tmp_path / "paths.html", width=1200)
    boxes = page.evaluate(
        """[...document.querySelectorAll("text")].map(one => {
             const box = one.getBoundingClientRect();
             return [one.textContent, box.left, box.right, box.top + 3, box.bottom - 3];
           })"""
    )
    assert {label for label, *_ in boxes} >= {label[0] for label in INVENTED.values() if label[0] != "SFT"}
    for number, (one, left, right, top, bottom) in enumerate(boxes):
        for other, other_left, other_right, other_top, other_bottom in boxes[number + 1 :]:
            apart = left >= other_right or other_left >= right or top >= other_bottom or other_top >= bottom
            assert apart, (one, other)


@in_browser
def test_headings_sort_and_the_button_changes_the_theme(chromium, full_page):
    page = chromium.open(full_page[1], width=1200)

    def column(number):
        return page.evaluate(
            f"[...document.querySelectorAll('#results tbody tr')].map(row => row.cells[{number}].dataset.value)"
        )

    rewards = [float(value) for value in column(2) if value]
    assert rewards == sorted(rewards, reverse=True) and len(rewards) == 13
    for order in (True, False):
        page.evaluate("document.querySelectorAll('#results thead button')[7].click()")
        found = column(7)
        kl = [float(value) for value in found if value]
        assert kl == sorted(kl, reverse=order) and found[-1] == ""  # what has failed comes last
    background = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(background)
    page.evaluate("document.querySelector('.theme').click()")
    assert page.evaluate(background) != before
    assert page.evaluate("document.querySelector('.theme').textContent") == "Light theme"
    assert page.problems == []


@in_browser
def test_the_page_reads_without_scripts(chromium, full_page):
    page = chromium.open(full_page[1], width=1200, script=False)
    page.browser.call("Emulation.setScriptExecutionDisabled", page.session, value=False)
    assert page.evaluate("document.querySelectorAll('button').length") == 0
    assert page.evaluate("document.querySelectorAll('#results tbody tr').length") == 14
    assert len(page.evaluate(SIZES)) == 7


@in_browser
def test_what_is_wrong_with_a_page_is_noticed(chromium, tmp_path):
    """The checks above can fail."""
    (tmp_path / "bad.html").write_text(
        "<body style='background:#fff'><p style='color:#999'>pale</p><p "
        "style='color:#000;background:#222'>dark</p><svg width=60 height=30><rect width=60 height=30 fill='#333' "
        "opacity=.9 /><text y=20 fill='#000'>cell</text></svg><p style='width:3000px;color:#111'>wide</p><img "
        "src='https://example.org/a.png'><script>console.error('x');y()</script>"
    )
    page = chromium.open(tmp_path / "bad.html", width=400)
    assert "https://example.org/a.png" in page.addresses
    assert len(page.problems) == 3  # the picture, the console, the script
    assert page.evaluate("document.documentElement.scrollWidth") > 400
    contrasts = dict(page.evaluate(browser.CONTRASTS))
    assert contrasts.pop("wide") > 15
    assert contrasts.pop("pale") == pytest.approx(2.85, abs=0.01)
    assert set(contrasts) == {"dark", "cell"} and max(contrasts.values()) < 3
