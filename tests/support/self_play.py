"""Self-play on a few rows."""

import json

import torch
from safetensors.torch import load_file

from tests.support.data import PAIRS

ROWS = [
    {"prompt": f"{row['prompt']}{number} ", "completion": row["chosen"], "note": number}
    for number in range(3)
    for row in PAIRS
]


def manifest(output, *stage):
    return json.loads(output.joinpath(*stage, "manifest.json").read_text())


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(folder, other, exactly=True):
    expected, found = weights(folder), weights(other)
    for name, weight in expected.items():
        if exactly:
            assert torch.equal(found[name], weight), name
        else:
            torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)
