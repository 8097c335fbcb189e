"""
Candidates to scores: values by hand, what must always hold, and one message per mistake.

Run as a script under torchrun, this file is the worker of its own test on two processes.
"""

import json
import logging
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from tests.support import warm
from tests.support.data import REPOSITORY
from tests.support.rewards import length_reward, longer_is_better
from tests.support.scoring import CANDIDATES, chat
from trl_ext.data.messages import as_text
from trl_ext.playground.model import byte_level_tokenizer
from trl_ext.scoring.build import build_scorers, check_scorers, load_judge
from trl_ext.scoring.config import ScorerConfig
from trl_ext.scoring.functions import FunctionScorer, ScoringError, load_reward_function
from trl_ext.scoring.models import RankerModelJudge, RewardModelScorer
from trl_ext.scoring.pairs import make_pairs
from trl_ext.scoring.score import combine, score_rows
from trl_ext.scoring.tournament import PairwiseScorer, tournament_scores

# reward functions


def test_function_gets_what_trl_gives_it():
    seen = {}

    def reward(prompts, completions, completion_ids, answer, **kwargs):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, answer=answer, **kwargs)
        return [float(a == c) for a, c in zip(answer, completions, strict=True)]

    rows = [{**row, "completion_ids": [[7]] * len(row["completions"])} for row in CANDIDATES[:2]]
    rows = [{**row, "logps": None, "sources": ["s"] * len(row["completions"]), "level": 3} for row in rows]
    rows = [{**row, "_number": 7} for row in rows]  # somebody's bookkeeping, which stays theirs
    assert FunctionScorer(reward)(rows) == [[1.0, 0.0, 0.0], [1.0, 0.0]]
    assert seen == {
        "prompts": ["What is 2 + 2? "] * 3 + ["Say yes. "] * 2,
        "completions": ["4", "four, I think", "22", "yes", "no"],
        "completion_ids": [[7]] * 5,
        "answer": ["4"] * 3 + ["yes"] * 2,
        "level": [3] * 5,
    }
    assert FunctionScorer(reward).name == "reward"


def test_a_reward_function_of_trl_runs():
    scorer = FunctionScorer(load_reward_function("trl.rewards:think_format_reward"))
    right, wrong = "<think>hm</think>4", "4"
    assert scorer([chat({"prompt": "2 + 2?", "completions": [right, wrong]})]) == [[1.0, 0.0]]


@pytest.mark.parametrize(
    "values",
    [
        [np.float32(1), np.int64(0), True, None, 0.5],
        [torch.tensor(1.0), torch.tensor([0]), 1, None, np.array(0.5)],
        (1, 0, np.bool_(True), None, 0.5),
    ],
)
def test_numbers_of_all_kinds_are_taken(values):
    assert FunctionScorer(lambda **kwargs: values)(CANDIDATES[:2]) == [[1.0, 0.0, 1.0], [None, 0.5]]


@pytest.mark.parametrize("container", [torch.tensor, np.array])
def test_arrays_are_taken(container):
    assert FunctionScorer(lambda **kwargs: container([1.0, 2, 3]))(CANDIDATES[:1]) == [[1.0, 2.0, 3.0]]


def test_async_functions_are_awaited_also_where_a_loop_runs():
    import asyncio

    async def reward(prompts, completions, **kwargs):
        await asyncio.sleep(0)
        return [1.0] * len(prompts)

    scorer = FunctionScorer(reward)

    async def notebook():
        return scorer(CANDIDATES[:1])

    assert scorer(CANDIDATES[:1]) == asyncio.run(notebook()) == [[1.0, 1.0, 1.0]]


