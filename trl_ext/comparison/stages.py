"""The stages of a comparison."""

import importlib.util
import json
import os
import resource
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState

from ..runs.evaluation_stage import evaluation_stage
from ..runtime.files import write_atomically
from ..runtime.jsonl import read_jsonl, write_jsonl
from ..scoring.pairs import pair_rows
from ..scoring.score_report import CARRIED_COLUMNS

# what a method's config.yaml has beside its options
NAMED = ("model_name_or_path", "dataset_name", "output_dir")


def train_stage(folder: Path, *, model: Path, data: Path, recipe: Path, values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's own training."""
    named = {**values, **dict(zip(NAMED, (str(model), str(data), str(folder)), strict=True))}
    content = yaml.safe_dump(named, sort_keys=False)
    if os.environ.get("RANK", "0") == "0":  # Accelerate's state is the trainer's to make
        write_atomically(folder / "config.yaml", content)
    spec = importlib.util.spec_from_file_location(f"trl_ext_recipe_{recipe.stem}", recipe)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with tempfile.TemporaryDirectory() as own:  # each process has the file when it reads it
        file = Path(own) / "config.yaml"
        file.write_text(content, encoding="utf-8")
        results = module.train(["--config", str(file)], model=str(model), data=str(data), output_dir=str(folder))
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if entry.get("logps/chosen") is not None and "logps/rejected" in entry]
    if torch.accelerator.is_available():
        peak = torch.accelerator.memory.max_memory_allocated() / 2**20
    else:  # of the whole process, with the libraries
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {
        "updates": max(entry["step"] for entry in history),
        "seconds": results["train_runtime"],
        "num_tokens": next((entry["num_tokens"] for entry in reversed(history) if "num_tokens" in entry), None),
        "peak_memory_mib": peak,
        "prompts": results.get("train_prompts"),
        "logps": [[entry["step"], entry["logps/chosen"], entry["logps/rejected"]] for entry in logged],
    }


def pairs_stage(folder: Path, *, prompts: Path, on_playground: bool, seed: int) -> dict[str, Any]:
    """Preferences that were not sampled from the model: the dataset's, or on the playground answers of the task."""
    rows = read_jsonl(prompts)
    if on_playground:
        from ..playground.task import preference_rows

        rows = preference_rows(rows, seed)
    columns = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected", "chosen_is_cut", "rejected_is_cut",
               *CARRIED_COLUMNS)  # fmt: skip
    write_jsonl(folder / "pairs.jsonl", [{key: row[key] for key in columns if key in row} for row in rows])
    return {"num_rows": len(rows)}


def sample_rank_stage(folder: Path, *, ranked: Path) -> dict[str, Any]:
    """Scored answers without the dataset's `reference`: the best of them is the target of SLiC-HF's regulariser."""
    rows = [{key: value for key, value in row.items() if key != "reference"} for row in read_jsonl(ranked)]
    write_jsonl(folder / "ranked.jsonl", rows)
    return {"num_rows": len(rows)}


def likelihood_near_stage(folder: Path, *, ranked: Path, positive_above: float, seed: int) -> dict[str, Any]:
    """CLICK's pairs of scored answers."""
    rows = read_jsonl(ranked)
    # one pair to a prompt, as every method has one row to a prompt
    pairs, report = pair_rows(rows, "likelihood_near", seed, max_pairs_per_prompt=1, positive_above=positive_above)
    PartialState().print(str(report))
    if not pairs:
        raise ValueError(
            f"`click_threshold` must lie between the rewards of answers to one prompt, got {positive_above}: no "
            "prompt has answers on both sides."
        )
    write_jsonl(folder / "pairs.jsonl", pairs)
    return {"num_pairs": len(pairs)}


def checkpoint_evals_stage(
    folder: Path, *, model: Path, prompts: Path, steps: list[int], num_prompts: int, **evaluation: Any
) -> dict[str, Any]:
    """Reward and KL of the checkpoints of a training, on some of the held-out prompts."""
    asked = folder / "prompts.jsonl"
    write_jsonl(asked, read_jsonl(prompts)[:num_prompts])
    PartialState().wait_for_everyone()
    figures = {}
    for step in steps:
        (folder / str(step)).mkdir(exist_ok=True)
        found = evaluation_stage(folder / str(step), model=model / f"checkpoint-{step}", prompts=asked, **evaluation)
        figures[str(step)] = {"reward": found["reward"], "kl": found["kl"]}
    return figures
