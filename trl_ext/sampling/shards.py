"""Shards of candidates: finished ones are kept and read again when a run is resumed."""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..runtime.files import checksum, read_sealed, sealed, write_atomically
from ..runtime.fingerprints import model_fingerprint
from ..runtime.processes import all_gather_objects, process_state, read_when_there
from ..runtime.settings import changes
from .config import VLLM_ARGS_WITHOUT_EFFECT, WITHOUT_EFFECT, SamplingConfig

MOST_PROMPTS_PER_SHARD = 64


def _shards(rows: Sequence[dict[str, Any]], shard_size: int) -> list[list[int]]:
    """Row numbers by shard: prompts of like length together, the longest first, as they take the longest."""
    by_length = sorted(range(len(rows)), key=lambda index: (-_text_length(rows[index]["prompt"]), index))
    return [by_length[start : start + shard_size] for start in range(0, len(rows), shard_size)]


def _text_length(prompt: str | list) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(str(message.get("content"))) for message in prompt)


def _shard_file(folder: Path, number: int) -> Path:
    return folder / "shards" / f"{number:05d}.jsonl"


def _shard(records: list[dict], made_of: str) -> str:
    """A line for each record, and one with a hash over them and what they are made of."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    return lines + json.dumps({"digest": hashlib.sha256(f"{made_of}\n{lines}".encode()).hexdigest()}) + "\n"


def _read_shard(file: Path, made_of: str) -> list[dict]:
    """
    Raises:
        ValueError: it was changed or damaged since it was written, or was sampled from something else.
    """
    try:
        text = read_when_there(file)
        records = [json.loads(line) for line in text.splitlines()][:-1]
        if text == _shard(records, made_of):
            return records
        what = "does not match its digest: it was changed, or sampled with other settings"
    except FileNotFoundError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        what = f"cannot be read ({' '.join(str(error).split())[:200]})"
    raise ValueError(f"{file} {what}. Restore it, or remove it to sample its prompts again.")


def _check_identity(
    folder: Path, model_name_or_path, rows, config: SamplingConfig, tokenizer, shard_size, dtype: str, revision: str
) -> tuple[int, str]:
    """
    Write down what the candidates in `folder` are made of; refuse a folder that is made of something else.

    Returns:
        `tuple`: prompts per shard, and a hash over what they are made of.
    """
    state, file, problem, made_of = process_state(), folder / "sampling.json", None, ""
    if state.is_main_process:
        try:
            found = read_sealed(file, {"shard_size": int}) if file.exists() else {}
        except ValueError as error:
            found, problem = {}, f"{error} Remove {folder} to sample again, or choose another folder."
        shard_size = shard_size or found.get("shard_size") or _default_shard_size(len(rows), state.num_processes)
        prompts = [[row["prompt"], row.get("tools"), row.get("chat_template_kwargs")] for row in rows]
        is_local = os.path.isdir(model_name_or_path)
        identity = {
            "model": model_fingerprint(model_name_or_path) + ("" if is_local else f"@{revision}"),
            "prompts": hashlib.sha256(json.dumps(prompts, default=str).encode()).hexdigest(),
            "chat_template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
            "dtype": dtype,
            "shard_size": shard_size,
            **_identity_of(config),
        }
        identity = json.loads(json.dumps(identity))  # a tuple is a list there
        if problem is not None:
            pass
        elif found:
            changed = changes(found, identity, _identity_of(SamplingConfig()).get)
            if changed:
                problem = (
                    f"{folder} holds candidates that were sampled with other settings: {changed}. Restore the "
                    "settings, or choose another folder."
                )
        else:
            write_atomically(file, sealed(identity))
        # of what is written there: shards from before an option was added have a hash without it
        made_of = checksum(found or identity)
    problem, shard_size, made_of = all_gather_objects((problem, shard_size, made_of))[0]  # the main process's
    if problem is not None:
        raise FileExistsError(problem)
    return shard_size, made_of


def _identity_of(config: SamplingConfig) -> dict[str, Any]:
    """The settings that candidates depend on."""
    settings = {name: value for name, value in asdict(config).items() if name not in WITHOUT_EFFECT}
    vllm_args = {n: v for n, v in (config.vllm_args or {}).items() if n not in VLLM_ARGS_WITHOUT_EFFECT}
    return {**settings, "vllm_args": vllm_args}


def _default_shard_size(num_prompts: int, num_processes: int) -> int:
    """So that all processes have equally many, and no fuller ones than need be: a shard is one batch or several."""
    shards_per_process = math.ceil(num_prompts / (num_processes * MOST_PROMPTS_PER_SHARD))
    return math.ceil(num_prompts / (num_processes * shards_per_process))