def test_rows_without_candidates_do_not_reach_the_function():
    assert FunctionScorer(None, "never called")([{"prompt": "p", "completions": []}]) == [[]]


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        ([1.0], ValueError, r"'reward' returned 1 entries for 5 completions. It has to return one for each"),
        (0.5, TypeError, r"'reward' returned float \(0.5\). It has to return a list"),
        ([0, 0, 0, 0, "1"], ScoringError, r"'reward': row 1, completion 1: returned '1', which is not a finite"),
        ([0, float("nan"), 0, 0, 0], ScoringError, r"'reward': row 0, completion 1: returned nan, .* Return a number"),
        ([0, 0, 0, np.inf, 0], ScoringError, r"row 1, completion 0: returned inf"),
        ([[0]] * 5, ScoringError, r"row 0, completion 0: returned \[0\]"),
    ],
)
def test_wrong_results_are_refused(result, error, message):
    with pytest.raises(error, match=message):
        FunctionScorer(lambda **kwargs: result, "reward")(CANDIDATES[:2])


def test_a_function_that_raises_is_named_with_its_first_prompt():
    def reward(completions, **kwargs):
        return [1 / (len(completion) - 3) for completion in completions]

    with pytest.raises(
        RuntimeError, match=r"'reward' raised ZeroDivisionError: .* first of which is 'Say yes. '"
    ) as e:
        FunctionScorer(reward)(CANDIDATES[1:])
    assert isinstance(e.value.__cause__, ZeroDivisionError)


def test_a_function_that_does_not_take_the_arguments_is_told_so():
    with pytest.raises(
        TypeError, match=r"'reward' is called with the arguments prompts, completions, answer, which do"
    ):
        FunctionScorer(lambda prompts, completions: [], "reward")(CANDIDATES)
    with pytest.raises(TypeError, match=r"missing a required argument: 'solution'\). Rename the columns"):
        FunctionScorer(lambda prompts, completions, solution, **kwargs: [], "reward")(CANDIDATES)


def test_functions_are_found_by_module_and_by_file(tmp_path, monkeypatch):
    assert load_reward_function("tests.support.rewards:length_reward") is not None
    file = tmp_path / "rewards.py"
    file.write_text("class Rules:\n    def right(self, **kwargs): return 1\nrules = Rules()\nnumber = 3\n")
    assert load_reward_function(f"{file}:rules.right")() == 1
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards_beside.py").write_text("def one(**kwargs): return 1\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_reward_function("rewards_beside:one")() == 1
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "failing.py").write_text("1 / 0\n")
    for spec, error, message in [
        ("rewards.py:", ValueError, "names no function. Write 'package.module:function'"),
        ("missing.py:f", FileNotFoundError, "there is no file .*missing.py"),
        ("rewards.py:righ", ImportError, "has no 'righ'. Correct the name"),
        ("rewards.py:rule", ImportError, "Did you mean rules?"),
        ("rewards.py:number", TypeError, "is int, which cannot be called"),
        ("rewards.py:Rules", TypeError, "is a class. Make an object"),
        ("nowhere.at_all:f", ImportError, "there is no module 'nowhere'"),
        ("broken:f", ImportError, "the module broken needs 'nothing_of_this_name', which is not there. Install it"),
        ("failing.py:f", ImportError, "failing.py cannot be imported, it raised ZeroDivisionError"),
        ("failing:f", ImportError, "the module failing cannot be imported, it raised ZeroDivisionError"),
    ]:
        with pytest.raises(error, match=message):
            load_reward_function(spec)


# reward models


@pytest.fixture(scope="module")
def reward_model_dir(tmp_path_factory):
    return str(save_reward_model(tmp_path_factory.mktemp("rewards") / "tiny-rm"))


