"""Several scorers over whole data: sums by hand, and errors that name the row."""

import pytest

from tests.support.rewards import length_reward
from tests.support.scoring import CANDIDATES
from trl_ext.scoring.functions import FunctionScorer, ScoringError
from trl_ext.scoring.score import combine, score_rows


def test_sums_are_weighted_and_none_counts_as_nothing():
    assert combine([[1.0, None, 2.0], [None, 3.0, 0.5]], [2.0, -1.0]) == [2.0, -3.0, 3.5]
    with pytest.raises(ScoringError, match=r"completion 1: one of the reward functions must return"):
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
    with pytest.raises(ScoringError, match=r"Scoring: row 2, completion 1: one of the reward functions must return"):
        score_rows(CANDIDATES, [never_for_nothing], batch_size=2)


def test_errors_name_the_row_of_the_whole_data():
    rows = [{"prompt": str(index), "completions": ["x", "y"]} for index in range(7)]
    scorer = FunctionScorer(lambda prompts, **kwargs: [float("nan") if p == "5" else 0 for p in prompts], "reward")
    with pytest.raises(ScoringError, match="row 5, completion 0"):
        score_rows(rows, [scorer], batch_size=2)


def test_errors_of_whole_data_name_the_prompt():
    scorer = FunctionScorer(lambda prompts, **kwargs: [None for _ in prompts], "nothing")
    with pytest.raises(ScoringError, match="row 0, completion 0: one of .* The prompt is 'What is 2"):
        score_rows(CANDIDATES, [scorer])
    with pytest.raises(RuntimeError, match="first of which is 'Go on") as caught:
        score_rows([*CANDIDATES[:2] * 2, CANDIDATES[2]], [FunctionScorer(raises_on_the_third, "r")], batch_size=2)
    assert caught.value.__notes__ == ["Rows 4 to 4 were being scored."]


def raises_on_the_third(prompts, **kwargs):
    return [1 / (prompt != CANDIDATES[2]["prompt"]) for prompt in prompts]


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
    with pytest.raises(ValueError, match="There must be rows of candidates"):
        score_rows([], [scorer])
    with pytest.raises(ValueError, match=r"must be one or more with different names, got \['length_reward', '"):
        score_rows(CANDIDATES, [scorer, scorer])
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        score_rows(CANDIDATES, [scorer], batch_size=0)
