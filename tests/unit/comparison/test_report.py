"""The files of a comparison: results, tables, conclusions, and markup that stays text."""

import base64
import csv
import hashlib
import html
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.support.comparisons import hostile_comparison, invented_comparison
from tests.support.data import REPOSITORY
from trl_ext.comparison import measures
from trl_ext.comparison.measures import MEASURES, FinishedRun, Measure, Picture, measured
from trl_ext.comparison.page import Page, write_report
from trl_ext.comparison.results import ComparisonResults, MethodResult
from trl_ext.comparison.statistics import (
    win_rate,
)
from trl_ext.comparison.tables import csv_columns
from trl_ext.comparison.text import format_number
from trl_ext.runs.evaluation import distinct_n


def small_comparison(**changes) -> ComparisonResults:
    comparison = invented_comparison(prompts=20, methods=["sft", "dpo", "slic_direct"])
    for name, value in changes.items():
        setattr(comparison, name, value)
    return comparison


def test_results_come_back_as_they_were_saved(tmp_path):
    comparison = small_comparison()
    comparison.results[1].scores["judge"][3] = math.nan
    comparison.results[1].measured["kl"][2] = math.nan
    comparison.results[2] = MethodResult("ipo", "IPO", 0, "failed", "it broke")
    lengths = comparison.results[3].measured["lengths"]
    comparison.results[3].measured["lengths"] = [np.int64(value) for value in lengths]
    comparison.save(tmp_path / "results.json")
    assert not any(word in (tmp_path / "results.json").read_text() for word in ("NaN", "measured"))
    loaded = ComparisonResults.load(tmp_path / "results.json")
    assert math.isnan(loaded.results[1].scores["judge"][3]) and math.isnan(loaded.results[1].measured["kl"][2])
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "results.json").read_text()
    assert loaded.results[0] == comparison.results[0] and loaded.settings == comparison.settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved.update(version=3), "must have version 2, got 3"),
        (lambda saved: saved.pop("version"), "must have version 2, got None"),
        (lambda saved: saved.update(results={}), "must have a list of `results`"),
        (lambda saved: saved.update(results=[]), "at least one result"),
        (lambda saved: saved.update(extra=1), "extra, which is not known"),
        (lambda saved: saved.pop("base"), "lacks base"),
        (lambda saved: saved.update(base="ppo"), "got 'ppo'"),
        (lambda saved: saved.update(prompts="20"), "`prompts` must be int, got '20'"),
        (lambda saved: saved["results"][1].pop("curve"), "Result 1 lacks curve"),
        (lambda saved: saved["results"][1].update(updates=[120]), "`updates` must be a number, got [120]"),
        (lambda saved: saved["results"][1].update(kl=0.5), "`kl` must be a list of numbers, got 0.5"),
        (lambda saved: saved["results"][1].update(klx=[0.5]), "klx, which is not known"),
        (lambda saved: saved["results"][1].update(seed=True), "`seed` must be int, got True"),
        (
            lambda saved: saved["results"][1].update(status="running"),
            "must be one of done, failed, got 'running'",
        ),
        (lambda saved: saved["results"][1].update(method="sft", label="SFT"), "must have one result, got two"),
        (lambda saved: saved["results"][1].update(label="other"), "must have the label 'other' as with other seeds"),
        (lambda saved: [row.update(label="SFT") for row in saved["results"]], "Methods must have different labels"),
        (
            lambda saved: saved["results"][1]["lengths"].pop(),
            "must have 20 values, one for each prompt, got 19",
        ),
        (lambda saved: saved["results"][1]["scores"].update(reward="high"), "must be a list of numbers, got 'high'"),
        (lambda saved: saved["results"][1]["curve"][0].pop("kl"), "an entry of `curve` that must be"),
        (lambda saved: saved["results"][1]["examples"][0].pop("reward"), "an entry of `examples` that must be"),
        (lambda saved: saved["results"][1].update(prompts_key="other"), "got 'other'"),
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
    with pytest.raises(ValueError, match="must be JSON"):
        ComparisonResults.load(tmp_path / "results.json")
    comparison = small_comparison()
    comparison.results[0].scores["reward"][0] = None
    with pytest.raises(ValueError, match="Use NaN for a missing value"):
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
    assert list(rows[0]) == list(csv_columns())
    keys = ["method", "seed", "figure", "scorer", "over"]
    found = {tuple(row[key] for key in keys): row for row in rows}
    assert len(found) == len(rows)
    assert {row["figure"] for row in rows} - {""} <= set(re.findall(r"\w+", csv_columns()["figure"]))
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


def finished(text: str) -> FinishedRun:
    answers = [{"answer": text, "kl": 1.0, "fixed_logp": -4.0, "num_tokens": 5} for _ in range(20)]
    return FinishedRun(answers, {"distinct_2": 0.5}, [], 0, math.nan, 0.0, "1")


