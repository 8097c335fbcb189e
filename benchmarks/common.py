"""Models, batches and records that the benchmarks share. Models have random weights and a vocabulary of 32 000."""

import csv
import os
import platform
import random
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
sys.path.insert(0, str(REPOSITORY))  # the baselines are the tests'

# hidden size, layers, attention heads, key-value heads, MLP width, tied embeddings
MODELS = {
    "30M": (384, 10, 6, 6, 1024, True),
    "39M": (384, 8, 6, 6, 1024, False),
    "166M": (1024, 8, 16, 16, 2720, False),
    "0.5B": (896, 24, 14, 2, 4864, True),
    "1.5B": (1536, 28, 12, 2, 8960, True),
}


@dataclass(frozen=True)
class Shape:
    """A kind of batch: tokens of prompts and answers (shortest, longest), answers per prompt, prompts per batch."""

    name: str
    prompt: tuple[int, int]
    answer: tuple[int, int]
    k: int
    prompts: int

    def rows(self, num_batches: int, seed: int = 0) -> list[dict[str, Any]]:
        """Rows of plain text in which every character is one token; answers get an end token besides."""
        rng = random.Random(seed)

        def text(shortest, longest):
            return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(shortest, longest)))

        rows = []
        for _ in range(num_batches * self.prompts):
            prompt = text(*self.prompt)
            answers = [text(max(self.answer[0] - 1, 1), self.answer[1] - 1) for _ in range(self.k)]
            if self.k == 2:
                rows.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
            else:
                rows.append({"prompt": prompt, "completions": answers, "scores": [float(i) for i in range(self.k)]})
        return rows


def make_model(name: str, attn_implementation: str | None = None):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden_size, num_layers, num_heads, num_key_value_heads, intermediate_size, tied = MODELS[name]
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=131072,
        attn_implementation=attn_implementation,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def circumstances() -> dict[str, Any]:
    """Where and how a row was measured."""
    import torch

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": " ".join(f"{name}=={version(name)}" for name in ("torch", "transformers", "trl")),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=REPOSITORY
        ).stdout.strip(),
        "command": shlex.join(["python", *sys.argv]),
    }


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
