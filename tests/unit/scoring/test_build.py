"""Scorers by name, and what is refused before anything is loaded."""

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from tests.support.rewards import longer_is_better
from tests.support.scoring import CANDIDATES, save_reward_model
from trl_ext.scoring.build import build_scorers, check_scorers
from trl_ext.scoring.config import ScorerConfig
from trl_ext.scoring.functions import FunctionScorer
from trl_ext.scoring.models import RewardModelScorer
from trl_ext.scoring.score import score_rows
from trl_ext.scoring.tournament import PairwiseScorer


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
        (([],), ValueError, "`rewards` or a judge must be given, got neither"),
        ((specs[:1] * 2,), ValueError, "must be named once"),
        ((["missing.module:f"], [1, 2]), ValueError, r"one for each of 1 scorers \(missing.module:f\), got 2"),
        ((specs[:1], [float("nan")]), ValueError, "The weight of .* must be a finite number, got nan"),
        ((["./nowhere"],), FileNotFoundError, "got './nowhere', which is not there"),
        ((["rewards.py"],), ValueError, "got the file 'rewards.py'. Write 'rewards.py:function'"),
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
        ((function, [1, 2]), {}, ValueError, "must hold one for each of 1 scorers .*, got 2"),
        ((function, [0]), {}, ValueError, "`weights` must not all be 0"),
        (((), [1]), {"judge": judge}, ValueError, r"must not be given where the judge .* scores alone, got 1"),
        ((function, [1, -1]), {"judge": judge}, ValueError, "weight of the judge .* must be positive, got -1"),
        ((), {}, ValueError, "`rewards` or a judge must be given, got neither"),
        ((needs,), {"columns": ["answer"]}, TypeError, "r.py:needs' must take the .* prompts, completions, answer: "),
        ((), {"judge": needs}, TypeError, "The judge .*missing a required argument: 'solution'"),
        ((str(tmp_path / "none"),), {}, FileNotFoundError, "The reward must be .*, got .*, which is not there"),
        ((), {"judge": str(tmp_path / "none")}, FileNotFoundError, "The judge must be .*, got .*, which is not there"),
        ((two,), {}, ValueError, "must have num_labels=1, got num_labels=2"),
        ((model_dir,), {}, ValueError, "compares two answers is a judge"),
        ((), {"judge": reward_model_dir}, ValueError, "must be a causal language model, got LlamaForSequenceCl"),
        ((reward_model_dir,), {"max_length": 129}, ValueError, "must be at most the 128 positions of .*, got 129"),
        ((reward_model_dir,), {"batch_size": 0}, ValueError, "`batch_size` must be at least 1, got 0"),
        ((reward_model_dir,), {"dtype": "float23"}, ValueError, "`dtype` must be .*, got 'float23'"),
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
