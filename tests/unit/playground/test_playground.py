"""The playground: its data, its judges, and that a model really learns on it."""

import pytest
from transformers import AutoTokenizer

from tests.support.data import TINY
from trl_ext.playground.model import byte_level_tokenizer
from trl_ext.playground.task import (
    TONE_SHARES,
    TONES,
    Playground,
    accuracy,
    friendly_number_reward,
    is_polite,
    number_to_words,
    read_answer,
)


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


def test_examples_have_accuracy_and_the_tone_of_the_shares():
    playground = Playground(num_sft=4000, num_prompts=10, num_held_out=10, max_digits=4)
    answers = {row["prompt"]: row["answer"] for row in playground.rows("sft")}
    examples = list(playground.sft_dataset())
    tones = [read_answer(row["completion"], answers[row["prompt"]])[2] for row in examples]
    assert all(read_answer(row["completion"], answers[row["prompt"]])[0] for row in examples)
    expected = sum(share * place / (len(TONES) - 1) for place, share in enumerate(TONE_SHARES))
    assert sum(tones) / len(tones) == pytest.approx(expected, abs=0.02) and sum(TONE_SHARES) == pytest.approx(1)
    row = playground.rows("train", reference=True)[0]
    assert row["reference"].split(" ")[0] == row["answer"] and row["reference"].split(" ")[1] in TONES


@pytest.mark.parametrize(
    ("text", "reward", "right", "polite"),
    [
        ("42007 hooray", 1.0, 1, 1),
        ("42007 ugh", 0.5, 1, 0),
        ("42007 meh", 0.5 + 0.5 / 7, 1, 0),
        ("42007", 0.5, 1, 1),
        ("42007 hoorayhooray", 0.5, 1, 1),  # not one of the words
        ("42008 hooray", 0.5 * 0.5 * 0.8 + 0.5, 0, 1),  # four of five digits
        ("x hooray", 0.5, 0, 1),
        ("", 0.0, 0, 1),
    ],
)
def test_rewards_by_hand(text, reward, right, polite):
    assert friendly_number_reward([text], ["42007"], prompts=["p"]) == [pytest.approx(reward)]
    assert accuracy([text], ["42007"]) == [right] and is_polite([text]) == [polite]


def test_examples_of_sft_go_on_over_all_of_them():
    playground = Playground(**TINY)
    every = sorted(playground.prompts("sft"))
    first, second = (playground.sft_examples(place, 256)["prompt"][:] for place in (0, 256))
    assert sorted(first) == sorted(second) == every and first != second
    parts = [playground.sft_examples(place, 100)["prompt"][:] for place in range(0, 500, 100)]
    assert [prompt for part in parts for prompt in part] == [*first, *second][:500]
