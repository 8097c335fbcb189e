"""Candidates: prompts and a model in, K sampled answers per prompt out.

The text depends on the model, the settings, the seed and the prompt, and on nothing else: every candidate has random
numbers of its own, made from the seed and the prompt, so that neither the batch size nor the number of processes nor
the order of the prompts changes what is sampled. (Up to arithmetic: a batch of another shape can change a logit in its
last digits, and with it, once in about a million tokens in float32 and far more often in bfloat16, a token.)

Work is cut into shards of prompts. A finished shard is a file and is never sampled again; what a crash costs is the
shards it was in the middle of."""

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import GenerationConfig

from ..data.columns import as_given
from ..data.prompts import as_answers, mixed_in, prompt_key, prompt_token_ids
from ..data.tokens import num_repeated_start_tokens
from ..runtime.files import write_atomically
from ..runtime.models import (
    context_window,
    load_causal_lm,
    load_model_config,
    load_tokenizer,
    sampling_dtype,
    whole_model,
)
from ..runtime.processes import barrier_without_timeout, process_state, refuse_unless_all_see
from ..runtime.run_warnings import cut_answers
from .config import SamplingConfig
from .decoding import _finish
from .engine import Engine, end_token_ids
from .shards import _check_identity, _read_shard, _shard, _shard_file, _shards
from .transformers_engine import TransformersEngine

logger = logging.getLogger(__name__)


def candidate_seed(seed: int, prompt_ids: Sequence[int], occurrence: int, candidate: int) -> int:
    """
    The seed of one candidate, an integer below 2**63: from the run's seed, the prompt's tokens, how many equal prompts
    came before it, and the candidate's number.
    """
    key = json.dumps([seed, list(prompt_ids), occurrence, candidate]).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


@dataclass
class SamplingReport:
    """
    What was sampled. Shares are of all candidates sampled.

    Attributes:
        num_prompts (`int`): prompts with at least one usable candidate.
        num_candidates (`int`): candidates sampled, before anything was left out.
        num_too_long (`int`): prompts skipped, because prompt and answer would not fit into the model's window.
        num_without_candidates (`int`): prompts none of whose candidates is usable.
        empty, duplicate, truncated, cut_at_role_marker (`float`): shares of candidates that say nothing (left out);
            that repeat another one (left out, unless `keep_duplicates`); that reached `max_new_tokens`; that went on
            to speak for somebody else and were cut.
        mean_tokens (`float`): tokens per candidate.
        dtype (`str`): of the model that was sampled from.
    """

    num_prompts: int
    num_candidates: int
    num_too_long: int
    num_without_candidates: int
    empty: float
    duplicate: float
    truncated: float
    cut_at_role_marker: float
    mean_tokens: float
    dtype: str

    def __str__(self) -> str:
        lines = [
            f"sampled {self.num_candidates} candidates in {self.dtype}, {self.mean_tokens:.1f} tokens each; "
            f"{self.num_prompts} prompts have at least one",
            f"empty {self.empty:.1%}, duplicate {self.duplicate:.1%}, truncated at max_new_tokens "
            f"{self.truncated:.1%}, cut at a role marker {self.cut_at_role_marker:.1%}",
        ]
        if self.num_too_long:
            lines.append(f"{self.num_too_long} prompts skipped: with the answer they exceed the model's window")
        if self.num_without_candidates:
            lines.append(f"{self.num_without_candidates} prompts skipped: no usable candidate")
        return "\n  ".join(lines)


