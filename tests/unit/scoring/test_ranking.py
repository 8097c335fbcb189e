"""Scored candidates to ranked rows and pairs: values by hand, what must always hold, and one message per mistake."""

import io
import json
from collections import Counter

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.support.data import read_jsonl, real_data
from tests.support.scoring import CANDIDATES, chat
from trl_ext.data.prepare import prepare_dataset
from trl_ext.data.rows import RowOptions
from trl_ext.scoring.functions import FunctionScorer
from trl_ext.scoring.lists import rank_rows
from trl_ext.scoring.pairs import PAIR_RULES, check_pair_rule, make_pairs, pair_rows
from trl_ext.scoring.score import score_rows
from trl_ext.scoring.score_report import score_report
from trl_ext.scoring.tournament import PairwiseScorer


def row_of(scores, completions=None, **columns):
    """A scored row whose completions are letters unless given."""
    completions = completions or [chr(ord("a") + index) for index in range(len(scores))]
    return {"prompt": "p ", "completions": completions, "scores": [float(score) for score in scores], **columns}


def letters(pairs):
    return sorted(pair["chosen"] + pair["rejected"] for pair in pairs)


# report


def test_report_by_hand():
    rows = [row_of([0, 1, 2, 5]), row_of([2, 2]), row_of([])]
    report = score_report(rows)
    assert (report.num_prompts, report.num_completions) == (3, 6)
    assert report.mean == 2 and report.std == pytest.approx((14 / 6) ** 0.5)
    quartiles = (report.lower_quartile, report.median, report.upper_quartile)
    assert (report.min, *quartiles, report.max) == (0, 1.25, 2, 2, 5)
    assert (report.mean_of_best, report.mean_of_worst) == (3.5, 1)
    assert report.all_equal == pytest.approx(2 / 3)
    assert report.histogram == [1, 0, 1, 0, 3, 0, 0, 0, 0, 1] and report.bin_edges[::5] == [0, 2.5, 5]
    text = str(report)
    assert text.startswith("Scores of 6 completions to 3 prompts\n") and "66.7%" in text
    assert max(map(len, text.splitlines())) <= 79 and text.count("█") == 40 + 3 * 13
    console = Console(file=io.StringIO(), width=79)
    report.print(console)
    assert "66.7%" in console.file.getvalue()


def test_report_of_equal_scores_and_of_nothing():
    assert sum(score_report([row_of([3, 3])]).histogram) == 2
    with pytest.raises(ValueError, match="One of the 1 rows must have a completion, got none"):
        score_report([row_of([])])
    with pytest.raises(ValueError, match="Row 0: column 'scores' is missing; `score_rows` adds it"):
        score_report(CANDIDATES)
    with pytest.raises(ValueError, match="Row 1: column 'scores' holds nan"):
        score_report([row_of([1]), row_of([float("nan")])])


# pairs


def test_all_pairs_by_hand():
    assert letters(make_pairs(row_of([3, 1, 2, 1]), "all")) == ["ab", "ac", "ad", "cb", "cd"]
    pair = make_pairs(row_of([3, 1], reference="r", answer="x", sources=["s", "t"]), "all")
    assert pair == [
        {"prompt": "p ", "chosen": "a", "rejected": "b", "score_chosen": 3, "score_rejected": 1, "reference": "r"}
    ]


def test_the_best_answer_as_reference():
    """SLiC-HF's sample-rank: every pair of a prompt has the same target."""
    row = row_of([1, 3, 2], reference="r", tools=[])
    for rule in ("all", "tournament", "best_worst"):
        assert {pair["reference"] for pair in make_pairs(row, rule, best_as_reference=True)} == {"b"}
        assert {pair["reference"] for pair in make_pairs(row, rule)} == {"r"}
    drawn = [make_pairs(row, "random", seed, max_pairs=1, best_as_reference=True)[0] for seed in range(9)]
    assert {pair["chosen"] for pair in drawn} == {"b", "c"} and {pair["reference"] for pair in drawn} == {"b"}
    chats = chat(row_of([2, 2, 1]))
    (pair,) = make_pairs(chats, "best_worst", best_as_reference=True)
    assert pair["reference"] == pair["chosen"], "of equals the one whose likelihood is computed anyway"
    (ranked,), _ = rank_rows([row], best_as_reference=True)
    assert "reference" not in ranked and ranked["tools"] == [], "the trainer takes the best of a list"
    (ranked,), _ = rank_rows([row])
    assert ranked["reference"] == "r"


