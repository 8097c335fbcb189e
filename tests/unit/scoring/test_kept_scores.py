"""A scoring that breaks down goes on where it was."""

import logging
import sys

import pytest

from tests.support.rewards import length_reward, longer_is_better
from tests.support.scoring import CANDIDATES, calls
from trl_ext.scoring.build import build_scorers
from trl_ext.scoring.functions import FunctionScorer
from trl_ext.scoring.score import score_rows
from trl_ext.scoring.tournament import PairwiseScorer

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
        f"What was scored before is kept in {place}. The same call resumes from there."
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