def sample_candidates(
    model_name_or_path: str | Path,
    rows: Sequence[dict[str, Any]],
    config: SamplingConfig,
    folder: str | Path,
    *,
    mix_in: str | Sequence[str] = (),
    keep_empty: bool = False,
    model_init_kwargs: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    shard_size: int | None = None,
    desc: str = "Sampling",
) -> tuple[list[dict[str, Any]], SamplingReport]:
    """
    Sample candidates for every prompt, split over the processes of the run, and keep them in `folder`.

    Called again on the same folder with the same model, prompts and settings, it goes on where it was interrupted,
    with any number of processes.

    Args:
        model_name_or_path (`str` or `Path`): a model with its tokenizer, or a PEFT adapter.
        rows (`Sequence[dict]`): with `prompt`, text or messages, and whatever else the scoring needs (kept). `tools`
            and `chat_template_kwargs` go to the chat template, as in training.
        config ([`SamplingConfig`]): how to sample.
        folder (`str` or `Path`): where shards are kept; all processes must see it.
        mix_in (`str` or `Sequence[str]`): columns of `rows` with further answers, a text or list of messages each
            (`"chosen"`, `"rejected"`) or a list of them (`"completions"`). They follow the sampled ones. Messages may
            repeat the prompt in front; what says nothing is left out. A true `chosen_is_cut` or the like makes
            `"length"` their end.
        keep_empty (`bool`, defaults to `False`): keep answers that say nothing, to be scored like others.
        model_init_kwargs (`dict`, *optional*): for loading the model; with vLLM only `dtype` and `revision` count.
            Without a `dtype` it is float32 on CPUs, else the checkpoint's, with either engine.
        trust_remote_code (`bool`, defaults to `False`): as in transformers.
        shard_size (`int`, *optional*): prompts per shard. By default as many as give every process of the first start
            equally many shards of at most 64 prompts; kept in the folder. It does not change what is sampled.
        desc (`str`): of the progress bar.

    Returns:
        `tuple`: rows as they came, those without a usable candidate left out, each with `completions` (`list`), and
        for each of them `logps` (its log-likelihood in nats when it was sampled, `None` for mixed-in ones),
        `num_tokens`, `ends` (`"stop"`, `"role_marker"` or `"length"`; `None` likewise) and `token_ids` (what was
        sampled, with the end token or the stop string it came to; `None` likewise), and `sources` (`"sampled"` or the
        column); and the [`SamplingReport`]. The first of equal answers is kept, with "length" as its end only if all
        of them were cut. The same on all processes.

    Raises:
        ValueError: no prompts, a column of `mix_in` is missing or has another form than the prompt, prompts that all
            exceed the model's window, or a model without an end token.
        FileExistsError: `folder` holds candidates of another model, other prompts or other settings.
        FileNotFoundError: a process does not see the folder; on all processes.
    """
    state, folder = process_state(), Path(folder)
    mix_in = [mix_in] if isinstance(mix_in, str) else mix_in
    rows = [as_given(row) for row in rows]
    _check_rows(rows, mix_in)
    if shard_size is not None and shard_size < 1:
        raise ValueError(f"`shard_size` must be at least 1, got {shard_size}.")
    hub = {
        "revision": (model_init_kwargs or {}).get("revision") or "main", "trust_remote_code": trust_remote_code
    }  # fmt: skip
    tokenizer = load_tokenizer(model_name_or_path, **hub)
    _check_end_tokens(model_name_or_path, tokenizer, **hub)
    dtype = sampling_dtype(model_name_or_path, (model_init_kwargs or {}).get("dtype"), **hub)
    model_init_kwargs = {**(model_init_kwargs or {}), "dtype": dtype}
    num_with_start = sum(num_repeated_start_tokens(tokenizer, row["prompt"]) > 0 for row in rows)
    if num_with_start and state.is_main_process:
        logger.warning(
            f"{num_with_start} of {len(rows)} prompts begin with the start token that the tokenizer adds as well. It "
            "is kept once."
        )
    shard_size, made_of = _check_identity(
        folder, model_name_or_path, rows, config, tokenizer, shard_size, dtype, hub["revision"]
    )  # fmt: skip
    refuse_unless_all_see(folder)
    shards = _shards(rows, shard_size)
    unfinished = [number for number in range(len(shards)) if not _shard_file(folder, number).exists()]
    state.wait_for_everyone()  # all processes have looked before one of them finishes a shard
    mine = unfinished[state.process_index :: state.num_processes]
    if mine:
        _sample_shards(
            mine, shards, rows, model_name_or_path, tokenizer, config, folder, made_of, model_init_kwargs, hub, desc
        )  # fmt: skip
    barrier_without_timeout()
    sampled: dict[int, dict] = {}
    for number, indices in enumerate(shards):
        records = _read_shard(_shard_file(folder, number), made_of)
        if {record["index"] for record in records} != set(indices):
            raise ValueError(
                f"{_shard_file(folder, number)} must hold the prompts of its shard, got others. Remove it."
            )
        sampled.update((record["index"], record) for record in records)
    found, report = _assemble(rows, sampled, config, mix_in, keep_empty, dtype)
    warning = cut_answers(report.truncated, config.max_new_tokens)
    if warning is not None and state.is_main_process:
        logger.warning(warning)
    return found, report