GUIDE = (REPOSITORY / "docs" / "extending.md").read_text()
GUIDE = re.search(r"## A figure of the comparison\n.*?```python\n(.*?)```", GUIDE, re.S)[1]
NEW_MEASURES = {
    "a value for each prompt": eval(GUIDE, vars(measures)),
    "a value for each run": Measure(
        "different_words",
        lambda run: distinct_n([one["answer"] for one in run.answers], 1),
        "share of different words",
        column="different words",
        cost_column="different words",
        markdown_column="words",
        picture=Picture("further", "different words"),
    ),
}


@pytest.fixture(params=NEW_MEASURES)
def measure(request):
    MEASURES.append(NEW_MEASURES[request.param])
    yield MEASURES[-1]
    MEASURES.pop()


def test_a_new_measure_is_one_entry(tmp_path, measure):
    comparison = small_comparison()
    comparison.save(tmp_path / "older.json")
    older = ComparisonResults.load(tmp_path / "older.json")  # written before there was such a measure
    write_report(older, tmp_path / "older")
    assert f"Not measured for any method: {measure.name}." in (tmp_path / "older" / "comparison.md").read_text()

    for result in comparison.results:
        result.measured = measured(finished("wow!" if result.method == "sft" else "oh wow?"))
    comparison.save(tmp_path / "results.json")
    write_report(ComparisonResults.load(tmp_path / "results.json"), tmp_path)
    with (tmp_path / "comparison.csv").open(newline="") as opened:
        rows = {(row["method"], row["figure"]): row for row in csv.DictReader(opened) if row["seed"] == "all"}
    markdown, page = ((tmp_path / f"comparison.{kind}").read_text() for kind in ("md", "html"))
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert f" {measure.column} " in table[0] and "Not measured" not in markdown
    assert f'<th scope="col">{measure.column}</th>' in page
    assert 'id="further"' in page and measure.picture.title in page and measure.key in csv_columns()["figure"]
    if measure.statistic is None:
        assert (rows["dpo", measure.key]["value"], rows["dpo", measure.key]["low"]) == ("0.05", "")
        assert ("dpo", "different_words_difference") not in rows
        assert f'<td data-value="0.05">{format_number(0.05)}<span class="bar"' in page
    else:
        assert [rows["dpo", measure.key][end] for end in ("value", "low", "high")] == ["1"] * 3
        assert rows["dpo", "questions_difference"]["value"] == "1"


def conclusions(comparison: ComparisonResults) -> str:
    return Page(comparison).markdown().partition("| method")[0]


def test_conclusions_follow_from_the_figures():
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
            measured={"lengths": [10] * prompts, "nll": [10 * nats] * prompts},
        )

    cases = {"sft": (0, 0, 1), "a": (1, 0.5, 1), "b": (2, -1, 2), "c": (-1, 0, 1), "d": (0, 0, 1)}
    results = [result(method, seed, *case) for method, case in cases.items() for seed in (0, 1)]
    said = conclusions(ComparisonResults("t", "sft", prompts, results))
    assert "More reward than SFT, by more than the 95 % interval: B (+2.00) and A (+1.00)." in said
    assert "Less reward than SFT, by more than the 95 % interval: C (−1.00)." in said
    assert "Not to be told apart from SFT by reward: D." in said
    assert "read the answers. A higher perplexity: B. A lower judge: B.\n" in said
    assert "prompts and 2 training runs, which is few" in said

    results = [one for one in results if one.method in ("sft", "a") and one.seed == 0]
    said = conclusions(ComparisonResults("t", "sft", prompts, results))
    assert "None of those with more reward is worse by judge or perplexity." in said
    assert "one training run of each" in said


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
        one.scores, one.examples, one.curve = {}, [], []
        one.measured |= {"lengths": [], "kl": [], "nll": [], "distinct_2": None}


def with_odd_values(comparison):
    for one in comparison.results[1:]:
        one.scores["reward"] = [math.nan] * 10 + [math.inf] * 5 + [1e30] * 5
        one.measured |= {"kl": [-1.0] * 20, "nll": [1e6] * 20, "lengths": [0] * 20}
        one.measured |= {"seconds": math.nan, "peak_memory_mib": math.inf, "models_resident": ""}
        one.curve[1:] = (
            [dict.fromkeys(one.curve[0]) | {"share": 0.5, "updates": 3, "reward": math.nan}] if one.curve else []
        )
        one.examples = [{"prompt": "?", "answer": "", "reward": math.nan}]


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
        (without_figures, "Not measured for any method: KL, perplexity, length and distinct-2."),
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


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lines_and_marks_stand_out(small_report, theme):
    """3 to 1 for what is no text, by WCAG 2.1, 1.4.11."""
    page = (small_report[1] / "comparison.html").read_text()
    found = re.findall(r"--([\w-]+):light-dark\((#\w{6}),(#\w{6})\)", page)
    colours = {name: light if theme == "light" else dark for name, light, dark in found}
    page = luminance(colours["page"])
    marks = {"up", "down", "muted"}
    drawn = [colour for name, colour in colours.items() if name in marks or name.startswith("series")]
    assert len(drawn) == 10
    for colour in drawn:
        light, dark = sorted((luminance(colour), page), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3
