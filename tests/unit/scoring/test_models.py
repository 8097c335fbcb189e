"""Reward models: the same scores however they are batched, and those that are refused."""

import json
import logging

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification

from tests.support.scoring import CANDIDATES, chat, save_reward_model
from trl_ext.scoring.functions import ScoringError
from trl_ext.scoring.models import RewardModelScorer
from trl_ext.scoring.score import score_rows


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
    with pytest.raises(ValueError, match=r"must have num_labels=1, got num_labels=2 \(architecture: LlamaForSequence"):
        RewardModelScorer(two)
    with pytest.raises(ValueError, match=r"\(architecture: LlamaForCausalLM\).* compares two answers is a judge"):
        RewardModelScorer(model_dir)
    headless = save_reward_model(tmp_path / "headless", architecture=LlamaForCausalLM)
    config = json.loads((headless / "config.json").read_text())
    (headless / "config.json").write_text(json.dumps({**config, "num_labels": 1}))
    with pytest.raises(ValueError, match=r"lacks score.weight of .* fills them with random numbers"):
        RewardModelScorer(headless)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"got the PEFT adapter .*Merge it into its base model"):
        RewardModelScorer(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match=r"'nobody/nothing' could not be loaded: .* a function is written"):
        RewardModelScorer("nobody/nothing")
    with pytest.raises(ValueError, match=r"at most the 128 positions of .*tiny-rm, got 129. Lower it"):
        RewardModelScorer(reward_model_dir, max_length=129)


def test_a_model_that_gives_nan_is_caught(reward_model_dir):
    scorer = RewardModelScorer(reward_model_dir, dtype="float32")
    scorer.model.score.weight.data[:] = float("nan")
    with pytest.raises(
        ScoringError, match=r"'tiny-rm': row 2, completion 3: must give a finite number, got nan. Try dtype"
    ):
        scorer(CANDIDATES)
