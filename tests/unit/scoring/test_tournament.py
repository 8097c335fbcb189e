"""The judge and its tournament: what must always hold, and one message for each mistake."""

import logging
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.support.rewards import longer_is_better
from tests.support.scoring import CANDIDATES, save_reward_model
from trl_ext.data.messages import as_text
from trl_ext.scoring.build import build_scorers, load_judge
from trl_ext.scoring.models import RankerModelJudge
from trl_ext.scoring.pairs import make_pairs
from trl_ext.scoring.score import score_rows
from trl_ext.scoring.tournament import PairwiseScorer, tournament_scores


@st.composite
def candidate_rows(draw):
    texts = st.lists(st.text("abcde", min_size=1, max_size=4), min_size=1, max_size=9, unique=True)
    return [
        {"prompt": draw(st.text("xy", max_size=2)), "completions": draw(texts)} for _ in range(draw(st.integers(1, 5)))
    ]


@settings(max_examples=100, deadline=None)
@given(rows=candidate_rows(), seed=st.integers(0, 3))
def test_tournament_invariants(rows, seed):
    calls = []

    def judge(prompts, completions):
        calls.append(len(prompts))
        return [0 if max(pair) == pair[0] else 1 for pair in completions]  # alphabetical order, no ties

    scorer = PairwiseScorer(judge, seed=seed)
    played = scorer.play(rows)
    largest = max(len(row["completions"]) for row in rows)
    assert len(calls) == (largest - 1).bit_length(), "one call per round for all rows"
    assert sum(calls) == scorer.counts["games"] == sum(map(len, played))
    for row, games in zip(rows, played, strict=True):
        num_candidates = len(row["completions"])
        assert len(games) == num_candidates - 1
        losers = [loser for _, loser in games]
        assert len(set(losers)) == len(losers), "who has lost is out"
        scores = tournament_scores(row, games)
        best = row["completions"].index(max(row["completions"]))
        assert best not in losers and scores.count(max(scores)) == 1 and scores[best] == max(scores)
        assert scores[best] <= (num_candidates - 1).bit_length()
        for winner, loser in games:
            assert row["completions"][winner] > row["completions"][loser] and scores[winner] > scores[loser]
        if num_candidates in (2, 4, 8):
            won = Counter(winner for winner, _ in games)
            assert scores == [won[index] for index in range(num_candidates)]
    assert scorer(rows[::-1]) == [tournament_scores(r, g) for r, g in zip(rows, played, strict=True)][::-1]
    backwards = [{**row, "completions": row["completions"][::-1]} for row in rows]
    assert [scores[::-1] for scores in scorer(backwards)] == scorer(rows), "candidates may come in any order"
    judges = make_pairs({**rows[0], "scores": scorer(rows)[0], "games": played[0]}, "tournament", seed)
    assert len(judges) == len(rows[0]["completions"]) - 1


def test_a_judge_that_prefers_a_place_is_cancelled():
    rows = [{"prompt": str(index), "completions": ["x", "y"]} for index in range(400)]
    scores = PairwiseScorer(lambda prompts, completions: [0] * len(prompts))(rows)
    wins_of_x = sum(first > second for first, second in scores)
    assert 160 < wins_of_x < 240  # 4 standard deviations


def test_swapping_changes_nothing_for_a_judge_that_looks_at_the_text():
    rows = [{"prompt": str(index), "completions": ["a", "bb", "ccc", "dddd"]} for index in range(20)]
    shown = []

    def judge(prompts, completions):
        shown.extend(completions)
        return longer_is_better(prompts, completions)

    for scores in PairwiseScorer(judge)(rows):
        assert scores[3] == 2 and sorted(scores) == [0, 0, 1, 2]
    assert 10 < sum(len(first) > len(second) for first, second in shown) < 50, "the longer one is shown in both places"


def test_undecided_games_are_decided_by_a_coin_and_counted(caplog):
    rows = [{"prompt": str(index), "completions": ["x", "y"]} for index in range(400)]
    scorer = PairwiseScorer(lambda prompts, completions: [-1] * len(prompts), name="unsure")
    with caplog.at_level(logging.WARNING, "trl_ext.scoring"):
        scored = score_rows(rows, [scorer])
    assert 160 < sum(row["scores"][0] > row["scores"][1] for row in scored) < 240
    assert scorer.counts == {"games": 400, "games that the judge could not decide, decided at random": 400}
    assert "unsure: 400 games, 400 games that the judge could not decide, decided at random" in caplog.text
    assert score_rows(rows, [scorer]) == scored and scorer.counts["games"] == 800


def test_identical_candidates_play_as_one_and_empty_ones_do_not_play():
    seen = []

    def judge(prompts, completions):
        seen.extend(completions)
        return longer_is_better(prompts, completions)

    row = {"prompt": "p", "completions": ["aa", " ", "aa", "b", "ccc", ""]}
    scored = score_rows([row], [PairwiseScorer(judge)])[0]
    assert len(seen) == 2 and all(first != second for first, second in seen)
    assert scored["scores"][0] == scored["scores"][2] and scored["scores"][1] == scored["scores"][5] == -1
    assert "ccc" in [pair["chosen"] for pair in make_pairs(scored, "tournament")] and len(scored["games"]) == 2