def save_reward_model(directory, num_labels=1, architecture=LlamaForSequenceClassification):
    tokenizer = byte_level_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=128, num_labels=num_labels, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = architecture(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("form", ["plain", "chat"])
def test_reward_model_scores_the_whole_text_batched_as_one_by_one(form, reward_model_dir):
    rows = CANDIDATES if form == "plain" else [chat(row) for row in CANDIDATES]
    ends = [["stop", "length", None], None, ["length", "stop", "role_marker", "length"]]
    rows = [{**row, "ends": of_row} for row, of_row in zip(rows, ends, strict=True)]
    scores = RewardModelScorer(reward_model_dir, batch_size=4)(rows)
    tokenizer = AutoTokenizer.from_pretrained(reward_model_dir)
    model = LlamaForSequenceClassification.from_pretrained(reward_model_dir)
    expected = []
    for row, of_row in zip(CANDIDATES, ends, strict=True):
        expected.append([])
        for completion, end in zip(row["completions"], of_row or ["stop", "stop"], strict=True):
            text = row["prompt"] + completion + "<|im_end|>"
            if form == "chat":
                text = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n{completion}<|im_end|>"
            text = text.removesuffix("<|im_end|>") if end == "length" else text
            with torch.no_grad():
                expected[-1].append(model(**tokenizer(text, return_tensors="pt")).logits.item())
    assert [len(row) for row in scores] == [3, 2, 4]
    for row, expected_row in zip(scores, expected, strict=True):
        assert row == pytest.approx(expected_row, abs=1e-5)
    assert np.std(np.concatenate(scores)) > 0.05, "the model tells them apart, or the comparison says nothing"


def test_reward_model_reads_what_trl_trains_it_on(reward_model_dir, tmp_path):
    from trl import RewardConfig, RewardTrainer

    rows = [{"prompt": row["prompt"], "chosen": row["completions"][0], "rejected": "x"} for row in CANDIDATES]
    chats = [{**chat({"prompt": row["prompt"], "completions": [row["chosen"], "x"]})} for row in rows]
    pairs = [{"prompt": c["prompt"], "chosen": c["completions"][0], "rejected": c["completions"][1]} for c in chats]
    scorer = RewardModelScorer(reward_model_dir)
    for data in (rows, pairs):
        args = RewardConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", activation_checkpointing=False, max_length=None
        )
        theirs = RewardTrainer(
            scorer.model, args, train_dataset=Dataset.from_list(data), processing_class=scorer.tokenizer
        )
        ours = [scorer._token_ids(row, row["chosen"]) for row in data]
        assert ours == list(theirs.train_dataset["chosen_ids"])


def test_too_long_texts_lose_their_beginning(reward_model_dir, caplog):
    row = {"prompt": "0123456789", "completions": ["abc", "a"]}
    whole = RewardModelScorer(reward_model_dir)
    scorer = RewardModelScorer(reward_model_dir, max_length=14)  # as long as the first one with its end token
    assert scorer([row]) == whole([row]) and scorer.counts == {"completions": 2}
    scorer = RewardModelScorer(reward_model_dir, max_length=12)
    with caplog.at_level(logging.WARNING, "trl_ext.scoring"):
        cut, uncut = score_rows([row], [scorer])[0]["scores"]
    assert cut == pytest.approx(whole([{"prompt": "23456789", "completions": ["abc"]}])[0][0], abs=1e-5)
    assert uncut == pytest.approx(whole([row])[0][1], abs=1e-5)
    assert scorer.counts == {"completions": 2, "texts cut on the left at max_length=12": 1}
    assert "tiny-rm: 2 completions, 1 texts cut on the left at max_length=12" in caplog.text


def test_a_begin_token_survives_the_cut(reward_model_dir):
    from trl_ext.scoring.models import _cut_left

    tokenizer = AutoTokenizer.from_pretrained(reward_model_dir)
    assert _cut_left([9, 1, 2, 3], 3, tokenizer) == [1, 2, 3]
    tokenizer.bos_token = "<|im_start|>"
    assert _cut_left([tokenizer.bos_token_id, 7, 8, 9], 3, tokenizer) == [tokenizer.bos_token_id, 8, 9]
    assert _cut_left([5, 7, 8, 9], 3, tokenizer) == [7, 8, 9]


