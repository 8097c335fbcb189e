"""
How good a model's answers are, and whether a rising reward is bought with something else.

Perplexity under a model that is not trained and the share of different n-grams are the two figures that gave away
reward hacking in the RRHF paper (https://huggingface.co/papers/2304.05302, its online setting: reward from -1.0 to
0.3, perplexity from 15 to 64). How far a model has moved is its KL divergence from the one it started from.
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from .._trl import add_fused_lm_head
from ..data.collator import CandidateCollator
from ..data.columns import as_given
from ..data.messages import template_kwargs
from ..data.prompts import prompt_token_ids
from ..data.tokens import tokenize_candidates, without_end
from ..execution.forward import add_kl_head, score_completions
from ..execution.logits import logit_transform
from ..logps import completion_logps
from ..runtime.models import load_causal_lm, load_model_config, load_tokenizer
from ..runtime.processes import process_state


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
    model = load_causal_lm(model_name_or_path, **{**model_init_kwargs, **hub})
    add_fused_lm_head(model)

    sequences = []
    for index in range(state.process_index, len(rows), state.num_processes):
        row = as_given(rows[index])
        prompt_ids, completion_ids, _ = tokenize_candidates(
            tokenizer, row["prompt"], row["completions"], eos_token=tokenizer.eos_token, **template_kwargs(row)
        )
        are_cut = row.get("are_cut") or [False] * len(completion_ids)
        room = None if max_length is None else max(max_length - len(prompt_ids), 1)
        for number, ids in enumerate(completion_ids):
            ids = without_end(ids, tokenizer) if are_cut[number] else ids
            sequences.append(((index, number), prompt_ids, ids if room is None else ids[:room]))
    found = []
    for keys, batch in _batches(sequences, tokenizer, batch_size, model.device):
        logps = completion_logps(score_completions(model, batch).log_probs, batch["completion_mask"])
        found += zip(keys, zip(logps.sums.tolist(), logps.lengths.tolist(), strict=True), strict=True)
    by_row: list[list] = [[None] * len(row["completions"]) for row in rows]
    for (index, number), value in _from_all(found):
        by_row[index][number] = value
    return by_row


def _batches(
    sequences: list[tuple[Hashable, list[int], list[int]]], tokenizer, batch_size: int, device: torch.device
) -> Iterator[tuple[list[Hashable], dict[str, torch.Tensor]]]:
    """Keys and batch of sequences of like length, each given as its key, the prompt's tokens and the answer's."""
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    collator = CandidateCollator(pad_token_id=pad_token_id)
    sequences = sorted(sequences, key=lambda one: len(one[1]) + len(one[2]))
    for start in range(0, len(sequences), batch_size):
        chunk = sequences[start : start + batch_size]
        batch = collator(
            [
                {"prompt_ids": prompt_ids, "completion_ids": [ids], "scores": [0.0], "target_index": 0}
                for _, prompt_ids, ids in chunk
            ]
        )
        yield [key for key, *_ in chunk], {name: value.to(device) for name, value in batch.items()}


def _from_all(found: list) -> list:
    return gather_object(found) if process_state().num_processes > 1 else found


@dataclass(frozen=True)
class SampledAnswer:
    """
    An answer's tokens under two models.

    Attributes:
        fixed_logp (`float`): log-likelihood under the fixed model, in nats.
        kl (`float`): estimate of KL(model || fixed model) in nats, at least 0; see [`score_sampled`].
    """

    fixed_logp: float
    kl: float


@torch.no_grad()
def score_sampled(
    model_name_or_path: str | Path,
    fixed_model: str | Path,
    rows: Sequence[dict[str, Any]],
    *,
    batch_size: int = 32,
    trust_remote_code: bool = False,
    **model_init_kwargs,
) -> list[SampledAnswer]:
    """
    Likelihood of sampled answers under a fixed model, and the divergence from it of the model that gave them; split
    over the processes of the run.

    The tokens are those that were sampled; no text is tokenised again. The estimate of the divergence adds up, over an
    answer's tokens, the divergence of the next-token distributions:

        KL = sum over t of KL( p(. | x, y_<t) || q(. | x, y_<t) ),    y sampled from p at temperature 1

    Its mean over answers is without bias. It cannot be negative, and its variance is at most that of
    log p(y | x) - log q(y | x) (https://huggingface.co/papers/2504.10637).

    Args:
        model_name_or_path (`str` or `Path`): p, the model that gave the answers. Both models are in memory at once.
        fixed_model (`str` or `Path`): q; has the same tokens, see [`has_same_tokens`].
        rows (`Sequence[dict]`): with `prompt` and `token_ids`, as [`~trl_ext.sampling.candidates.sample_candidates`]
            gives them for one answer to each prompt, sampled at temperature 1 without filters.
        batch_size (`int`, defaults to 32): answers per forward.
        trust_remote_code (`bool`, defaults to `False`): as in transformers.
        model_init_kwargs: for loading the models.

    Returns:
        `list[SampledAnswer]`: one for each row, the same on all processes.
    """
    state = process_state()
    hub = {"revision": model_init_kwargs.get("revision") or "main", "trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(model_name_or_path, **hub)
    fixed = load_causal_lm(fixed_model, **{**model_init_kwargs, **hub})
    add_fused_lm_head(fixed)
    model = None  # where it is the fixed model, the divergence is 0
    if str(model_name_or_path) != str(fixed_model):
        model = load_causal_lm(model_name_or_path, **{**model_init_kwargs, **hub})
        add_fused_lm_head(model)
        add_kl_head(model, fixed.get_output_embeddings)
        add_kl_head(fixed)
    mine = range(state.process_index, len(rows), state.num_processes)
    sequences = [(i, prompt_token_ids(tokenizer, rows[i]), rows[i]["token_ids"][0]) for i in mine]
    found = []
    for keys, batch in _batches(sequences, tokenizer, batch_size, fixed.device):
        scored = batch["completion_mask"][:, 1:].bool()
        kl = torch.zeros(len(keys), device=fixed.device)
        if model is None:
            output = score_completions(fixed, batch)
        else:
            output = score_completions(fixed, batch, hidden_mask=scored)
            per_token = score_completions(model, batch, hidden_mask=scored, reference_hidden=output.hidden_states).kl
            kl.index_add_(0, scored.nonzero()[:, 0], per_token.clamp(min=0))  # below 0 by rounding alone
        logps = completion_logps(output.log_probs, batch["completion_mask"])
        found += zip(keys, zip(logps.sums.tolist(), kl.tolist(), strict=True), strict=True)
    return [SampledAnswer(*value) for _, value in sorted(_from_all(found))]


def has_same_tokens(model_name_or_path: str | Path, other: str | Path, **hub) -> bool:
    """Whether two models are of one architecture and give their probabilities to the same tokens."""
    configs = [load_model_config(name, **hub).get_text_config() for name in (model_name_or_path, other)]
    first, second = ((one.model_type, one.vocab_size, logit_transform(one)) for one in configs)
    return first == second and (
        load_tokenizer(model_name_or_path, **hub).get_vocab() == load_tokenizer(other, **hub).get_vocab()
    )


def perplexity(logps: Sequence[tuple[float, int]]) -> float:
    """exp of minus the mean log-probability per token, over all answers together."""
    return math.exp(-sum(total for total, _ in logps) / max(sum(length for _, length in logps), 1))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """
    Share of different n-grams among all n-grams of the answers, 0 to 1; NaN where no answer has n words.

    Args:
        texts (`Sequence[str]`): the answers.
        n (`int`): words per n-gram.
    """
    grams = [tuple(words[start : start + n]) for words in map(str.split, texts) for start in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan
