"""Rows that tests share, and where files are."""

import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
REWARDS = REPOSITORY / "tests" / "support" / "rewards.py"
PAIRS = [
    {"prompt": "What is 2 + 2? ", "chosen": "4", "rejected": "22, I should think"},
    {"prompt": "Capital of France: ", "chosen": "Paris", "rejected": "Lyon"},
    {"prompt": "Opposite of up? ", "chosen": "Down it is.", "rejected": "Up"},
    {"prompt": "Say yes. ", "chosen": "yes", "rejected": "no no no"},
    {"prompt": "Colour of grass? ", "chosen": "Green, mostly", "rejected": "Blue"},
    {"prompt": "One word. ", "chosen": "word", "rejected": "two words"},
    {"prompt": "Bye! ", "chosen": "Good bye", "rejected": "Hello"},
    {"prompt": "7 times 6? ", "chosen": "42", "rejected": "13"},
]


def real_data(name: str) -> Path:
    """A file of real data next to the checkout; the test skips where there is none."""
    path = REPOSITORY.parent / "shared" / "data" / name
    if not path.is_file():
        pytest.skip(f"real data {name} is not here")
    return path


def read_jsonl(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


WORDS = ["no", "yes it is", "42", "perhaps so", "certainly not", "ask again", "x", "a rather long answer"]
# one row for each K from 1 to 8: all different, with ties, and all equal
LISTS = [
    {"prompt": f"{k} to rank? ", "completions": WORDS[:k], "scores": scores}
    for k, scores in enumerate(
        [
            [0.3],
            [0.2, 0.7],
            [0.5, 0.5, 0.5],
            [0.9, 0.1, 0.9, 0.4],
            [-1.0, -2.0, -0.5, -4.0, -3.0],
            [1.0, 0.0, 1.0, 0.0, 1.0, 0.0],
            [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0],
            [0.1, 0.8, 0.3, 0.8, 0.2, 0.0, 0.6, 0.3],
        ],
        start=1,
    )
]


TINY = {"num_sft": 256, "num_prompts": 24, "num_held_out": 16, "max_digits": 3}
# targets of their own for these pairs
REFERENCES = ["four", PAIRS[1]["rejected"], "It is down.", "yes", "nay", "word", "ta ta", "forty-two"]