def test_models_that_give_no_score_are_refused(reward_model_dir, model_dir, tmp_path):
    two = save_reward_model(tmp_path / "two", num_labels=2)
    with pytest.raises(ValueError, match=r"num_labels=2 \(architecture: LlamaForSequenceClassification\): a score is"):
        RewardModelScorer(two)
    with pytest.raises(ValueError, match=r"\(architecture: LlamaForCausalLM\).* is a judge, not a reward model"):
        RewardModelScorer(model_dir)
    headless = save_reward_model(tmp_path / "headless", architecture=LlamaForCausalLM)
    config = json.loads((headless / "config.json").read_text())
    (headless / "config.json").write_text(json.dumps({**config, "num_labels": 1}))
    with pytest.raises(ValueError, match=r"lacks score.weight, which transformers has filled with random numbers"):
        RewardModelScorer(headless)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is a PEFT adapter.*Merge it into its base model"):
        RewardModelScorer(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match=r"'nobody/nothing' could not be loaded: .* a function is written"):
        RewardModelScorer("nobody/nothing")
    with pytest.raises(ValueError, match=r"max_length=129, and .*tiny-rm has only 128 positions. Set it to 128"):
        RewardModelScorer(reward_model_dir, max_length=129)


def test_a_model_that_gives_nan_is_caught(reward_model_dir):
    scorer = RewardModelScorer(reward_model_dir, dtype="float32")
    scorer.model.score.weight.data[:] = float("nan")
    with pytest.raises(ScoringError, match=r"'tiny-rm': row 2, completion 3: gave nan. Try dtype"):
        scorer(CANDIDATES)


# the judge


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
    assert scorer.counts == {"games": 400, "games the judge could not decide: a coin did": 400}
    assert "unsure: 400 games, 400 games the judge could not decide: a coin did" in caplog.text
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
        ([0, 2], ValueError, "'judge' returned 2 for a pair. It has to return 0"),
        ([0, None], ValueError, "returned None for a pair"),
        ([0, 0.5], ValueError, "returned 0.5 for a pair"),
        ([0], ValueError, "returned 1 entries for 2 completions"),
        (0, TypeError, r"'judge' returned int \(0\)"),
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
        ValueError, match=r"has the fields \['prompt'\], and needs \{prompt\}, \{first\} and \{second\}"
    ):
        RankerModelJudge(model_dir, template="{prompt} A or B?")
    with pytest.raises(ValueError, match=r"label 'first' is not one token .* Choose labels of one token"):
        RankerModelJudge(model_dir, labels=("first", "second"))
    with pytest.raises(ValueError, match=r"labels=\('A', 'A'\): give two different labels"):
        RankerModelJudge(model_dir, labels=("A", "A"))
    assert load_judge("tests.support.rewards:longer_is_better")([], [["aa", "b"], ["a", "bb"]]) == [0, 1]


# several scorers, whole data


def test_sums_are_weighted_and_none_counts_as_nothing():
    assert combine([[1.0, None, 2.0], [None, 3.0, 0.5]], [2.0, -1.0]) == [2.0, -3.0, 3.5]
    with pytest.raises(ScoringError, match=r"completion 1: every reward function returned None"):
        combine([[1.0, None], [0.0, None]], [1.0, 1.0])


def test_each_scorers_values_are_kept():
    def is_right(completions, answer, **kwargs):
        return [1.0 if a == c else None for a, c in zip(answer, completions, strict=True)]

    scorers = [FunctionScorer(is_right), FunctionScorer(length_reward)]
    scored = score_rows(CANDIDATES, scorers, [10, -1])
    assert [row["scores"] for row in scored] == [[9, -13, -2], [7, -2], [6, 0, -1, -19]]
    assert scored[0]["rewards/is_right"] == [1.0, None, None] and scored[0]["rewards/length_reward"] == [1, 13, 2]
    assert "scores" not in CANDIDATES[0]
    again = score_rows(scored, scorers[1:])
    assert set(again[0]) == {"prompt", "completions", "answer", "scores"}, "what earlier scorers said is gone"
    never_for_nothing = FunctionScorer(
        lambda completions, **kwargs: [1 if text else None for text in completions], "r"
    )
    with pytest.raises(ScoringError, match=r"Scoring: row 2, completion 1: every reward function returned None"):
        score_rows(CANDIDATES, [never_for_nothing], batch_size=2)


def test_errors_name_the_row_of_the_whole_data():
    rows = [{"prompt": str(index), "completions": ["x", "y"]} for index in range(7)]
    scorer = FunctionScorer(lambda prompts, **kwargs: [float("nan") if p == "5" else 0 for p in prompts], "reward")
    with pytest.raises(ScoringError, match="row 5, completion 0"):
        score_rows(rows, [scorer], batch_size=2)


