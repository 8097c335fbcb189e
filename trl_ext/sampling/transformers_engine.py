"""Sampling with transformers: own random numbers for every candidate, a prompt computed once for all of them."""

import inspect
from collections.abc import Iterator

import numpy as np
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .config import SamplingConfig
from .decoding import _first_cut, decode_behind
from .engine import Generated, end_token_ids


class SeededSampling(LogitsProcessor):
    """
    Draws the next token of each row from that row's own random numbers, and leaves nothing else to be chosen.

    With temperature 0 it picks the most likely token. Otherwise the token is the first, in the order of the
    vocabulary, at which the distribution function exceeds the row's random number for this step: one number per token,
    made on the CPU, so that all devices draw alike.

    Args:
        uniforms (`np.ndarray` of shape `(rows, steps)`, float64): random numbers in [0, 1).
        config ([`SamplingConfig`]): its temperature and its filters.

    Attributes:
        logps (`list[torch.Tensor]`): for each step so far `(rows,)`, the drawn tokens' log-probabilities under the
            model as it is.
    """

    def __init__(self, uniforms: np.ndarray, config: SamplingConfig):
        self.uniforms, self.config = uniforms, config
        self.logps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logps = scores.float().log_softmax(dim=-1)
        if self.config.temperature == 0:
            tokens = scores.argmax(dim=-1, keepdim=True)
        else:
            tokens = self._draw(logps, torch.from_numpy(self.uniforms[:, len(self.logps)]).unsqueeze(1))
        self.logps.append(logps.gather(1, tokens).squeeze(1))
        return torch.full_like(scores, float("-inf")).scatter(1, tokens, 0.0)

    def _draw(self, logps: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        config = self.config
        precision = torch.float32 if logps.device.type == "mps" else torch.float64  # MPS has no float64
        probabilities = (logps.to(precision) / config.temperature).softmax(dim=-1)
        if config.min_p > 0:  # before the others, as in vLLM
            least = config.min_p * probabilities.max(dim=-1, keepdim=True).values
            probabilities = probabilities.masked_fill(probabilities < least, 0.0)
            probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
        if 0 < config.top_k < probabilities.size(1):
            least = probabilities.topk(config.top_k, dim=-1).values[:, -1:]
            probabilities = probabilities.masked_fill(probabilities < least, 0.0)
            probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
        if config.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
            before = ordered.cumsum(dim=-1) - ordered
            probabilities = probabilities.scatter(1, order, ordered.masked_fill(before >= config.top_p, 0.0))
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
            sampling = SeededSampling(uniforms[rows, done : done + steps], config)
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
