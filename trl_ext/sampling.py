"""
Candidates: prompts and a model in, K sampled answers per prompt out.

The text depends on the model, the settings, the seed and the prompt, and on nothing else: every candidate has random
numbers of its own, made from the seed and the prompt, so that neither the batch size nor the number of processes nor
the order of the prompts changes what is sampled. (Up to arithmetic: a batch of another shape can change a logit in its
last digits, and with it, once in about a million tokens in float32 and far more often in bfloat16, a token.)

Work is cut into shards of prompts. A finished shard is a file and is never sampled again; what a crash costs is the
shards it was in the middle of.
"""

import functools
import hashlib
import inspect
import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ._trl import _tokenize, common_prefix_length
from .columns import as_given, without_nulls
from .data import _says_something, template_kwargs, tokenize_candidates
from .machines import from_all, read_when_there, refuse_unless_all_see, wait_as_long_as_it_takes
from .pretrained import adapter_config, load_processor, refuse_missing_model, whole_model
from .run_warnings import cut_answers
from .safety import check_field_types, explain_remote_code, weights_only
from .tokens import num_repeated_start_tokens, text_ids

logger = logging.getLogger(__name__)

ENGINES = ("transformers", "vllm")
# settings that change how fast it goes and not what comes out; `vllm_args` are looked at one by one
WITHOUT_EFFECT = ("sampling_batch_size", "vllm_python", "vllm_args")
VLLM_ARGS_WITHOUT_EFFECT = (
    "block_size", "cpu_offload_gb", "disable_custom_all_reduce", "disable_log_stats", "distributed_executor_backend",
    "download_dir", "enable_chunked_prefill", "enable_prefix_caching", "enforce_eager", "gpu_memory_utilization",
    "kv_cache_memory_bytes", "max_num_batched_tokens", "max_num_seqs", "num_gpu_blocks_override",
    "pipeline_parallel_size", "swap_space", "tensor_parallel_size",
)  # fmt: skip

MOST_PROMPTS_PER_SHARD = 64

