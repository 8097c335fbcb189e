"""
How good a model's answers are, and whether a rising reward is bought with something else.

Perplexity under a model that is not trained and the share of different n-grams are the two figures that gave away
reward hacking in the RRHF paper (https://huggingface.co/papers/2304.05302, its online setting: reward from -1.0 to
0.3, perplexity from 15 to 64).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from ._trl import add_fused_lm_head
from .collators import CandidateCollator
from .data import template_kwargs, tokenize_candidates, without_end
from .execution.forward import score_completions
from .logps import completion_logps
from .sampling import load_causal_lm, load_tokenizer, process_state


@torch.no_grad()
def answer_logps(
    model_name_or_path: str | Path,
    rows: Sequence[dict[str, Any]],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    trust_remote_code: bool = False,
    **model_init_kwargs,
) -> list[list[tuple[float, int]]]:
    """
    Log-likelihood of completions under a model, split over the processes of the run.

    Args:
        model_name_or_path (`str` or `Path`): a model with its tokenizer, or an adapter.
        rows (`Sequence[dict]`): with `prompt` and `completions`, text or messages; `tools` and `chat_template_kwargs`
            go to the chat template, as in training. A completion whose entry in `are_cut` is true was ended by its
            length alone, and gets no end token.
        batch_size (`int`, defaults to 32): completions per forward.
        max_length (`int`, *optional*): completions are cut there, as in training, prompt included.
        trust_remote_code (`bool`, defaults to `False`): as in transformers.
        model_init_kwargs: for loading the model.

    Returns:
        `list[list[tuple[float, int]]]`: for each completion of each row the sum over its tokens, in nats, and their
        number. An end token counts, as in training. The same on all processes.
    """
    state = process_state()
    hub = {"revision": model_init_kwargs.get("revision") or "main", "trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(model_name_or_path, **hub)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = load_causal_lm(model_name_or_path, **{**model_init_kwargs, **hub})
    add_fused_lm_head(model)
    collator = CandidateCollator(pad_token_id=tokenizer.pad_token_id)

    prepared = []
    for index in range(state.process_index, len(rows), state.num_processes):
        row = rows[index]
        prompt_ids, completion_ids, _ = tokenize_candidates(
            tokenizer, row["prompt"], row["completions"], eos_token=tokenizer.eos_token, **template_kwargs(row)
        )
        are_cut = row.get("are_cut") or [False] * len(completion_ids)
        room = None if max_length is None else max(max_length - len(prompt_ids), 1)
        for number, ids in enumerate(completion_ids):
            ids = without_end(ids, tokenizer) if are_cut[number] else ids
            prepared.append((index, number, prompt_ids, ids if room is None else ids[:room]))
    prepared.sort(key=lambda one: len(one[2]) + len(one[3]))
    found = []
    for start in range(0, len(prepared), batch_size):
        chunk = prepared[start : start + batch_size]
        batch = collator(
            [
                {"prompt_ids": prompt_ids, "completion_ids": [ids], "scores": [0.0], "reference_index": 0}
                for _, _, prompt_ids, ids in chunk
            ]
        )
        batch = {key: value.to(model.device) for key, value in batch.items()}
        logps = completion_logps(score_completions(model, batch).log_probs, batch["completion_mask"])
        values = zip(logps.sums.tolist(), logps.lengths.tolist(), strict=True)
        found += [(index, number, value) for (index, number, _, _), value in zip(chunk, values, strict=True)]
    if state.num_processes > 1:
        found = gather_object(found)
    by_row: list[list] = [[None] * len(row["completions"]) for row in rows]
    for index, number, value in found:
        by_row[index][number] = value
    return by_row


def perplexity(logps: Sequence[tuple[float, int]]) -> float:
    """exp of minus the mean log-probability per token, over all answers together."""
    return math.exp(-sum(total for total, _ in logps) / max(sum(length for _, length in logps), 1))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """
    Share of different n-grams among all n-grams of the answers, 0 to 1; 0 without any.

    Args:
        texts (`Sequence[str]`): the answers.
        n (`int`): words per n-gram.
    """
    grams = [tuple(words[start : start + n]) for words in map(str.split, texts) for start in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