def test_best_and_worst_by_hand():
    assert letters(make_pairs(row_of([2, 1, 3]), "best_worst")) == ["cb"]
    rows = [{**row_of([3, 1, 3, 1]), "prompt": str(index)} for index in range(100)]
    drawn = Counter(letters(make_pairs(row, "best_worst"))[0] for row in rows)
    assert set(drawn) == {"ab", "ad", "cb", "cd"} and min(drawn.values()) > 10, "no place is preferred among equals"


def test_tournament_by_hand():
    # the judge's games, not the scores', are the pairs
    row = row_of([2, 0, 1, 0], games=[[0, 1], [2, 3], [0, 2]])
    assert letters(make_pairs(row, "tournament")) == ["ab", "ac", "cd"]
    # without games: with distinct scores K - 1 pairs, the best wins all of its own
    pairs = letters(make_pairs(row_of([4, 3, 2, 1]), "tournament"))
    assert len(pairs) == 3 and sum(pair[0] == "a" for pair in pairs) == 2
    # equal scores give no pair
    assert letters(make_pairs(row_of([1, 0, 0, 0]), "tournament")) in (["ab", "ac"], ["ab", "ad"], ["ac", "ad"])
    for games in ([[1, 0]], [[0, 4]], [[0, 0]]):
        with pytest.raises(ValueError, match=r"Row 0: column 'games' must hold .* Remove `games`, or score the row"):
            pair_rows([row_of([1, 0], games=games)], "tournament")


def test_a_tournament_by_score_equals_that_of_a_judge_who_sees_the_scores():
    row = row_of([3, 1, 4, 15, 9, 2, 6])
    by_text = dict(zip(row["completions"], row["scores"], strict=True))

    def judge(prompts, completions):
        return [int(by_text[second] > by_text[first]) for first, second in completions]

    judged = score_rows([row], [PairwiseScorer(judge)])
    assert letters(make_pairs(judged[0], "tournament")) == letters(make_pairs(row, "tournament"))


def test_random_pairs():
    row = row_of([5, 4, 3, 2, 1])
    assert len(make_pairs(row, "random")) == 5, "as many as there are candidates"
    assert len(make_pairs(row, "random", max_pairs=3)) == 3 and len(make_pairs(row, "random", max_pairs=99)) == 10
    rows = [{**row, "prompt": str(index)} for index in range(300)]
    drawn = Counter(pair for r in rows for pair in letters(make_pairs(r, "random", max_pairs=1)))
    assert len(drawn) == 10 and min(drawn.values()) > 12 and make_pairs(row, "random") == make_pairs(row, "random")
    assert any(make_pairs(r, "random", 1) != make_pairs(r, "random", 2) for r in rows)


def test_likelihood_near_by_hand():
    #                  a    b    c    d    e    f
    row = row_of([1, 0, 1, 0, 1, 0], logps=[-5, -4, -9, -7, -2, -10])
    # positives by likelihood: e -2, a -5, c -9. b -4 takes a; d -7 takes c; f -10 has none below it and takes c
    assert letters(make_pairs(row, "likelihood_near")) == ["ab", "cd", "cf"]
    # equally likely is not less likely
    assert letters(make_pairs(row_of([1, 1, 0], logps=[-3, -4, -3]), "likelihood_near")) == ["bc"]
    # another threshold: 0.5 itself is negative
    row = row_of([0.2, 0.5, 0.7], logps=[-1, -2, -3])
    assert letters(make_pairs(row, "likelihood_near")) == ["ca", "cb"]
    assert letters(make_pairs(row, "likelihood_near", positive_above=0.3)) == ["ba"]
    # a candidate that was not sampled has no likelihood
    row = row_of([1, 1, 0], logps=[None, -4, -3])
    pairs, report = pair_rows([row], "likelihood_near")
    assert letters(pairs) == ["bc"] and report.num_without_likelihood == 1


def test_likelihood_near_needs_likelihoods():
    for row in (row_of([1, 0]), row_of([1, 0], logps=None)):
        with pytest.raises(
            ValueError, match=r"Row 0: column 'logps' is missing, which the rule 'likelihood_near' needs"
        ):
            pair_rows([row], "likelihood_near")