def _check_rows(rows: Sequence[dict[str, Any]], mix_in: Sequence[str]) -> None:
    if not rows:
        raise ValueError("`rows` must hold prompts, got none. Check the dataset and its split.")
    for index, row in enumerate(rows):
        prompt = row.get("prompt")
        if not isinstance(prompt, str | list) or not prompt:
            raise ValueError(
                f"Row {index}: `prompt` must be text or a list of messages, got {prompt!r:.60}. The columns are "
                f"{sorted(row)}. Rename or add one."
            )
        for column in mix_in:
            if column not in row:
                raise ValueError(
                    f"`mix_in` must name columns of the rows, got {column!r}. Row {index} has {sorted(row)}. Name "
                    "columns that hold answers, such as 'chosen' and 'rejected'."
                )
            if isinstance(prompt, str) and not all(isinstance(a, str) for a in as_answers(row[column])):
                raise ValueError(
                    f"Row {index}: {column!r}, which `mix_in` names, must be text as the prompt is, got "
                    f"{row[column]!r:.60}. Give prompt and answers the same form: all text, or all messages."
                )


def _open_engine(model_name_or_path, tokenizer, config: SamplingConfig, model_init_kwargs, hub) -> Engine:
    if config.sampling_engine == "vllm":
        from .vllm_engine import VllmEngine

        return VllmEngine(str(model_name_or_path), config, dtype=model_init_kwargs["dtype"], engine_args=hub)
    return TransformersEngine(load_causal_lm(model_name_or_path, **{**model_init_kwargs, **hub}), tokenizer, config)


def _sample_shards(
    numbers, shards, rows, model_name_or_path, tokenizer, config, folder, made_of, model_init_kwargs, hub, desc
) -> None:
    state = process_state()
    occurrences = _occurrences(rows)
    if state.is_main_process:
        logger.info(f"Sampling from {model_name_or_path} in {model_init_kwargs['dtype']} ({config.sampling_engine})")
    engine = _open_engine(model_name_or_path, tokenizer, config, model_init_kwargs, hub)
    try:
        limits = [context_window(model_name_or_path, **hub), engine.max_model_len]
        window = min((limit for limit in limits if limit is not None), default=None)
        total = sum(len(shards[number]) for number in numbers)
        with tqdm(total=total, desc=desc, unit="prompt", disable=not state.is_main_process) as progress:
            tokens, start = 0, time.perf_counter()
            for number in numbers:
                records = list(_sample_shard(shards[number], rows, occurrences, tokenizer, engine, config, window))
                write_atomically(_shard_file(folder, number), _shard(records, made_of))
                tokens += sum(sum(record["num_tokens"]) for record in records)
                progress.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
                progress.update(len(shards[number]))
    finally:
        engine.close()


def _occurrences(rows: Sequence[dict[str, Any]]) -> list[int]:
    """How many rows with the same prompt come before each."""
    seen: Counter = Counter()
    numbers = []
    for row in rows:
        key = prompt_key(row)
        numbers.append(seen[key])
        seen[key] += 1
    return numbers


def _check_end_tokens(model_name_or_path, tokenizer, *, revision: str, trust_remote_code: bool) -> None:
    """Refuse a model without an end token before its weights are loaded."""
    if tokenizer.eos_token_id is not None:
        return
    name, name_revision = whole_model(model_name_or_path, revision)
    try:
        generation_config = GenerationConfig.from_pretrained(name, revision=name_revision)
    except OSError:  # it has none of its own; then its config counts
        config = load_model_config(model_name_or_path, revision=revision, trust_remote_code=trust_remote_code)
        generation_config = GenerationConfig(eos_token_id=getattr(config.get_text_config(), "eos_token_id", None))
    end_token_ids(generation_config, tokenizer)