def test_errors_of_whole_data_name_the_prompt():
    scorer = FunctionScorer(lambda prompts, **kwargs: [None for _ in prompts], "nothing")
    with pytest.raises(ScoringError, match="row 0, completion 0: every .* The prompt is 'What is 2"):
        score_rows(CANDIDATES, [scorer])
    with pytest.raises(RuntimeError, match="first of which is 'Go on") as caught:
        score_rows([*CANDIDATES[:2] * 2, CANDIDATES[2]], [FunctionScorer(raises_on_the_third, "r")], batch_size=2)
    assert caught.value.__notes__ == ["Rows 4 to 4 were being scored."]


def raises_on_the_third(prompts, **kwargs):
    return [1 / (prompt != CANDIDATES[2]["prompt"]) for prompt in prompts]


MANY = [{"prompt": f"{i} ", "completions": [str(i * j) for j in range(1, 3 + i % 4)], "x": i} for i in range(10)]


def write_service(file, breaks_at, extra=""):
    """A reward function that writes down whom it was asked about, and breaks down at a row."""
    file.write_text(
        "from pathlib import Path\n"
        "def score(prompts, completions, x, **kwargs):\n"
        f"    with Path({str(file.with_name('calls'))!r}).open('a') as calls:\n"
        "        calls.write(''.join(f'{i} ' for i in dict.fromkeys(x)))\n"
        f"    if {breaks_at} in x:\n"
        "        raise ConnectionError('the service is down')\n"
        f"    return [float(len(c) + i{extra}) for c, i in zip(completions, x)]\n"
        "def judge(prompts, completions):\n"
        "    return [0 if len(first) > len(second) else 1 if len(first) < len(second) else -1\n"
        "            for first, second in completions]\n"
    )


def scorers_of(file):
    """As another process would load them."""
    for name in [name for name in sys.modules if name.startswith(f"trl_ext_{file.stem}_")]:
        del sys.modules[name]
    return build_scorers([f"{file}:score"], judge=f"{file}:judge")


def calls(file):
    called = file.with_name("calls").read_text().split()
    file.with_name("calls").unlink()
    return list(map(int, called))


def test_a_scoring_that_breaks_down_goes_on_where_it_was(tmp_path, caplog):
    file, folder, weights = tmp_path / "service.py", tmp_path / "scores", [1, 2]
    write_service(file, breaks_at=None)
    scorers = scorers_of(file)
    expected = score_rows(MANY, scorers, weights, batch_size=3)
    expected_counts = [getattr(scorer, "counts", None) for scorer in scorers]
    assert calls(file) == list(range(10)) and expected_counts[1]["games"] > expected_counts[1].total() / 2

    write_service(file, breaks_at=7)
    with pytest.raises(RuntimeError, match="'score' raised ConnectionError: the service is down") as caught:
        score_rows(MANY, scorers_of(file), weights, batch_size=3, folder=folder)
    assert calls(file) == list(range(9))
    (place,) = folder.iterdir()
    assert caught.value.__notes__[-1] == (
        f"What was scored before is kept in {place}: the same call goes on from there."
    )
    assert "has changed" not in caplog.text
    # mended, as the judge says in its file; the scores of the first six are kept
    write_service(file, breaks_at=None)
    scorers = scorers_of(file)
    with caplog.at_level(logging.WARNING, "trl_ext.scoring"):
        assert score_rows(MANY, scorers, weights, batch_size=3, folder=folder) == expected
    assert calls(file) == [6, 7, 8, 9]
    assert (
        f"A reward function has changed. What it had scored before is kept, 2 of 4 portions in {place}" in caplog.text
    )
    assert [getattr(scorer, "counts", None) for scorer in scorers] == expected_counts
    # once finished, nothing is asked again, whatever the weights
    again = score_rows(MANY, scorers_of(file), [3, 2], batch_size=3, folder=folder)
    assert not file.with_name("calls").exists()
    assert again == score_rows(MANY, scorers_of(file), [3, 2], batch_size=3) != expected
    calls(file)
    # other rows are another matter, and so is a function that was changed after it had finished
    others = [{**row, "x": row["x"] + 1} for row in MANY]
    assert score_rows(others, scorers_of(file), weights, batch_size=3, folder=folder) != expected
    assert calls(file) == list(range(1, 11)) and len(list(folder.iterdir())) == 2
    write_service(file, breaks_at=None, extra=" + 1")
    changed = score_rows(MANY, scorers_of(file), weights, batch_size=3, folder=folder)
    assert calls(file) == list(range(10))
    assert [row["scores"][0] - 1 for row in changed] == [row["scores"][0] for row in expected]
    # what is somebody's bookkeeping is not looked at
    noted = [{**row, "_number": 3} for row in MANY]
    kept = score_rows(noted, scorers_of(file), weights, batch_size=3, folder=folder)
    assert kept == [{**row, "_number": 3} for row in changed] and not file.with_name("calls").exists()