def test_identical_and_empty_candidates_make_no_pair():
    row = row_of([1, 0, 2, 5, 4], ["x", "x", "y", " ", ""])
    for rule in ("all", "best_worst", "tournament", "random"):
        assert make_pairs(row, rule) == [
            {"prompt": "p ", "chosen": "y", "rejected": "x", "score_chosen": 2, "score_rejected": 0.5}
        ], rule
    _, report = pair_rows([row, row_of([1, 1])], "all")
    assert (report.num_empty, report.num_identical, report.num_used) == (2, 1, 1)
    assert str(report) == (
        "2 rows -> 1 pairs (all) from 1 rows\n  2 candidates left out: empty\n"
        "  1 candidates repeat another one of their prompt\n  1 rows gave none: all scores equal"
    )
    # a message with a key that a table has filled in is the same message
    said = [{"role": "assistant", "content": "x"}]
    row = chat(row_of([1, 0], ["x", "x"]))
    row["completions"][1] = [{"role": "assistant", "content": "x", "name": None}]
    assert row["completions"][0] == said and make_pairs(row, "all") == []


def test_rows_without_a_pair_are_counted_by_reason():
    rows = [row_of([1]), row_of([2, 2]), row_of([1, 1], ["", " "]), row_of([1, 2], ["x", "x"]), row_of([1, 0])]
    pairs, report = pair_rows(rows, "best_worst")
    assert len(pairs) == report.num_made == 1 and report.num_rows == 5
    assert report.dropped == {"only one distinct candidate": 2, "all scores equal": 1, "no usable candidate": 1}
    with pytest.raises(ValueError, match=r"None of the 2 rows gives .* 'best_worst': only one .* \(1\), all .* \(1\)"):
        pair_rows(rows[:2], "best_worst")
    with pytest.raises(ValueError, match=r"no score above positive_above=0.5 \(1\).* or set `positive_above`"):
        pair_rows([row_of([0.1, 0.2], logps=[-1, -2])], "likelihood_near")
    with pytest.raises(ValueError, match=r"all scores above positive_above=0.5 \(1\)"):
        pair_rows([row_of([1, 2], logps=[-1, -2])], "likelihood_near")


def test_wrong_pair_settings_are_refused():
    check_pair_rule("tournament", max_pairs=1)
    for arguments, message in [
        (("worst", None, 0.5), "`rule` must be one of all, best_worst, .*, got 'worst'"),
        (("all", 0, 0.5), "`max_pairs` must be at least 1, .*, got 0"),
        (("likelihood_near", None, float("nan")), "`positive_above` must be a finite score, got nan"),
    ]:
        rule, max_pairs, above = arguments
        with pytest.raises(ValueError, match=message):
            check_pair_rule(rule, max_pairs=max_pairs, positive_above=above)
        with pytest.raises(ValueError, match=message):  # before the rows are looked at
            pair_rows([], rule, max_pairs_per_prompt=max_pairs, positive_above=above)
    with pytest.raises(ValueError, match="`rule` must be one of all, best_worst, .*, got 'worst'"):
        pair_rows([row_of([1, 0])], "worst")
    with pytest.raises(ValueError, match="`max_pairs` must be at least 1, .*, got 0"):
        pair_rows([row_of([1, 0])], "all", max_pairs_per_prompt=0)
    with pytest.raises(ValueError, match="`positive_above` must be a finite score, got nan"):
        pair_rows([row_of([1, 0])], "all", positive_above=float("nan"))
    with pytest.raises(ValueError, match="Row 1: column 'scores' has 1 entries for 2 completions"):
        pair_rows([row_of([1, 0]), row_of([1], ["a", "b"])], "all")


@st.composite
def scored_rows(draw):
    rows = []
    for number in range(draw(st.integers(1, 4))):
        completions = draw(st.lists(st.text("ab ", max_size=2), min_size=1, max_size=7))
        size = len(completions)
        numbers = st.sampled_from([0.0, 0.25, 0.5, 1.0])
        row = {
            "prompt": f"{number}",
            "completions": completions,
            "scores": draw(st.lists(numbers, min_size=size, max_size=size)),
            "logps": draw(st.lists(st.integers(-4, -1), min_size=size, max_size=size)),
        }
        rows.append(chat(row) if draw(st.booleans()) else row)
    return rows


