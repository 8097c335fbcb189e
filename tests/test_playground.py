"""The playground: its data, its judge, and that a model really learns on it."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from trl_ext.playground import (
    Comparison,
    Playground,
    answer_logps,
    build_playground,
    byte_level_tokenizer,
    load_model,
    number_to_words,
    sample_answers,
    save_byte_level_model,
)

TINY = {"num_sft": 256, "num_prompts": 24, "num_candidates": 4, "num_held_out": 16, "max_digits": 3}


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (20, "twenty"),
        (99, "ninety-nine"),
        (100, "one hundred"),
        (101, "one hundred and one"),
        (2340, "two thousand three hundred and forty"),
        (42007, "forty-two thousand and seven"),
        (999999, "nine hundred and ninety-nine thousand nine hundred and ninety-nine"),
    ],
)
def test_number_words(number, words):
    assert number_to_words(number) == words


def test_every_number_has_words_of_its_own():
    assert len({number_to_words(number) for number in range(100_000)}) == 100_000


def test_splits_do_not_overlap_and_follow_from_the_seed():
    playground, same, other = Playground(seed=1, **TINY), Playground(seed=1, **TINY), Playground(seed=2, **TINY)
    splits = [playground.prompts(split) for split in ("sft", "train", "held_out")]
    assert [len(split) for split in splits] == [256, 24, 16]
    assert len(set().union(*splits)) == 256 + 24 + 16
    assert playground.prompts("train") == same.prompts("train") != other.prompts("train")


def test_scores():
    playground = Playground(**TINY)
    prompt = playground.prompts("train")[0]
    right = playground.answer(prompt)
    assert playground.score(prompt, right) == 1
    assert playground.score(prompt, right + "0") <= 0.5 and playground.score(prompt, "") == 0
    assert playground.score(prompt, right[:-1] + "x") > playground.score(prompt, "x" * len(right)) == 0


def test_pairs_prefer_better_answers_and_leave_out_undecided_prompts():
    playground = Playground(pairs_per_prompt=2, **TINY)
    first, second = playground.prompts("train")[:2]
    right = playground.answer(first)
    candidates = [
        {"prompt": first, "completions": [right, "x", right, "y", " "], "scores": [1.0, 0.0, 1.0, 0.2, 0.0]},
        {"prompt": second, "completions": ["a", "b"], "scores": [0.0, 0.0]},
    ]
    rows = list(playground.preference_dataset(candidates))
    assert {row["prompt"] for row in rows} == {first} and {row["chosen"] for row in rows} == {right}
    assert sorted(row["rejected"] for row in rows) == ["x", "y"]


def test_tokenizer_gives_one_token_per_byte_and_comes_back(tmp_path):
    tokenizer = byte_level_tokenizer()
    text = "naïve – 数字\n42"
    assert len(tokenizer(text)["input_ids"]) == len(text.encode())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_prompt_is_a_prefix_of_the_whole_conversation():
    tokenizer = byte_level_tokenizer()
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": "a"}], tokenize=False)
    assert whole == start + "a<|im_end|>"


def test_sampling_is_reproducible_and_leaves_the_global_random_state_alone(model_dir):
    model, tokenizer = load_model(model_dir)
    prompts = ["a", "much longer prompt", "bb"]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = sample_answers(model, tokenizer, prompts, num_answers=3, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == sample_answers(model, tokenizer, prompts, num_answers=3, seed=5)
    assert first != sample_answers(model, tokenizer, prompts, num_answers=3, seed=6)
    assert [len(texts) for texts in first] == [3, 3, 3]


def test_answer_logps_equal_the_slow_sum(model, model_dir):
    from tests.reference import sequence_logp

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prompts, answers = ["one ", "two and more "], ["1", "22"]
    expected = [
        sequence_logp(model, tokenizer(p)["input_ids"], tokenizer(a + tokenizer.eos_token)["input_ids"]).item()
        for p, a in zip(prompts, answers, strict=True)
    ]
    assert answer_logps(model, tokenizer, prompts, answers).tolist() == pytest.approx(expected, rel=1e-5)


def test_comparison_counts_wins_among_decided():
    comparison = Comparison(
        prompts=["p"] * 5, right_answers=["1"] * 5, sft_answers=["1", "x", "x", "x", "1"],
        trained_answers=["1", "1", "1", "x", "xy"], sft_scores=[1, 0, 0, 0, 1], trained_scores=[1, 1, 1, 0, 0],
        kl_to_sft=0.5,
    )  # fmt: skip
    metrics = comparison.metrics()
    assert metrics["playground/win_rate"] == pytest.approx(2 / 3) and metrics["playground/num_decided"] == 3
    # Wilson's interval for 2 of 3 at 95 %
    assert metrics["playground/win_rate_low"] == pytest.approx(0.2077, abs=1e-3)
    assert metrics["playground/win_rate_high"] == pytest.approx(0.9385, abs=1e-3)
    assert metrics["playground/accuracy_before"] == 0.4 and metrics["playground/accuracy_after"] == 0.6
    json.dumps(metrics)


def test_model_against_itself_is_undecided_half_and_has_no_divergence(model_dir):
    comparison = Playground(**TINY).evaluate(model_dir, model_dir)
    assert comparison.kl_to_sft == pytest.approx(0, abs=1e-4)
    comparison.print("itself")


def test_build_learns_keeps_and_takes_up_what_is_done(tmp_path):
    playground = Playground(**TINY)
    sft, candidates = build_playground(playground, tmp_path)
    assert len(candidates) == 24 and all(len(row["completions"]) == len(row["scores"]) == 4 for row in candidates)
    untrained = save_byte_level_model(tmp_path / "fresh", max_position_embeddings=256, seed=playground.seed)
    prompts = playground.prompts("held_out")
    answers = [playground.answer(prompt) for prompt in prompts]
    before, after = (answer_logps(*load_model(path), prompts, answers).mean() for path in (untrained, sft))
    assert after > before + 5, "the SFT model gives right answers to unseen prompts more probability"

    stamp = (sft / "model.safetensors").stat().st_mtime_ns
    assert build_playground(playground, tmp_path, reuse=True)[1] == candidates
    assert (sft / "model.safetensors").stat().st_mtime_ns == stamp

    state = json.loads((tmp_path / "playground.json").read_text())
    (tmp_path / "playground.json").write_text(json.dumps({**state, "stages": ["sft"]}))  # as if killed while sampling
    assert build_playground(playground, tmp_path, reuse=True)[1] == candidates
    assert (sft / "model.safetensors").stat().st_mtime_ns == stamp

    with pytest.raises(ValueError, match=r"made with other settings \(num_candidates\). Use the same settings"):
        build_playground(Playground(**{**TINY, "num_candidates": 5}), tmp_path, reuse=True)