def test_games_and_scores_of_models_are_kept(reward_model_dir, tmp_path):
    judge = f"{tmp_path}/service.py:judge"
    write_service(tmp_path / "service.py", breaks_at=None)
    for names in ({"judge": judge}, {"rewards": reward_model_dir}):
        first = score_rows(MANY, build_scorers(**names), folder=tmp_path / "scores")
        (scorer,) = build_scorers(**names)
        vars(scorer)["judge" if "judge" in names else "model"] = None  # nobody to ask
        assert score_rows(MANY, [scorer], folder=tmp_path / "scores") == first
        assert ("games" in first[0]) == ("judge" in names) and scorer.counts
    other = build_scorers(reward_model_dir, max_length=3)
    assert score_rows(MANY, other, folder=tmp_path / "scores") != first
    (scorer,) = build_scorers(judge=judge, seed=43)
    score_rows(MANY, [scorer], folder=tmp_path / "scores")
    assert len(list((tmp_path / "scores").iterdir())) == 4


def test_games_are_kept_only_if_the_judge_decides_alone():
    judge = PairwiseScorer(longer_is_better)
    assert "games" in score_rows(CANDIDATES, [judge])[0]
    both = score_rows(score_rows(CANDIDATES, [judge]), [judge, FunctionScorer(length_reward)])[0]
    assert "games" not in both and both["rewards/longer_is_better"][1] == 2


def test_scorers_are_built_by_name(reward_model_dir, tmp_path):
    (tmp_path / "r.py").write_text(
        "def length_reward(completions, **kwargs):\n    return [0.0 for _ in completions]\n"
    )
    specs = ["tests.support.rewards:length_reward", f"{tmp_path}/r.py:length_reward", reward_model_dir]
    scorers = build_scorers(specs, [1, 2, 3, 4], judge="tests.support.rewards:longer_is_better", seed=7)
    assert [type(scorer) for scorer in scorers] == [FunctionScorer, FunctionScorer, RewardModelScorer, PairwiseScorer]
    assert [scorer.name for scorer in scorers] == [specs[0], specs[1], "tiny-rm", "longer_is_better"]
    assert scorers[3].seed == 7 and len(score_rows(CANDIDATES, scorers, [1, 2, 3, 4])) == 3
    for arguments, error, message in [
        (([],), ValueError, "There is nothing to score with"),
        ((specs[:1] * 2,), ValueError, "named twice"),
        ((["missing.module:f"], [1, 2]), ValueError, r"2 weights are given for 1 scorers \(missing.module:f\)"),
        ((specs[:1], [float("nan")]), ValueError, "The weight of .* is nan"),
        ((["./nowhere"],), FileNotFoundError, "looks like a folder, and there is none"),
        ((["rewards.py"],), ValueError, "is a file without a function. Write 'rewards.py:function'"),
    ]:
        with pytest.raises(error, match=message):
            build_scorers(*arguments)