def _sample_shard(indices, rows, occurrences, tokenizer, engine: Engine, config, window) -> Iterator[dict]:
    prompts = {}
    for index in indices:
        try:
            prompts[index] = prompt_token_ids(tokenizer, rows[index])
        except Exception as error:  # a chat template raises what it likes
            raise ValueError(
                f"Row {index}: the prompt {rows[index]['prompt']!r:.60} could not be tokenised: {error}. Correct the "
                "row, or remove it."
            ) from error
    fitting = [index for index in indices if window is None or len(prompts[index]) + config.max_new_tokens <= window]
    fitting.sort(key=lambda index: len(prompts[index]))
    numbers = range(config.num_candidates)
    seeds = [[candidate_seed(config.sampling_seed, prompts[i], occurrences[i], k) for k in numbers] for i in fitting]
    generated = engine.generate([prompts[index] for index in fitting], seeds)
    for index, candidates in zip(fitting, generated, strict=True):
        finished = [_finish(one, rows[index], prompts[index], tokenizer, config) for one in candidates]
        yield {"index": index, **{key: [one[key] for one in finished] for key in finished[0]}}
    for index in set(indices) - set(fitting):
        yield {"index": index, "text": [], "logp": [], "num_tokens": [], "end": [], "token_ids": []}


def _assemble(
    rows, sampled: dict[int, dict], config, mix_in, keep_empty, dtype: str
) -> tuple[list[dict[str, Any]], SamplingReport]:
    """Put the candidates to their prompts, leave out what is empty or double, and count."""
    counts: Counter = Counter()
    assembled = []
    for index, row in enumerate(rows):
        record, as_messages = sampled[index], isinstance(row["prompt"], list)
        counts["too_long"] += not record["text"]
        found = []  # (completion, logp, tokens, how it ended, ids, source)
        seen = set()
        for text, logp, num_tokens, end, token_ids in zip(
            *(record[key] for key in ("text", "logp", "num_tokens", "end", "token_ids")), strict=True
        ):
            counts.update(["candidates", end])
            counts["tokens"] += num_tokens
            counts["empty"] += not text.strip()
            counts["duplicate"] += bool(text.strip()) and text in seen
            seen.add(text)
            if text.strip() or keep_empty:
                completion = [{"role": "assistant", "content": text}] if as_messages else text
                found.append((completion, logp, num_tokens, end, token_ids, "sampled"))
        for column in mix_in:
            end = "length" if row.get(f"{column}_is_cut") else None
            found += [(answer, None, None, end, None, column) for answer in mixed_in(row, column)]
        candidates = found if config.keep_duplicates else _without_duplicates(found)
        counts["without"] += not candidates and bool(record["text"])
        if candidates:
            names = ("completions", "logps", "num_tokens", "ends", "token_ids", "sources")
            assembled.append({**row, **dict(zip(names, map(list, zip(*candidates, strict=True)), strict=True))})
    total = max(counts["candidates"], 1)
    if not assembled:
        why = (
            "with their answers they all exceed the model's window. Lower `max_new_tokens`, or shorten the prompts"
            if counts["too_long"] == len(rows)
            else "all candidates are empty. Try the model by hand, and check `stop_strings` and `role_markers`"
        )
        raise ValueError(f"None of the {len(rows)} prompts has a usable candidate: {why}.")
    report = SamplingReport(
        num_prompts=len(assembled),
        num_candidates=counts["candidates"],
        num_too_long=counts["too_long"],
        num_without_candidates=counts["without"],
        empty=counts["empty"] / total,
        duplicate=counts["duplicate"] / total,
        truncated=counts["length"] / total,
        cut_at_role_marker=counts["role_marker"] / total,
        mean_tokens=counts["tokens"] / total,
        dtype=dtype,
    )
    return assembled, report


def _without_duplicates(candidates: list[tuple]) -> list[tuple]:
    """The first of equal completions, which counts as cut by its length only if all of them were."""
    kept: list[tuple] = []
    for candidate in candidates:
        place = next((place for place, other in enumerate(kept) if other[0] == candidate[0]), None)
        if place is None:
            kept.append(candidate)
        elif kept[place][3] == "length":
            kept[place] = (*kept[place][:3], candidate[3], *kept[place][4:])
    return kept
