"""Reward functions: what they get, which numbers they may give, and how they are found."""

import sys

import numpy as np
import pytest
import torch

from tests.support.scoring import CANDIDATES, chat
from trl_ext.scoring.functions import FunctionScorer, ScoringError, load_reward_function


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
        ([1.0], ValueError, r"'reward' must return one entry for each of 5 completions, got 1"),
        (0.5, TypeError, r"'reward' must return a list .*, got float \(0.5\)"),
        ([0, 0, 0, 0, "1"], ScoringError, r"'reward': row 1, completion 1: must return a finite number, got '1'"),
        (
            [0, float("nan"), 0, 0, 0],
            ScoringError,
            r"'reward': row 0, completion 1: must return a finite number, got nan",
        ),
        ([0, 0, 0, np.inf, 0], ScoringError, r"row 1, completion 0: must return a finite number, got inf"),
        ([[0]] * 5, ScoringError, r"row 0, completion 0: must return a finite number, got \[0\]"),
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
        TypeError, match=r"'reward' must take the arguments prompts, completions, answer: got an unexp"
    ):
        FunctionScorer(lambda prompts, completions: [], "reward")(CANDIDATES)
    with pytest.raises(TypeError, match=r"missing a required argument: 'solution'. Rename the columns"):
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
        ("rewards.py:", ValueError, "must be 'package.module:function' or .*, got 'rewards.py:'"),
        ("missing.py:f", FileNotFoundError, "the file .*missing.py does not exist"),
        ("rewards.py:righ", ImportError, "has no 'righ'. Correct the name"),
        ("rewards.py:rule", ImportError, "Did you mean rules?"),
        ("rewards.py:number", TypeError, "must be a function, got int"),
        ("rewards.py:Rules", TypeError, "must be a function, got a class. Make an object"),
        ("nowhere.at_all:f", ImportError, "the module 'nowhere' is neither on the Python path nor"),
        ("broken:f", ImportError, "the module broken needs 'nothing_of_this_name', which is not installed"),
        ("failing.py:f", ImportError, "importing .*failing.py raised ZeroDivisionError"),
        ("failing:f", ImportError, "importing the module failing raised ZeroDivisionError"),
    ]:
        with pytest.raises(error, match=message):
            load_reward_function(spec)
