"""What models are watched with."""

import math

import pytest
import torch

from tests.support import reference
from trl_ext.runs.evaluation import answer_logps, distinct_n, perplexity


def likelihoods(model, tokenizer, rows):
    """Sums and lengths as training has them: completions are followed by the end token; chats by the template's."""
    found = []
    for row in rows:
        values = []
        for completion in row["completions"]:
            if isinstance(row["prompt"], str):
                prompt_ids, end = tokenizer(row["prompt"])["input_ids"], [tokenizer.eos_token_id]
                completion_ids = tokenizer(completion)["input_ids"] + end
            else:
                text = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
                whole = tokenizer.apply_chat_template([*row["prompt"], *completion], tokenize=False)
                prompt_ids = tokenizer(text)["input_ids"]
                completion_ids = tokenizer(whole)["input_ids"][len(prompt_ids) :]
            with torch.no_grad():
                values.append((reference.sequence_logp(model, prompt_ids, completion_ids).item(), len(completion_ids)))
        found.append(values)
    return found


ROWS = [
    {"prompt": "a? ", "completions": ["x", "a longer one", ""]},
    {"prompt": "a much longer prompt than that? ", "completions": ["yes"]},
    {"prompt": "c ", "completions": ["p", "qq"]},
]
CHAT_ROWS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completions": [[{"role": "assistant", "content": answer}] for answer in row["completions"]],
    }
    for row in ROWS
]


@pytest.mark.parametrize("rows", [ROWS, CHAT_ROWS], ids=["plain", "chat"])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_answer_logps_equal_one_at_a_time(model, tokenizer, tmp_path, rows, batch_size):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = answer_logps(tmp_path, rows, batch_size=batch_size)
    for one, other in zip(found, likelihoods(model, tokenizer, rows), strict=True):
        assert [length for _, length in one] == [length for _, length in other]
        assert [logp for logp, _ in one] == pytest.approx([logp for logp, _ in other], rel=1e-5)


def test_perplexity_by_hand():
    # tokens of probability 1/2 and 1/8: the mean is over tokens, not over answers
    assert perplexity([(math.log(1 / 2), 1), (3 * math.log(1 / 8), 3)]) == pytest.approx(2 ** ((1 + 9) / 4))


def test_distinct_n_by_hand():
    assert distinct_n(["a b a", "b a"], 1) == 2 / 5
    assert distinct_n(["a b a", "b a"], 2) == 2 / 3  # none that goes over from one answer to the next
    assert math.isnan(distinct_n(["", "a"], 2)) and math.isnan(distinct_n([], 1))  # nothing to measure, no collapse