def test_what_cannot_score_is_found_before_anything_is_loaded(reward_model_dir, model_dir, tmp_path, monkeypatch):
    function, judge = "tests.support.rewards:length_reward", "tests.support.rewards:longer_is_better"
    ranker = str(save_reward_model(tmp_path / "ranker", architecture=LlamaForCausalLM))
    two = str(save_reward_model(tmp_path / "two", num_labels=2))
    (tmp_path / "r.py").write_text("def needs(prompts, completions, solution): ...\n")
    needs = f"{tmp_path}/r.py:needs"
    for name in ("ranker", "two"):  # no weights are looked at
        (tmp_path / name / "model.safetensors").unlink()

    def no_weights(*arguments, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(LlamaForSequenceClassification, "from_pretrained", no_weights)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", no_weights)
    check_scorers(function)
    check_scorers([function, reward_model_dir], [1, -0.5], judge=None, columns=["answer", "_number"])
    check_scorers(judge=judge, columns=["solution"])
    check_scorers(needs, columns=["prompt", "solution", "_number"])
    check_scorers(judge=ranker, **ScorerConfig().scorer_options())
    check_scorers([function], [0.5, 2], judge=ranker)
    for arguments, options, error, message in [
        (
            (["tests.support.rewards:lenght_reward"],),
            {},
            ImportError,
            "has no 'lenght_reward'. Did you mean length_rew",
        ),
        ((function, [1, 2]), {}, ValueError, "2 weights are given for 1 scorers"),
        ((function, [0]), {}, ValueError, "All weights are 0, so that all scores are equal"),
        (((), [1]), {"judge": judge}, ValueError, r"Weights are given \(1\) and the judge .* scores alone: .* Leave"),
        ((function, [1, -1]), {"judge": judge}, ValueError, "weight of the judge .* is -1: who wins its games would"),
        ((), {}, ValueError, "There is nothing to score with"),
        ((needs,), {"columns": ["answer"]}, TypeError, "r.py:needs' is called with .* prompts, completions, answer, "),
        ((), {"judge": needs}, TypeError, "The judge .*missing a required argument: 'solution'"),
        ((str(tmp_path / "none"),), {}, FileNotFoundError, "The reward .* looks like a folder, and there is none"),
        ((), {"judge": str(tmp_path / "none")}, FileNotFoundError, "The judge .* looks like a folder, and there is n"),
        ((two,), {}, ValueError, "has num_labels=2"),
        ((model_dir,), {}, ValueError, "is a judge, not a reward model"),
        ((), {"judge": reward_model_dir}, ValueError, "is a LlamaForSequenceClassification, which predicts no next"),
        ((reward_model_dir,), {"max_length": 129}, ValueError, "max_length=129, and .* has only 128 positions"),
        ((reward_model_dir,), {"batch_size": 0}, ValueError, "batch_size=0: set it to 1 or more"),
        ((reward_model_dir,), {"dtype": "float23"}, ValueError, "dtype='float23' is not known"),
    ]:
        with pytest.raises(error, match=message):
            check_scorers(*arguments, **options)


def test_a_judge_alone_is_not_weighed():
    with pytest.raises(ValueError, match="the judge 'longer_is_better' scores alone"):
        score_rows(CANDIDATES, [PairwiseScorer(longer_is_better)], [-1.0])


def test_options_of_models_that_score(reward_model_dir):
    options = ScorerConfig(reward_batch_size=3, reward_dtype="bfloat16", reward_max_length=17).scorer_options()
    (scorer,) = build_scorers(reward_model_dir, **options)
    assert (scorer.batch_size, scorer.max_length, scorer.model.dtype) == (3, 17, torch.bfloat16)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completions": ["a"]}, r"Row 1: column 'prompt' is missing; the columns are \['completions'\]"),
        ({"prompt": "p"}, "Row 1: column 'completions' is missing"),
        ({"prompt": "p", "completions": "ab"}, r"column 'completions' is str, not a list"),
        ({"prompt": "p", "completions": ["a", None]}, r"column 'completions\[1\]' is missing \(None\). Fill it in"),
        ({"prompt": "p", "completions": [[{"role": "assistant", "content": "a"}]]}, "is list while 'prompt' is str"),
        ({"prompt": "p", "completions": ["a"], "logps": [1.0, 2.0]}, "'logps' has 2 entries for 1 completions"),
        ({"prompt": "p", "completions": ["a"], "logps": [float("nan")]}, "'logps' holds nan"),
    ],
)
def test_unusable_rows_are_refused_before_anything_is_scored(row, message):
    with pytest.raises(ValueError, match=message):
        score_rows([CANDIDATES[0], row], [FunctionScorer(None, "never called")])