@settings(max_examples=200, deadline=None)
@given(
    rows=scored_rows(), rule=st.sampled_from(PAIR_RULES), seed=st.integers(0, 3), max_pairs=st.sampled_from([None, 2])
)
def test_pair_invariants(rows, rule, seed, max_pairs):
    made = [make_pairs(row, rule, seed, max_pairs=max_pairs) for row in rows]
    for row, pairs in zip(rows, made, strict=True):
        assert max_pairs is None or len(pairs) <= max_pairs
        texts = [json.dumps(completion) for completion in row["completions"]]
        for pair in pairs:
            assert pair["score_chosen"] > pair["score_rejected"] and pair["prompt"] == row["prompt"]
            for column in ("chosen", "rejected"):
                assert json.dumps(pair[column]) in texts
                said = pair[column] if isinstance(pair[column], str) else pair[column][0]["content"]
                assert said.strip()
        both = [(json.dumps(pair["chosen"]), json.dumps(pair["rejected"])) for pair in pairs]
        assert len({frozenset(pair) for pair in both}) == len(both), "no pair twice, in neither direction"
        backwards = {**row, **{k: row[k][::-1] for k in ("completions", "scores", "logps")}}
        assert make_pairs(backwards, rule, seed, max_pairs=max_pairs) == pairs, "candidates may come in any order"
    if any(made):
        pairs, report = pair_rows(rows, rule, seed, max_pairs_per_prompt=max_pairs)
        assert pairs == [pair for of_row in made for pair in of_row]
        assert report.num_used + report.dropped.total() == len(rows) and report.num_used == sum(map(bool, made))
        other, _ = pair_rows(rows[::-1], rule, seed, max_pairs_per_prompt=max_pairs)
        assert other == [pair for of_row in made[::-1] for pair in of_row], "rows may come in any order"
    else:
        with pytest.raises(ValueError, match="rows gives a pair"):
            pair_rows(rows, rule, seed, max_pairs_per_prompt=max_pairs)


# ranked rows


def test_ranked_rows_by_hand():
    row = row_of([1, 9, 2], ["x", "", "y"], logps=[-1.0, -2.0, None], sources=["s", "t", "u"], answer="a", tools=None)
    ranked, report = rank_rows([row, row_of([1, 2], ["", " "]), row_of([3])])
    assert ranked[0] == {
        "prompt": "p ", "completions": ["x", "y"], "scores": [1.0, 2.0], "sources": ["s", "u"], "logps": [-1.0, None],
        "tools": None,
    }  # fmt: skip
    assert len(ranked) == 2 and report.dropped == {"no usable candidate": 1} and report.num_empty == 3
    assert str(report).startswith("3 rows -> 2 ranked rows\n  3 candidates left out: empty")
    ranked, report = rank_rows([row, row_of([3]), row_of([1, 2])], min_completions=2)
    assert len(ranked) == 2 and report.dropped == {"only one candidate": 1}
    with pytest.raises(ValueError, match=r"None of the 1 rows has 2 usable candidates: only one candidate \(1\)"):
        rank_rows([row_of([3])], min_completions=2)
    with pytest.raises(ValueError, match="`min_completions` must be at least 1, got 0"):
        rank_rows([row], min_completions=0)


@pytest.mark.parametrize("form", ["plain", "chat"])
def test_trainers_read_what_comes_out(form, tokenizer):
    rows = CANDIDATES if form == "plain" else [chat(row) for row in CANDIDATES]
    lengths = FunctionScorer(lambda completions, **kwargs: [len(json.dumps(c)) for c in completions], "lengths")
    scored = score_rows(rows, [lengths])
    options = RowOptions(eos_token=tokenizer.eos_token, score_values=True)
    ranked, _ = rank_rows(scored)
    prepared, report = prepare_dataset(Dataset.from_list(ranked), tokenizer, options, name="train")
    assert [len(row["completion_ids"]) for row in prepared] == [3, 2, 3] and not report.dropped
    pairs, _ = pair_rows(scored, "all")
    prepared, report = prepare_dataset(Dataset.from_list(pairs), tokenizer, options, name="train")
    assert len(prepared) == len(pairs) == 3 + 1 + 3 and not report.dropped


# real data


def test_real_data():
    rows = read_jsonl(real_data("ranked.jsonl"))
    report = score_report(rows)
    assert (report.num_prompts, report.num_completions) == (611, 607 * 6 + 4 * 5)
    print(report)
    rows = [{**row, "logps": [-float(len(text)) for text in row["completions"]]} for row in rows]
    made = {rule: pair_rows(rows, rule) for rule in PAIR_RULES}
    for rule, (pairs, pair_report) in made.items():
        print(pair_report)
        assert all(pair["score_chosen"] > pair["score_rejected"] for pair in pairs), rule
        assert pair_report.num_used + pair_report.dropped.total() == 611
    assert len(made["best_worst"][0]) == made["best_worst"][1].num_used == made["all"][1].num_used > 600
    assert len(made["all"][0]) > len(made["random"][0]) > len(made["tournament"][0]) > len(made["best_worst"][0])
    ranked, rank_report = rank_rows(rows)
    print(rank_report)
    assert [row["scores"] for row in ranked] == [row["scores"] for row in rows]