# files of a model's folder, besides its weights, that can change what it answers
CONFIG_FILES = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json")
MODEL_FILES = (
    *CONFIG_FILES, "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "chat_template.json", "*.jinja", "additional_chat_templates/*.jinja", "*.model", "*.tiktoken",
    "*.py",
)  # fmt: skip
NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")
# what configs say about where they came from, which is another thing after a move or another save
ORIGIN_KEYS = ("_name_or_path", "name_or_path", "base_model_name_or_path", "transformers_version")


@dataclass
class SamplingConfig:
    """
    How candidates are sampled. Names that would clash with a trainer's begin with `sampling_`.

    Parameters:
        num_candidates (`int`, *optional*, defaults to `4`):
            Candidates per prompt. RRHF samples 4 (and adds the two of the dataset), SLiC-HF 8, CLICK 20.
        temperature (`float`, *optional*, defaults to `0.8`):
            0 is greedy, and then one candidate is all there is. RRHF 0.8, SLiC-HF 0.7, CLICK 1. Held-out prompts are
            answered at 1 without `top_p` and `top_k`, whatever these are.
        top_p (`float`, *optional*, defaults to `1.0`): in (0, 1]; 1 switches it off. CLICK 0.9.
        top_k (`int`, *optional*, defaults to `0`): 0 switches it off. SLiC-HF 40.
        max_new_tokens (`int`, *optional*, defaults to `128`): longest answer in tokens, its end token included.
        stop_strings (`list[str]`, *optional*): an answer ends before the first of them.
        role_markers (`list[str]`, *optional*):
            Where the model begins to speak for somebody else; the answer is cut there, and the cut is counted. The
            default is `"\\n\\nHuman:"` and `"\\n\\nAssistant:"`, the markers of the HH dialogues. RRHF's authors saw
            models win reward with such text.
        keep_duplicates (`bool`, *optional*, defaults to `False`): keep equal answers to a prompt.
        sampling_seed (`int`, *optional*, defaults to `42`): of the random numbers.
        sampling_engine (`str`, *optional*, defaults to `"transformers"`):
            `"transformers"`, in the processes of the run; or `"vllm"`, in a process and an environment of its own,
            for each of them. Both compute each prompt once for all its candidates. Their texts differ: vLLM draws its
            random numbers in its own way.
        sampling_batch_size (`int`, *optional*, defaults to `64`): candidates in the making at a time, per process,
            with `"transformers"`; vLLM decides for itself.
        vllm_python (`str`, *optional*): the Python interpreter of an environment with vLLM.
        vllm_args (`dict` or `str`, *optional*): further arguments of `vllm.LLM`, a dict or JSON, such as
            `gpu_memory_utilization`. With `max_model_len`, prompts are skipped that do not fit into it with an answer.

    Raises:
        ValueError: a value out of its range.
    """

    num_candidates: int = field(default=4, metadata={"help": "Candidates sampled per prompt."})
    temperature: float = field(default=0.8, metadata={"help": "Of the sampling; 0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling; 1 switches it off."})
    top_k: int = field(default=0, metadata={"help": "Sample among the k most likely tokens; 0 switches it off."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest sampled answer in tokens."})
    stop_strings: list[str] | None = field(
        default=None, metadata={"help": "An answer ends before the first of these strings."}
    )
    role_markers: list[str] | None = field(
        default_factory=lambda: ["\n\nHuman:", "\n\nAssistant:"],
        metadata={"help": "An answer is cut where it begins to speak for somebody else, and the cut is counted."},
    )
    keep_duplicates: bool = field(default=False, metadata={"help": "Keep equal answers to the same prompt."})
    sampling_seed: int = field(default=42, metadata={"help": "Seed of the sampling."})
    sampling_engine: str = field(
        default="transformers",
        metadata={
            "help": "'transformers', in this process, or 'vllm', in a process and environment of its own.",
            "choices": list(ENGINES),
        },
    )
    sampling_batch_size: int = field(default=64, metadata={"help": "Candidates in the making at a time, per process."})
    vllm_python: str | None = field(
        default=None, metadata={"help": "Python interpreter of an environment with vLLM, for sampling_engine='vllm'."}
    )
    vllm_args: dict | str | None = field(
        default=None, metadata={"help": "Further arguments of vllm.LLM, as JSON: '{\"gpu_memory_utilization\": 0.8}'."}
    )

    def __post_init__(self):
        check_field_types(self)

        def refuse(name: str, why: str) -> None:
            raise ValueError(f"{name}={getattr(self, name)!r}: {why}")

        for name in ("stop_strings", "role_markers"):
            if isinstance(getattr(self, name), str):  # a string is a sequence of strings, of its letters
                setattr(self, name, [getattr(self, name)])
        for name in ("num_candidates", "max_new_tokens", "sampling_batch_size"):
            if getattr(self, name) < 1:
                refuse(name, "there is nothing to sample. Set it to 1 or more.")
        if not 0 <= self.temperature < float("inf"):
            refuse("temperature", "a temperature is 0 (greedy) or positive.")
        if not 0 < self.top_p <= 1:
            refuse("top_p", "set it above 0, and at most to 1, which switches it off.")
        if self.top_k < 0:
            refuse("top_k", "set it to 1 or more, or to 0, which switches it off.")
        if self.temperature == 0 and self.num_candidates > 1:
            refuse("num_candidates", "greedy sampling (temperature 0) gives one answer. Set a temperature, or 1.")
        if self.sampling_engine not in ENGINES:
            refuse("sampling_engine", f"not known. Set it to one of {', '.join(ENGINES)}.")
        if self.sampling_engine == "vllm" and self.vllm_python is None:
            refuse(
                "sampling_engine",
                "vLLM runs in an environment of its own. Set `vllm_python` to the interpreter of one in which "
                "`pip install vllm` was run.",
            )
        if self.sampling_engine != "vllm" and (self.vllm_python or self.vllm_args):
            raise ValueError("vllm_python and vllm_args would do nothing. Set `sampling_engine` to 'vllm'.")
        if isinstance(self.vllm_args, str):
            try:
                self.vllm_args = json.loads(self.vllm_args)
            except json.JSONDecodeError as error:
                refuse("vllm_args", f"not JSON ({error}). Write it like '{{\"gpu_memory_utilization\": 0.8}}'.")
        if not isinstance(self.vllm_args, dict | None):
            refuse("vllm_args", "no names. Write it like '{\"gpu_memory_utilization\": 0.8}'.")
        longest = (self.vllm_args or {}).get("max_model_len")
        if longest is not None and (not isinstance(longest, int) or longest <= self.max_new_tokens):
            refuse("vllm_args", "max_model_len holds prompt and answer: a number of tokens above `max_new_tokens`.")
        if any(not text for text in (*(self.stop_strings or ()), *(self.role_markers or ()))):
            raise ValueError("An empty string in stop_strings or role_markers would cut every answer to nothing.")


@dataclass
class Generated:
    """
    One sampled continuation.

    Attributes:
        token_ids (`list[int]`): its tokens, with the end-of-sequence token if it came to one.
        logps (`list[float]`): log-probability of each of them in nats, under the model as it is: before temperature,
            top-k and top-p.
        finished (`bool`): whether it ended with an end-of-sequence token.
    """

    token_ids: list[int]
    logps: list[float]
    finished: bool


class Engine(Protocol):
    """
    What makes tokens.

    Attributes:
        max_model_len (`int`, *optional*): longest prompt and answer in tokens that it takes, if it has a limit beside
            the model's own.
    """

    max_model_len: int | None

    def generate(self, prompt_ids: list[list[int]], seeds: list[list[int]]) -> list[list[Generated]]:
        """Continuations of each prompt, one per seed. A seed is an integer below 2**63."""

    def close(self) -> None:
        """Give back what it holds."""


class SeededSampling(LogitsProcessor):
    """
    Draws the next token of each row from that row's own random numbers, and leaves nothing else to be chosen.

    With temperature 0 it picks the most likely token. Otherwise the token is the first, in the order of the
    vocabulary, at which the distribution function exceeds the row's random number for this step: one number per token,
    made on the CPU, so that all devices draw alike.

    Args:
        uniforms (`np.ndarray` of shape `(rows, steps)`, float64): random numbers in [0, 1).
        temperature (`float`), top_k (`int`), top_p (`float`): as in [`SamplingConfig`].

    Attributes:
        logps (`list[torch.Tensor]`): for each step so far `(rows,)`, the drawn tokens' log-probabilities under the
            model as it is.
    """

    def __init__(self, uniforms: np.ndarray, temperature: float, top_k: int, top_p: float):
        self.uniforms, self.temperature, self.top_k, self.top_p = uniforms, temperature, top_k, top_p
        self.logps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logps = scores.float().log_softmax(dim=-1)
        if self.temperature == 0:
            tokens = scores.argmax(dim=-1, keepdim=True)
        else:
            tokens = self._draw(logps, torch.from_numpy(self.uniforms[:, len(self.logps)]).unsqueeze(1))
        self.logps.append(logps.gather(1, tokens).squeeze(1))
        return torch.full_like(scores, float("-inf")).scatter(1, tokens, 0.0)

    def _draw(self, logps: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        precision = torch.float32 if logps.device.type == "mps" else torch.float64  # MPS has no float64
        probabilities = (logps.to(precision) / self.temperature).softmax(dim=-1)
        if 0 < self.top_k < probabilities.size(1):
            least = probabilities.topk(self.top_k, dim=-1).values[:, -1:]
            probabilities = probabilities.masked_fill(probabilities < least, 0.0)
            probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
        if self.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
            before = ordered.cumsum(dim=-1) - ordered
            probabilities = probabilities.scatter(1, order, ordered.masked_fill(before >= self.top_p, 0.0))
        distribution = probabilities.cumsum(dim=-1)
        wanted = uniforms.to(precision).to(logps.device) * distribution[:, -1:]
        tokens = torch.searchsorted(distribution, wanted, right=True)
        # rounding may point behind the last token that has any probability
        last = probabilities.size(1) - 1 - (probabilities.flip(1) > 0).int().argmax(dim=-1, keepdim=True)
        return torch.minimum(tokens, last)


class TransformersEngine:
    """
    Sampling with `model.generate`, in batches.

    Each prompt goes through the model once, whatever the number of its candidates: its keys and values are copied for
    them. After every `segment` tokens, the rows that have ended leave the batch. Models that keep another kind of
    state compute their prompts once per candidate, only prompts of one length together, as padding would enter that
    state, and rows stay until the last one ends.

    Of the model's generation config only the end tokens count: a repetition penalty in it would be neither in the
    settings nor in the log-likelihoods.

    Args:
        model ([`~transformers.PreTrainedModel`]): on its device, whole.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): to find the stop strings.
        config ([`SamplingConfig`]): how.
        segment (`int`, defaults to 32): tokens between two looks at who has ended.
    """

    max_model_len = None

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: SamplingConfig,
        segment: int = 32,
    ):
        self.model, self.tokenizer, self.config, self.segment = model.eval(), tokenizer, config, segment
        self.end_ids = end_token_ids(model.generation_config, tokenizer)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_ids[0]
        self._keeps_keys_and_values = keeps_keys_and_values(model)

    def close(self) -> None:
        self.model = None

    def generate(self, prompt_ids: list[list[int]], seeds: list[list[int]]) -> list[list[Generated]]:
        generated: list[list[Generated]] = [[] for _ in prompt_ids]
        # what a generation config leaves open, `generate` takes from the model's
        generation_config, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            for batch in self._batches(prompt_ids, seeds):
                flat = iter(self._generate_batch([prompt_ids[i] for i, _ in batch], [part for _, part in batch]))
                for index, part in batch:
                    generated[index] += [next(flat) for _ in part]
        finally:
            self.model.generation_config = generation_config
        return generated

    def _batches(self, prompt_ids: list[list[int]], seeds: list[list[int]]) -> Iterator[list[tuple[int, list[int]]]]:
        """Which prompts, each with its seeds, or with as many of them as a batch holds."""
        size = self.config.sampling_batch_size
        batch: list[tuple[int, list[int]]] = []
        rows = 0
        for index, row_seeds in enumerate(seeds):
            for start in range(0, len(row_seeds), size):
                part = row_seeds[start : start + size]
                fits = rows + len(part) <= size and (
                    self._keeps_keys_and_values or not batch or len(prompt_ids[batch[0][0]]) == len(prompt_ids[index])
                )
                if not fits:
                    yield batch
                    batch, rows = [], 0
                batch.append((index, part))
                rows += len(part)
        if batch:
            yield batch

    @torch.no_grad()
    def _generate_batch(self, prompt_ids: list[list[int]], seeds: list[list[int]]) -> list[Generated]:
        config, device = self.config, self.model.device
        width = max(map(len, prompt_ids))
        inputs = torch.tensor([[self.pad_id] * (width - len(ids)) + ids for ids in prompt_ids], device=device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=device)
        copies = torch.tensor([len(row_seeds) for row_seeds in seeds], device=device)
        cache = self._prompt_cache(inputs, mask, copies)
        inputs, mask = inputs.repeat_interleave(copies, dim=0), mask.repeat_interleave(copies, dim=0)
        uniforms = np.stack(
            [np.random.Generator(np.random.Philox(s)).random(config.max_new_tokens) for row in seeds for s in row]
        )

        generated = [Generated([], [], False) for _ in uniforms]
        asked = [ids for ids, row_seeds in zip(prompt_ids, seeds, strict=True) for _ in row_seeds]
        rows, done = np.arange(len(uniforms)), 0  # rows still in the making, and tokens each of them has
        while len(rows) and done < config.max_new_tokens:
            steps = min(self.segment if cache is not None else config.max_new_tokens, config.max_new_tokens - done)
            drawn = uniforms[rows, done : done + steps]
            sampling = SeededSampling(drawn, config.temperature, config.top_k, config.top_p)
            output = self.model.generate(
                inputs,
                attention_mask=mask,
                generation_config=GenerationConfig(
                    max_new_tokens=steps,
                    do_sample=False,  # the choice is made by then
                    eos_token_id=self.end_ids,
                    pad_token_id=self.pad_id,
                    use_cache=True,
                    return_dict_in_generate=True,
                ),
                logits_processor=LogitsProcessorList([sampling]),
                **({} if cache is None else {"past_key_values": cache}),
            )
            tokens = output.sequences[:, inputs.size(1) :].tolist()
            logps = torch.stack(sampling.logps, dim=1).tolist()
            going_on = [
                position
                for position, row in enumerate(rows)
                if self._extend(generated[row], asked[row], tokens[position], logps[position])
            ]
            done += steps
            if cache is None:
                break
            kept = torch.tensor(going_on, device=device, dtype=torch.long)
            rows, inputs = rows[going_on], output.sequences[kept]
            mask = torch.nn.functional.pad(mask[kept], (0, steps), value=1)
            if len(rows) and done < config.max_new_tokens:
                cache = output.past_key_values
                cache.batch_select_indices(kept)
        return generated

    def _extend(self, generated: Generated, prompt_ids: list[int], tokens: list[int], logps: list[float]) -> bool:
        """Add a segment's tokens up to the end token; returns whether there is more to come."""
        for token, logp in zip(tokens, logps, strict=False):
            generated.token_ids.append(token)
            generated.logps.append(logp)
            if token in self.end_ids:
                generated.finished = True
                return False
        cuts = (*(self.config.stop_strings or ()), *(self.config.role_markers or ()))
        return not cuts or _first_cut(decode_behind(self.tokenizer, prompt_ids, generated.token_ids), cuts) is None

    def _prompt_cache(self, inputs: torch.Tensor, mask: torch.Tensor, copies: torch.Tensor) -> DynamicCache | None:
        """Keys and values of the prompts less their last token, copied for their candidates; `None` without those."""
        if not self._keeps_keys_and_values:
            return None
        cache = DynamicCache(config=self.model.config)
        if inputs.size(1) == 1:
            return cache
        arguments = inspect.signature(self.model.forward).parameters
        kwargs = {}
        if "position_ids" in arguments:
            kwargs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, :-1]
        if "logits_to_keep" in arguments:
            kwargs["logits_to_keep"] = 1
        cache = self.model(
            input_ids=inputs[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, use_cache=True, **kwargs
        ).past_key_values
        cache.batch_select_indices(torch.arange(len(copies), device=copies.device).repeat_interleave(copies))
        return cache


def keeps_keys_and_values(model: PreTrainedModel) -> bool:
    """Whether keys and values, of all tokens or of a window, are all a model keeps of what it has read."""
    if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
        return False
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def end_token_ids(generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    The tokens that end an answer: the model's own, and the tokenizer's.

    Raises:
        ValueError: there are none, so that no answer would ever end.
    """
    found = getattr(generation_config, "eos_token_id", None)
    found = list(found) if isinstance(found, list | tuple) else [found]
    ids = [token for token in dict.fromkeys([*found, tokenizer.eos_token_id]) if token is not None]
    if not ids:
        raise ValueError(
            "Neither the model's generation config nor the tokenizer has an end-of-sequence token, so no answer would "
            "ever end. Set `tokenizer.eos_token` and save the tokenizer with the model."
        )
    return ids


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of tokens, without special tokens."""
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def decode_behind(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
    """
    The text of tokens as it goes on behind a prompt, without special tokens.

    Tokenizers of the SentencePiece kind leave out one space at the beginning of what they decode: "Answer:" and
    "▁Sure", decoded each by itself, are "Answer:Sure".
    """
    for tail in (list(prompt_ids[-8:]), list(prompt_ids)):
        before = decode(tokenizer, tail)
        if before:  # and not only special tokens
            text = decode(tokenizer, [*tail, *token_ids])
            # not so where bytes at the seam make no character: then they do not begin with a space either
            return text.removeprefix(before) if text.startswith(before) else decode(tokenizer, token_ids)
    return decode(tokenizer, token_ids)


def _decoding(tokenizer, row: dict[str, Any], prompt_ids: list[int], answer: list[int]) -> Callable[[list[int]], str]:
    """
    How to decode an answer and its beginnings, so that training gets the tokens back that were sampled: as it goes on
    behind the prompt, or by itself, where a chat template brings the space along.
    """
    is_text = isinstance(row["prompt"], str)
    behind, alone = functools.partial(decode_behind, tokenizer, prompt_ids), functools.partial(decode, tokenizer)
    if behind(answer) == alone(answer):  # as with all byte-level tokenizers
        return alone

    def num_tokens_back(decoding) -> int:
        text = decoding(answer)
        completion = text if is_text else [{"role": "assistant", "content": text}]
        try:
            ids, (rest,), _ = tokenize_candidates(tokenizer, row["prompt"], [completion], **template_kwargs(row))
        except Exception:  # a chat template raises what it likes; the answer is no less sampled
            return 0
        return common_prefix_length([*prompt_ids, *answer], [*ids, *rest])

    # where both give the same, as with a template that trims: the whole text, and the message without the space
    return max((behind, alone) if is_text else (alone, behind), key=num_tokens_back)


def _first_cut(text: str, strings: Sequence[str]) -> int | None:
    """Where the first of `strings` begins in `text`."""
    found = [position for string in strings if (position := text.find(string)) >= 0]
    return min(found, default=None)


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
            lines.append(f"{self.num_without_candidates} prompts left out: no usable candidate")
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
        raise ValueError(f"shard_size={shard_size}: set it to 1 or more.")
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
    wait_as_long_as_it_takes()
    sampled: dict[int, dict] = {}
    for number, indices in enumerate(shards):
        records = _read_shard(_shard_file(folder, number), made_of)
        if {record["index"] for record in records} != set(indices):
            raise ValueError(f"{_shard_file(folder, number)} holds other prompts than it should. Remove it.")
        sampled.update((record["index"], record) for record in records)
    found, report = _assemble(rows, sampled, config, mix_in, keep_empty, dtype)
    warning = cut_answers(report.truncated, config.max_new_tokens)
    if warning is not None and state.is_main_process:
        logger.warning(warning)
    return found, report


def process_state() -> PartialState:
    """
    The processes of this run, and the device of this one. Where there is no accelerator, Accelerate sees the other
    processes only if it is told to look for them on CPUs.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def _check_rows(rows: Sequence[dict[str, Any]], mix_in: Sequence[str]) -> None:
    if not rows:
        raise ValueError("There are no prompts to sample for. Check the dataset and its split.")
    for index, row in enumerate(rows):
        prompt = row.get("prompt")
        if not isinstance(prompt, str | list) or not prompt:
            raise ValueError(
                f"Row {index} has no prompt (its columns are {sorted(row)}): `prompt` is {prompt!r:.60}. It has to be "
                "text or a list of messages; rename or add the column."
            )
        for column in mix_in:
            if column not in row:
                raise ValueError(
                    f"`mix_in` names the column {column!r}, and row {index} has {sorted(row)}. Name columns that hold "
                    "answers, such as 'chosen' and 'rejected'."
                )
            if isinstance(prompt, str) and not all(isinstance(a, str) for a in _as_answers(row[column])):
                raise ValueError(
                    f"`mix_in` names the column {column!r}, which in row {index} does not hold text as the prompt "
                    f"does: {row[column]!r:.60}. Give prompt and answers the same form: all text, or all messages."
                )


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
        what = "does not match its digest: it was changed, or sampled with something else"
    except FileNotFoundError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        what = f"cannot be read ({' '.join(str(error).split())[:200]})"
    raise ValueError(f"{file} {what}. Put back what was there, or remove it to sample its prompts again.")


def sealed(content: dict[str, Any]) -> str:
    """JSON with a hash over itself, by which [`read_sealed`] sees that it was changed. No proof of who wrote it."""
    content = json.loads(json.dumps(content, default=str))
    return json.dumps({**content, "digest": _seal(content)}, indent=2)


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_sealed(file: Path, keys: Mapping[str, type]) -> dict[str, Any]:
    """
    Read what [`sealed`] has made, less its hash.

    Args:
        file (`Path`): the file.
        keys (`dict[str, type]`): what it must hold, and of which type.

    Raises:
        ValueError: it was changed or damaged since; names the file and the reason.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(
            f"{file} is damaged: it cannot be read as JSON ({' '.join(str(error).split())[:200]})."
        ) from None
    if not isinstance(content, dict) or "digest" not in content:
        raise ValueError(f"{file} is damaged or of another version: it has no digest of itself.")
    digest = content.pop("digest")
    if digest != _seal(content):
        raise ValueError(f"{file} was changed after it was written: it does not match its own digest.")
    for key, kind in keys.items():
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{file} is damaged or of another version: {key!r} is {content.get(key)!r:.80}.")
    return content


def unfinished_path(path: Path) -> Path:
    """What a file is called until [`write_atomically`] puts it in its place."""
    return path.with_name(path.name + ".unfinished")


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is either whole or not there, whenever the process or the machine ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished_path(path).open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    unfinished_path(path).replace(path)


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
            found, problem = {}, f"{error} Remove {folder} to sample anew, or choose another folder."
        shard_size = shard_size or found.get("shard_size") or _default_shard_size(len(rows), state.num_processes)
        prompts = [[row["prompt"], row.get("tools"), row.get("chat_template_kwargs")] for row in rows]
        is_local = os.path.isdir(model_name_or_path)
        identity = {
            "model": model_fingerprint(model_name_or_path) + ("" if is_local else f"@{revision}"),
            "prompts": hashlib.sha256(json.dumps(prompts, default=str).encode()).hexdigest(),
            "chat_template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
            "dtype": dtype,
            "shard_size": shard_size,
            **{name: value for name, value in asdict(config).items() if name not in WITHOUT_EFFECT},
            "vllm_args": {n: v for n, v in (config.vllm_args or {}).items() if n not in VLLM_ARGS_WITHOUT_EFFECT},
        }
        identity = json.loads(json.dumps(identity))  # a tuple is a list there
        if problem is not None:
            pass
        elif found:
            changed = sorted(key for key in identity if identity[key] != found.get(key))
            if changed:
                problem = (
                    f"{folder} holds candidates that were sampled with something else: "
                    + ", ".join(f"{key} was {found.get(key)!r:.80} and is {identity[key]!r:.80}" for key in changed)
                    + ". Go on with what they were sampled with, or choose another folder."
                )
        else:
            write_atomically(file, sealed(identity))
        made_of = _seal({**identity, "shard_size": shard_size})
    problem, shard_size, made_of = from_all((problem, shard_size, made_of))[0]  # the main process's
    if problem is not None:
        raise FileExistsError(problem)
    return shard_size, made_of


def _default_shard_size(num_prompts: int, num_processes: int) -> int:
    """So that all processes have equally many, and no fuller ones than need be: a shard is one batch or several."""
    shards_per_process = math.ceil(num_prompts / (num_processes * MOST_PROMPTS_PER_SHARD))
    return math.ceil(num_prompts / (num_processes * shards_per_process))


def model_fingerprint(model_name_or_path: str | Path) -> str:
    """
    What identifies a model: for a local one a hash over its weights, its configuration and its tokenizer, and those of
    its base if it is an adapter; for one of the Hub its name.

    The same for equal files in another folder, and different once something changes that its answers depend on.
    """
    folder = Path(model_name_or_path)
    if not os.path.isdir(folder):
        return str(model_name_or_path)
    digest = hashlib.sha256()
    files = {file for pattern in ("*.safetensors", "*.bin", *MODEL_FILES) for file in folder.glob(pattern)}
    for file in sorted(file for file in files if file.name not in NO_WEIGHTS):
        digest.update(f"{file.name} {file_digest(file)}\n".encode())
    if (folder / "adapter_config.json").is_file():
        base = adapter_config(folder)["base_model_name_or_path"]
        if base is not None and Path(base).resolve() != folder.resolve():
            digest.update(f"base {model_fingerprint(base)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def file_digest(file: Path) -> str:
    """The SHA-256 of a file; of a model's config without what it says about where the model came from."""
    status = file.stat()
    return _file_digest(str(file.absolute()), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)  # stages come back to the same models again and again
def _file_digest(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as opened:
        if Path(path).name in CONFIG_FILES:
            try:
                content = {key: value for key, value in json.load(opened).items() if key not in ORIGIN_KEYS}
            except (ValueError, AttributeError, RecursionError) as error:
                raise ValueError(f"{path} is no config of a model: {error}. Mend it, or take another model.") from None
            return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return hashlib.file_digest(opened, "sha256").hexdigest()


def load_causal_lm(model_name_or_path: str | Path, **model_init_kwargs) -> PreTrainedModel:
    """A model, or an adapter on its base, whole on this process's device, without gradients."""
    from transformers import AutoModelForCausalLM

    device = process_state().device
    kwargs = {"trust_remote_code": False}  # at `None` transformers would ask on the terminal
    kwargs |= {key: value for key, value in model_init_kwargs.items() if value is not None}
    kwargs.setdefault("dtype", torch.float32 if device.type == "cpu" else "auto")
    with explain_remote_code(), weights_only():
        model = AutoModelForCausalLM.from_pretrained(model_name_or_path, **kwargs)
    return model.to(device).requires_grad_(False).eval()


def load_tokenizer(model_name_or_path: str | Path, **hub) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; `hub` may have `revision` and `trust_remote_code`, which is off by default."""
    return load_processor(model_name_or_path, auto_class=AutoTokenizer, **hub)


def _open_engine(model_name_or_path, tokenizer, config: SamplingConfig, model_init_kwargs, hub) -> Engine:
    if config.sampling_engine == "vllm":
        from .vllm_engine import VllmEngine

        engine_args = {**hub, **(config.vllm_args or {})}
        return VllmEngine(
            str(model_name_or_path),
            python=config.vllm_python,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_new_tokens=config.max_new_tokens,
            stop_strings=(*(config.stop_strings or ()), *(config.role_markers or ())),
            dtype=model_init_kwargs["dtype"],
            max_model_len=engine_args.pop("max_model_len", None),
            engine_args=engine_args,
        )
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


def prompt_key(row: dict) -> str:
    """The same for equal prompts, text or messages."""
    return json.dumps(row["prompt"], sort_keys=True)


def _occurrences(rows: Sequence[dict[str, Any]]) -> list[int]:
    """How many rows with the same prompt come before each."""
    seen: Counter = Counter()
    numbers = []
    for row in rows:
        key = prompt_key(row)
        numbers.append(seen[key])
        seen[key] += 1
    return numbers


def load_model_config(model_name_or_path: str | Path, *, revision: str = "main", trust_remote_code: bool = False):
    refuse_missing_model(model_name_or_path)
    name, revision = whole_model(model_name_or_path, revision)
    with explain_remote_code():
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def context_window(model_name_or_path: str | Path, **hub) -> int | None:
    """Longest sequence in tokens that the model was made for; `None` if its config does not say."""
    return getattr(load_model_config(model_name_or_path, **hub).get_text_config(), "max_position_embeddings", None)


def sampling_dtype(model_name_or_path: str | Path, dtype: Any = None, **hub) -> str:
    """
    The name of the dtype a model is sampled in: the given one; without one float32 on a CPU, else the checkpoint's, as
    for `"auto"`. `"auto"` comes back only where the checkpoint's config does not say.
    """
    if dtype is None and process_state().device.type == "cpu":
        return "float32"
    if dtype in (None, "auto"):
        config = load_model_config(model_name_or_path, **hub)
        dtype = config.dtype or config.get_text_config().dtype or "auto"
    return str(dtype).removeprefix("torch.")


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


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> list[int]:
    """The tokens a model answers to, by the template training uses too."""
    if isinstance(row["prompt"], str):
        return text_ids(tokenizer, row["prompt"])
    row = as_given(row)
    return _tokenize(tokenizer, row["prompt"], add_generation_prompt=True, **template_kwargs(row))["input_ids"]


def _sample_shard(indices, rows, occurrences, tokenizer, engine: Engine, config, window) -> Iterator[dict]:
    prompts = {}
    for index in indices:
        try:
            prompts[index] = prompt_token_ids(tokenizer, rows[index])
        except Exception as error:  # a chat template raises what it likes
            raise ValueError(
                f"Row {index}: the prompt {rows[index]['prompt']!r:.60} could not be tokenised: {error}. Mend the "
                "row, or leave it out."
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


def _finish(generated: Generated, row, prompt_ids: list[int], tokenizer, config: SamplingConfig) -> dict[str, Any]:
    """
    Text, its log-likelihood and number of tokens, how it ended ("stop", "role_marker" or "length"), and the tokens
    that were sampled: to the end token, or to the token that completes what the text is cut at.
    """
    answer = generated.token_ids[:-1] if generated.finished else generated.token_ids
    decoded = _decoding(tokenizer, row, prompt_ids, answer)
    text, num_tokens, token_ids = decoded(answer), len(generated.token_ids), generated.token_ids
    stop, marker = (_first_cut(text, strings or ()) for strings in (config.stop_strings, config.role_markers))
    end = "stop" if generated.finished else "length"
    cut = min((position for position in (stop, marker) if position is not None), default=None)
    if cut is not None:
        end = "stop" if cut == stop else "role_marker"
        text, num_tokens = text[:cut], len(answer)
        # a token that is only partly in the text does not count
        while num_tokens and len(decoded(answer[:num_tokens])) > cut:
            num_tokens -= 1
        strings = (*(config.stop_strings or ()), *(config.role_markers or ()))
        completes = (n for n in range(num_tokens, len(answer)) if _first_cut(decoded(answer[:n]), strings) is not None)
        token_ids = answer[: next(completes, len(answer))]
    logp = sum(generated.logps[:num_tokens])
    return {"text": text, "logp": logp, "num_tokens": num_tokens, "end": end, "token_ids": token_ids}


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
            "with the answers they all exceed the model's window. Lower `max_new_tokens`, or shorten the prompts"
            if counts["too_long"] == len(rows)
            else "all candidates are empty. Try the model by hand, and look at stop_strings and role_markers"
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


def _as_answers(value: Any) -> list:
    """The answers in a column of the data, which holds one or a list of them; `None` says nothing."""
    is_list_of_answers = isinstance(value, list) and not (value and isinstance(value[0], Mapping))
    return [answer for answer in (value if is_list_of_answers else [value]) if answer is not None]


def mixed_in(row: Mapping[str, Any], column: str) -> list:
    """
    The answers in a column of the data that say something, in the form of the row's prompt; conversations without the
    prompt in front.
    """
    prompt, answers = row["prompt"], _as_answers(row[column])
    if isinstance(prompt, str):
        return [answer for answer in answers if answer.strip()]
    prompt, found = without_nulls(prompt), []
    for answer in answers:
        messages = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else without_nulls(answer)
        if messages[: len(prompt)] == prompt:
            messages = messages[len(prompt) :]
        if any(_says_something(message) for message in messages):
            found.append(messages)
    return found