def test_other_wrong_settings():
    scorer = FunctionScorer(length_reward)
    with pytest.raises(ValueError, match="There are no rows"):
        score_rows([], [scorer])
    with pytest.raises(ValueError, match=r"The scorers are \['length_reward', 'length_reward'\]. Give one or more"):
        score_rows(CANDIDATES, [scorer, scorer])
    with pytest.raises(ValueError, match="batch_size=0: set it to 1 or more"):
        score_rows(CANDIDATES, [scorer], batch_size=0)


def work(folder, reward_model_dir, state):
    """What each process does in the test on two of them."""
    rows = [{"prompt": f"{i} ", "completions": [str(i * j) for j in range(1, 2 + i % 5)]} for i in range(11)]

    def mean_of_batch(completions, **kwargs):  # depends on what is scored together
        return [sum(map(len, completions)) / len(completions)] * len(completions)

    def unsure(prompts, completions):
        return [-1] * len(prompts)

    def fails_on_the_second_process(prompts, **kwargs):
        return [1 / (int(prompt) - 4) for prompt in prompts]

    scorers = [
        FunctionScorer(mean_of_batch),
        RewardModelScorer(reward_model_dir, batch_size=2),
        PairwiseScorer(unsure),
    ]
    scorers[1].model.to("cpu")
    seen = {
        "scored": score_rows(rows, scorers, [1.0, 0.5, 2.0], batch_size=3),
        "games": score_rows(rows, scorers[2:], batch_size=3),
        "kept": score_rows(rows, scorers, [1.0, 0.5, 2.0], batch_size=3, folder=Path(folder) / "kept"),
        "counts": [getattr(scorer, "counts", {}) for scorer in scorers],
    }
    try:
        score_rows(rows, [FunctionScorer(fails_on_the_second_process)], batch_size=3)
    except RuntimeError as error:
        seen["error"] = str(error)
    seen["world"] = state.num_processes
    (Path(folder) / f"process-{state.num_processes}-{state.process_index}.json").write_text(json.dumps(seen))


def test_two_processes_score_exactly_as_one(reward_model_dir, tmp_path):
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # as there, so that sums are made in the same order
        work(tmp_path, reward_model_dir, PartialState())
    finally:
        torch.set_num_threads(num_threads)
    (place,) = (tmp_path / "kept").iterdir()
    portions = {file.name: file.stat().st_mtime_ns for file in sorted(place.glob("0*.json"))}
    (place / "00001.json").unlink()  # two processes go on with what one has begun
    (place / "00002.json").unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = warm.run(
        [*command, __file__, str(tmp_path), reward_model_dir],
        env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    alone, first, second = (json.loads(file.read_text()) for file in sorted(tmp_path.glob("process-*.json")))
    assert (alone["world"], first["world"], second["world"]) == (1, 2, 2)
    assert "on another process (process 1, RuntimeError: The reward function 'fails_on" in first["error"]
    assert second["error"].startswith("The reward function 'fails_on_the_second_process' raised ZeroDivisionError")
    for name in ("scored", "games", "kept", "counts"):
        assert alone[name] == first[name] == second[name], name
    assert len(alone["scored"]) == 11 and alone["counts"][2]["games"] == 3 * sum(i % 5 for i in range(11))
    assert alone["kept"] == alone["scored"] and list(portions) == [f"0000{number}.json" for number in range(4)]
    now = {file.name: file.stat().st_mtime_ns for file in sorted(place.glob("0*.json"))}
    assert [name for name in portions if portions[name] != now[name]] == ["00001.json", "00002.json"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    work(*sys.argv[1:], state)
    state.wait_for_everyone()
    state.destroy_process_group()
