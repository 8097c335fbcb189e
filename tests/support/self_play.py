"""Self-play on a few rows."""

import json
import os

import torch
from safetensors.torch import load_file

from tests.support import warm
from tests.support.data import PAIRS, REPOSITORY

ROWS = [
    {"prompt": f"{row['prompt']}{number} ", "completion": row["chosen"], "note": number}
    for number in range(3)
    for row in PAIRS
]


def run(arguments, expect_failure=False, hash_seed=0):
    environment = {
        **os.environ,
        "PYTHONHASHSEED": str(hash_seed),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "DS_ACCELERATOR": "cpu",
    }
    done = warm.run(arguments, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert (done.returncode != 0) == expect_failure, done.stdout[-4000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


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
