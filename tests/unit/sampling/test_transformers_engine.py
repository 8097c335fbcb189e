"""The engine: against plain `generate`, against a slow and obvious sampler."""

import statistics
import time

import numpy as np
import pytest
import torch
import transformers
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.support.sampling import TEXTS, common_settings, greedy, plain_generate, plain_logps, tiny_model
from trl_ext.playground.model import byte_level_tokenizer
from trl_ext.sampling.candidates import candidate_seed
from trl_ext.sampling.config import SamplingConfig
from trl_ext.sampling.transformers_engine import TransformersEngine, keeps_keys_and_values


def assert_greedy_equals_generate(model, prompt_ids, **kwargs):
    generated = greedy(model, prompt_ids, **kwargs)
    for ids, one in zip(prompt_ids, generated, strict=True):
        assert one.token_ids == plain_generate(model, ids, 22), len(ids)
        assert one.logps == pytest.approx(plain_logps(model, ids, one.token_ids), abs=1e-3)
        assert one.finished == (one.token_ids[-1] == byte_level_tokenizer().eos_token_id)
    assert sum(len(set(one.token_ids)) for one in generated) > 5 * len(generated), "they say something"
    return generated


@pytest.mark.parametrize("segment", [4, 32])
def test_greedy_is_plain_generate(segment, sampler, tokenizer):
    prompt_ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    generated = assert_greedy_equals_generate(sampler, prompt_ids, segment=segment)
    lengths = {len(one.token_ids) for one in generated}
    assert min(lengths) < 22 == max(lengths), "some end on their own, others go over several segments"
    assert min(map(len, prompt_ids)) == 1 < max(map(len, prompt_ids))


def test_single_tokens_alone_are_answered_too(sampler, tokenizer):
    assert_greedy_equals_generate(sampler, [tokenizer(text)["input_ids"] for text in "abc"])


WINDOWS = {
    "Mistral": {"sliding_window": 6},
    "Gemma2": {"head_dim": 16, "sliding_window": 6, "num_hidden_layers": 2},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize("architecture", WINDOWS)
def test_windows_shorter_than_the_prompt(architecture, tokenizer):
    config_class = getattr(transformers, f"{architecture}Config")
    model = tiny_model(config_class(**common_settings() | WINDOWS[architecture]))
    assert keeps_keys_and_values(model)
    assert_greedy_equals_generate(model, [tokenizer(text)["input_ids"] for text in TEXTS[:6]])


OTHER_STATES = {
    "Mamba": {"state_size": 8},
    "RecurrentGemma": {"lru_width": 32, "attention_window_size": 6, "num_hidden_layers": 3, "num_key_value_heads": 2},
    "Lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "Qwen3Next": {
        "head_dim": 16, "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32, "layer_types": ["linear_attention", "full_attention"],
    },
}  # fmt: skip


@pytest.mark.parametrize("architecture", OTHER_STATES)
def test_models_that_keep_another_kind_of_state(architecture, tokenizer):
    config_class = getattr(transformers, f"{architecture}Config")
    model = tiny_model(config_class(**common_settings() | OTHER_STATES[architecture]))
    assert not keeps_keys_and_values(model)
    # two prompts of a length, and several lengths; none of one token, for which RecurrentGemma itself goes on with
    # the state of whatever it computed before
    prompt_ids = [tokenizer(text)["input_ids"] for text in (*TEXTS[1:4], TEXTS[3][::-1])]
    assert_greedy_equals_generate(model, prompt_ids)