def test_nobody_has_two_byes_before_the_final():
    """Of five, one stands out the first round; in the second, where three are left, another one does."""
    rows = [{"prompt": str(index), "completions": list("abcde")} for index in range(50)]
    for games in PairwiseScorer(lambda prompts, completions: [int(b > a) for a, b in completions]).play(rows):
        (bye,) = set(range(5)) - {player for game in games[:2] for player in game}
        assert bye in games[2], "it plays in the second round, of one game"


def test_a_winner_with_a_bye_scores_above_the_one_it_beat():
    row = {"prompt": "p", "completions": ["a", "b", "c"]}
    assert tournament_scores(row, [[0, 1], [2, 0]]) == [1.0, 0.0, 2.0]  # games won: 1, 0, 1
    assert tournament_scores(row, [[0, 1], [0, 2]]) == [1.0, 0.0, 0.0]  # the loser with the bye has beaten nobody


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        ([0, 2], ValueError, "'judge' must return 0 if the first is better, .*, got 2"),
        ([0, None], ValueError, "must return 0 if the first is better, .*, got None"),
        ([0, 0.5], ValueError, "must return 0 if the first is better, .*, got 0.5"),
        ([0], ValueError, "must return one entry for each of 2 completions, got 1"),
        (0, TypeError, r"'judge' must return a list .*, got int \(0\)"),
    ],
)
def test_wrong_verdicts_are_refused(result, error, message):
    with pytest.raises(error, match=message):
        PairwiseScorer(lambda prompts, completions: result, name="judge")(CANDIDATES[:2])


def test_verdicts_of_other_integer_types_are_taken():
    rows = CANDIDATES[1:2]
    for verdict in (np.int64(0), torch.tensor(0)):
        assert PairwiseScorer(lambda prompts, completions, v=verdict: [v])(rows) == PairwiseScorer(
            lambda prompts, completions: [0]
        )(rows)


TEMPLATE = "{prompt}|{first}|{second}|better:"


def test_ranker_model_compares_the_probabilities_of_the_labels(reward_model_dir, tmp_path):
    directory = save_reward_model(tmp_path / "ranker", architecture=LlamaForCausalLM)
    judge = RankerModelJudge(directory, template=TEMPLATE, batch_size=3)
    tokenizer, model = AutoTokenizer.from_pretrained(directory), LlamaForCausalLM.from_pretrained(directory)
    pairs = [["yes", "no"], ["no", "yes"], ["a longer answer", "b"], ["b", "a longer answer"], ["same", "same"]]
    expected = []
    for first, second in pairs:
        text = f"q|{first}|{second}|better:"
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
        a, b = (logits[tokenizer.convert_tokens_to_ids(label)].item() for label in "AB")
        expected.append(int(b > a))
    assert judge(["q"] * 5, pairs) == expected and set(expected) == {0, 1}
    as_messages = [[[{"role": "assistant", "content": text}] for text in pair] for pair in pairs]
    assert judge([[{"role": "user", "content": "q"}]] * 5, as_messages) == expected
    judge._can_keep_logits = False
    assert judge(["q"] * 5, pairs) == expected
    judge.label_ids = judge.label_ids[:1] * 2
    assert judge(["q"] * 5, pairs) == [-1] * 5, "equally likely labels decide nothing"


def test_ranker_model_runs_a_tournament_and_counts_what_it_cut(tmp_path, caplog):
    directory = save_reward_model(tmp_path / "ranker", architecture=LlamaForCausalLM)
    (scorer,) = build_scorers(judge=str(directory), max_length=64)
    with caplog.at_level(logging.WARNING, "trl_ext.scoring"):
        scored = score_rows(CANDIDATES, [scorer])
    assert [len(row["games"]) for row in scored] == [2, 1, 2]  # the empty one does not play
    assert scorer.name == "ranker" and "5 games" in caplog.text
    assert scorer.counts == {"games": 5, "texts cut on the left at max_length=64": 5}


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ("as it is", "as it is"),
        (None, ""),
        ([], ""),
        ([{"role": "assistant", "content": None}], ""),
        ([{"role": "assistant", "content": [{"type": "text", "text": "h"}, {"type": "image"}, "o"]}], "ho"),
        ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}], "user: hi\n\nassistant: "),
    ],
)
def test_messages_as_text(messages, text):
    assert as_text(messages) == text


def test_unusable_judges_are_refused(model_dir):
    with pytest.raises(
        ValueError, match=r"must have the fields \{prompt\}, \{first\} and \{second\}, got \['prompt'\]"
    ):
        RankerModelJudge(model_dir, template="{prompt} A or B?")
    with pytest.raises(ValueError, match=r"label 'first' must be one token .* Choose labels of one token"):
        RankerModelJudge(model_dir, labels=("first", "second"))
    with pytest.raises(ValueError, match=r"`labels` must be two different ones, .*, got \('A', 'A'\)"):
        RankerModelJudge(model_dir, labels=("A", "A"))
    assert load_judge("tests.support.rewards:longer_is_better")([], [["aa", "b"], ["a", "bb"]]) == [0, 1]