def obvious_distribution(logits, temperature, top_k, top_p, min_p):
    """Probabilities of the next token, one step of the definition at a time."""
    weights = [np.exp(logit / temperature) for logit in logits]
    ranked = sorted(range(len(weights)), key=lambda token: -weights[token])
    ranked = [token for token in ranked if weights[token] >= min_p * weights[ranked[0]]]
    if top_k:
        ranked = ranked[:top_k]
    total = sum(weights[token] for token in ranked)
    kept, so_far = [], 0.0
    for token in ranked:
        kept.append(token)
        so_far += weights[token] / total
        if so_far >= top_p:
            break
    total = sum(weights[token] for token in kept)
    return np.array([weights[token] / total if token in kept else 0.0 for token in range(len(weights))])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0), (1.0, 7, 1.0, 0.0), (1.0, 0, 0.6, 0.0), (1.3, 20, 0.8, 0.0),
        (1.0, 0, 1.0, 0.3), (0.7, 0, 1.0, 0.1), (1.0, 0, 0.6, 0.2), (1.3, 20, 0.8, 0.2),
    ],
)  # fmt: skip
def test_tokens_are_drawn_from_the_right_distribution(temperature, top_k, top_p, min_p, sampler, tokenizer):
    num_draws, ids = 4000, tokenizer("What is it? ")["input_ids"]
    drawing = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    config = SamplingConfig(**drawing, max_new_tokens=1, sampling_batch_size=num_draws)
    seeds = [candidate_seed(42, ids, 0, number) for number in range(num_draws)]
    drawn = TransformersEngine(sampler, tokenizer, config).generate([ids], [seeds])[0]
    with torch.no_grad():
        logits = sampler(torch.tensor([ids])).logits[0, -1].double().numpy()
    expected = num_draws * obvious_distribution(logits, **drawing)
    counts = np.bincount([one.token_ids[0] for one in drawn], minlength=len(expected))
    assert not counts[expected == 0].any(), "nothing is drawn that was cut off"
    often = expected >= 8
    assert 3 <= often.sum() <= len(often)
    bins = [np.append(values[often], values[~often].sum()) for values in (counts, expected)]
    bins = [values[:-1] for values in bins] if bins[1][-1] == 0 else bins
    assert chisquare(*bins).pvalue > 1e-3
    # what is reported is the model's own log-probability, whatever was cut
    plain = logits - np.log(np.exp(logits).sum())
    assert [one.logps[0] for one in drawn] == pytest.approx([plain[one.token_ids[0]] for one in drawn], abs=1e-4)


def test_logps_are_those_of_the_tokens(sampler, tokenizer):
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    config = SamplingConfig(num_candidates=2, max_new_tokens=11)
    generated = TransformersEngine(sampler, tokenizer, config).generate(ids, [[1, 2]] * 12)
    for prompt, row in zip(ids, generated, strict=True):
        for one in row:
            assert one.logps == pytest.approx(plain_logps(sampler, prompt, one.token_ids), abs=1e-4)


@pytest.mark.slow
def test_batches_are_faster_than_one_prompt_at_a_time():
    """16 prompts, 4 candidates of 20 tokens, a Llama of 5 M parameters; measured alternately."""
    tokenizer = byte_level_tokenizer()
    settings = common_settings() | {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**settings | {"num_attention_heads": 8})).eval()
    prompt_ids = [tokenizer(f"{number}: {text}")["input_ids"] for number, text in enumerate((TEXTS * 2)[:16])]
    config = SamplingConfig(num_candidates=4, temperature=1.0, max_new_tokens=20)
    engine = TransformersEngine(model, tokenizer, config)

    def ours():
        return [one.token_ids for row in engine.generate(prompt_ids, [[1, 2, 3, 4]] * 16) for one in row]

    def plain():
        return [
            output[len(ids) :].tolist()
            for ids in prompt_ids
            for output in model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=True,
                top_k=0, max_new_tokens=20, num_return_sequences=4,
            )
        ]  # fmt: skip

    rates = {ours: [], plain: []}
    for _ in range(3):
        for way, found in rates.items():
            start = time.perf_counter()
            tokens = sum(map(len, way()))
            found.append(tokens / (time.perf_counter() - start))
    fast, slow = (statistics.median(rates[way][1:]) for way in (ours, plain))
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{size:.1f} M parameters: {fast:.0f} tokens/s, one prompt at a time {slow:.0f}: {fast / slow:.1f}x")
    assert fast > 3 * slow
