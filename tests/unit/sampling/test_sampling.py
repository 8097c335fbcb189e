"""
Candidates: against plain `generate`, against a slow and obvious sampler, and whatever must not matter.

Run as a script under torchrun, this file is the worker of its own test on two processes.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import statistics
import string
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from scipy.stats import chisquare
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from tests.support.sampling import PROMPTS, SETTINGS, TEXTS, by_number, common_settings, tiny_model, torchrun
from trl_ext.data.messages import template_kwargs
from trl_ext.data.prompts import prompt_token_ids
from trl_ext.data.tokens import tokenize_candidates
from trl_ext.playground.model import byte_level_tokenizer
from trl_ext.runs.process import PRELOADED
from trl_ext.runtime.files import checksum, read_sealed, sealed
from trl_ext.runtime.fingerprints import model_fingerprint
from trl_ext.runtime.models import sampling_dtype
from trl_ext.sampling.candidates import candidate_seed, sample_candidates
from trl_ext.sampling.config import SamplingConfig
from trl_ext.sampling.decoding import decode, decode_behind
from trl_ext.sampling.engine import Generated
from trl_ext.sampling.shards import _default_shard_size, _read_shard, _shard
from trl_ext.sampling.transformers_engine import TransformersEngine, keeps_keys_and_values


def chat(row):
    return {**row, "prompt": [{"role": "user", "content": row["prompt"]}]}


def answer(text):
    return [{"role": "assistant", "content": text}]


def plain_generate(model, ids, max_new_tokens):
    """One prompt at a time, with nothing of ours."""
    inputs = torch.tensor([ids])
    output = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=max_new_tokens
    )
    return output[0, len(ids) :].tolist()


def plain_logps(model, ids, token_ids):
    with torch.no_grad():
        logps = model(torch.tensor([ids + token_ids])).logits[0].log_softmax(dim=-1)
    return [logps[len(ids) - 1 + place, token].item() for place, token in enumerate(token_ids)]


def greedy(model, prompt_ids, segment=4, max_new_tokens=22, batch_size=64):
    config = SamplingConfig(
        num_candidates=1, temperature=0, max_new_tokens=max_new_tokens, sampling_batch_size=batch_size
    )
    engine = TransformersEngine(model, byte_level_tokenizer(), config, segment=segment)
    return [row[0] for row in engine.generate(prompt_ids, [[0]] * len(prompt_ids))]


def assert_greedy_equals_generate(model, prompt_ids, **kwargs):
    generated = greedy(model, prompt_ids, **kwargs)
    for ids, one in zip(prompt_ids, generated, strict=True):
        assert one.token_ids == plain_generate(model, ids, 22), len(ids)
        assert one.logps == pytest.approx(plain_logps(model, ids, one.token_ids), abs=1e-3)
        assert one.finished == (one.token_ids[-1] == byte_level_tokenizer().eos_token_id)
    assert sum(len(set(one.token_ids)) for one in generated) > 5 * len(generated), "they say something"
    return generated


# the engine


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


def test_nothing_of_a_generation_config_counts_but_its_end_tokens(sampler_dir, sampler, tokenizer, tmp_path):
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    plain = greedy(sampler, ids)
    other_end = max((token for one in plain for token in one.token_ids[1:]), key=[*range(300)].index)
    model = AutoModelForCausalLM.from_pretrained(sampler_dir)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, other_end], do_sample=True, temperature=0.01, top_k=3, top_p=0.5,
        repetition_penalty=5.0, suppress_tokens=plain[0].token_ids[:1], max_length=7, no_repeat_ngram_size=1,
        cache_implementation="static",
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    cut_short = 0
    for one, other in zip(plain, greedy(model, ids), strict=True):
        length = one.token_ids.index(other_end) + 1 if other_end in one.token_ids else len(one.token_ids)
        assert other.token_ids == one.token_ids[:length] and other.logps == pytest.approx(one.logps[:length], abs=1e-4)
        assert other.finished == (one.finished or length < len(one.token_ids) or other_end == one.token_ids[-1])
        cut_short += length < len(one.token_ids)
    assert cut_short
    assert model.generation_config.repetition_penalty == 5.0, "the model is given back as it came"


# what does not matter


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_batch_size_does_not_matter(batch_size, sampler_dir, unlimited, tmp_path):
    config = SamplingConfig(**SETTINGS, sampling_batch_size=batch_size)
    widths, forward = set(), transformers.LlamaForCausalLM.forward

    def watched(self, input_ids=None, **kwargs):
        widths.add(len(input_ids))
        return forward(self, input_ids=input_ids, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.LlamaForCausalLM, "forward", watched)
        rows, _ = sample_candidates(sampler_dir, PROMPTS, config, tmp_path)
    assert by_number(rows) == by_number(unlimited)
    assert max(widths) == (batch_size if batch_size < 3 else 6), "never more rows at a time, prompts in one piece"


def test_the_order_of_the_prompts_does_not_matter(sampler_dir, unlimited, tmp_path):
    shuffled = [PROMPTS[index] for index in np.random.default_rng(0).permutation(len(PROMPTS))]
    rows, _ = sample_candidates(sampler_dir, shuffled, SamplingConfig(**SETTINGS), tmp_path, shard_size=5)
    assert [row["number"] for row in rows] == [row["number"] for row in shuffled]
    assert by_number(rows) == by_number(unlimited)


def test_candidates_differ_and_so_do_seeds_and_repeated_prompts(sampler_dir, unlimited, tmp_path):
    assert all(len(set(row["completions"])) > 1 for row in unlimited)
    rows, _ = sample_candidates(sampler_dir, [*PROMPTS[1:3], PROMPTS[1]], SamplingConfig(**SETTINGS), tmp_path / "a")
    assert rows[0]["completions"] == unlimited[1]["completions"], "the first of them is what it is alone"
    assert not long_ones(rows[0]) & long_ones(rows[2])
    config = SamplingConfig(**SETTINGS, sampling_seed=43)
    others, _ = sample_candidates(sampler_dir, PROMPTS[1:3], config, tmp_path / "b")
    assert not long_ones(others[0]) & long_ones(rows[0])


def long_ones(row):
    """Not those that two draws may have in common."""
    found = {text for text in row["completions"] if len(text) > 3}
    assert len(found) >= 2
    return found


def work(job_file):
    """What each process does in the test on two of them."""
    job = json.loads(Path(job_file).read_text())
    rows, report = sample_candidates(
        job["model"], PROMPTS, SamplingConfig(**SETTINGS), Path(job_file).with_name("candidates"), shard_size=2
    )
    state = PartialState()
    seen = {"rows": rows, "report": str(report), "world": state.num_processes}
    Path(job_file).with_name(f"process-{state.process_index}.json").write_text(json.dumps(seen))


@pytest.mark.slow  # as a stage of a run it is tested with those
def test_the_number_of_processes_does_not_matter(sampler_dir, unlimited, tmp_path):
    (tmp_path / "job.json").write_text(json.dumps({"model": sampler_dir}))
    done = torchrun(__file__, tmp_path / "job.json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    first, second = (json.loads((tmp_path / f"process-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and first["world"] == 2
    assert by_number(first["rows"]) == by_number(unlimited)
    # one process goes on with what two have begun
    (tmp_path / "candidates" / "shards" / "00003.jsonl").unlink()
    rows, report = sample_candidates(
        sampler_dir, PROMPTS, SamplingConfig(**SETTINGS), tmp_path / "candidates", shard_size=2
    )
    assert by_number(rows) == by_number(unlimited) and str(report) == first["report"]


# text


def test_cuts(sampler_dir, sampler, tokenizer, unlimited, tmp_path):
    """Every other character of an answer is made a stop string, and another one a role marker."""
    texts = [text for row in unlimited for text in row["completions"]]
    letters = sorted({letter for text in texts for letter in text if letter.isascii() and letter.isprintable()})
    settings = {**SETTINGS, "stop_strings": letters[:20:2], "role_markers": letters[20:40:2]}
    rows, report = sample_candidates(sampler_dir, PROMPTS, SamplingConfig(**settings), tmp_path, keep_empty=True)
    ends = []
    for row, whole in zip(rows, unlimited, strict=True):
        ids = tokenizer(row["prompt"])["input_ids"]
        for text, logp, num_tokens, before, tokens_before in zip(
            row["completions"], row["logps"], row["num_tokens"], whole["completions"], whole["num_tokens"], strict=True
        ):
            place = next((i for i, letter in enumerate(before) if letter in letters[:40:2]), None)
            ends.append("none" if place is None else "stop" if before[place] in letters[:20] else "marker")
            assert text == before[:place] if place is not None else text == before
            if place is None:
                assert num_tokens == tokens_before
            elif "\ufffd" not in before:  # then letters are tokens
                assert num_tokens == len(text.encode())
                tokens = tokenizer(text)["input_ids"]
                assert logp == pytest.approx(sum(plain_logps(sampler, ids, tokens)) if tokens else 0, abs=1e-4)
            else:
                assert num_tokens < tokens_before or not text
    assert min(map(ends.count, ("none", "stop", "marker"))) >= 3, ends
    assert report.cut_at_role_marker == pytest.approx(ends.count("marker") / len(ends))


def test_logps_are_those_of_the_tokens(sampler, tokenizer):
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    config = SamplingConfig(num_candidates=2, max_new_tokens=11)
    generated = TransformersEngine(sampler, tokenizer, config).generate(ids, [[1, 2]] * 12)
    for prompt, row in zip(ids, generated, strict=True):
        for one in row:
            assert one.logps == pytest.approx(plain_logps(sampler, prompt, one.token_ids), abs=1e-4)


def test_an_end_token_that_is_not_special_is_not_part_of_the_text(sampler_dir, sampler, tokenizer, tmp_path):
    shutil.copytree(sampler_dir, tmp_path / "model")
    one = greedy(sampler, [tokenizer(TEXTS[1])["input_ids"]])[0]
    end = next(i for i, token in enumerate(one.token_ids) if i > 2 and token not in one.token_ids[:i])
    GenerationConfig(eos_token_id=one.token_ids[end]).save_pretrained(tmp_path / "model")
    config = SamplingConfig(num_candidates=1, temperature=0, max_new_tokens=22)
    rows, report = sample_candidates(tmp_path / "model", PROMPTS[1:2], config, tmp_path / "candidates")
    assert rows[0]["completions"] == [tokenizer.decode(one.token_ids[:end])]
    assert rows[0]["num_tokens"] == [end + 1] and rows[0]["logps"] == pytest.approx([sum(one.logps[: end + 1])])
    assert report.truncated == 0


def test_shares_and_duplicates_by_hand(sampler_dir, tmp_path):
    config, folder = SamplingConfig(num_candidates=4, max_new_tokens=4), tmp_path / "sampled"

    def sampled(records, **how):
        shutil.rmtree(folder, ignore_errors=True)
        sample_candidates(sampler_dir, PROMPTS[:4], config, folder)
        made_of = json.loads((folder / "sampling.json").read_text())
        del made_of["digest"]
        (folder / "shards" / "00000.jsonl").write_text(_shard(records, checksum(made_of)))
        return sample_candidates(sampler_dir, PROMPTS[:4], config, folder, **how)

    records = [
        {"text": ["x", "y", "x", " "], "num_tokens": [1, 2, 1, 1], "end": ["stop", "length", "stop", "stop"]},
        {"text": ["", "\n", "", ""], "num_tokens": [1, 1, 1, 1], "end": ["stop"] * 4},
        {"text": [], "num_tokens": [], "end": []},
        {"text": ["a", "b", "a", "a"], "num_tokens": [4, 4, 4, 4], "end": ["length"] * 3 + ["role_marker"]},
    ]
    for index, record in enumerate(records):
        record |= {"index": index, "logp": [-float(number) for number in record["num_tokens"]]}
        record["token_ids"] = [[0] * number for number in record["num_tokens"]]
    rows, report = sampled(records)
    assert [(row["number"], row["completions"], row["logps"]) for row in rows] == [
        (0, ["x", "y"], [-1, -2]),
        (3, ["a", "b"], [-4, -4]),
    ]
    assert rows[1]["ends"] == ["role_marker", "length"], "of equal ones one was not cut by its length"
    assert rows[0]["num_tokens"] == [1, 2] and rows[0]["sources"] == ["sampled"] * 2
    assert (report.num_prompts, report.num_candidates) == (2, 12)
    assert (report.num_too_long, report.num_without_candidates) == (1, 1)
    shares = (report.empty, report.duplicate, report.truncated, report.cut_at_role_marker, report.mean_tokens)
    assert shares == pytest.approx((5 / 12, 3 / 12, 4 / 12, 1 / 12, 25 / 12))
    assert str(report).splitlines()[2:] == [
        "  1 prompts skipped: with the answer they exceed the model's window",
        "  1 prompts left out: no usable candidate",
    ]
    config.keep_duplicates = True
    rows, _ = sampled(records, keep_empty=True)
    assert [row["completions"] for row in rows] == [["x", "y", "x", " "], ["", "\n", "", ""], ["a", "b", "a", "a"]]
    with pytest.raises(ValueError, match="None of the 4 prompts has a usable candidate: all candidates are empty"):
        sampled([{**record, "text": [" "] * len(record["text"])} for record in records])


# tokenizers that leave out the space at the beginning of what they decode


WORDS = ("Sure", "thing", "END", "Human")


def sentencepiece_tokenizer(kind, chat_template=None):
    """Characters with "▁" for a space and some words, as the tokenizers of Llama 1 and 2 ("llama") and of T5 have."""
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    merges, characters = [], [character for character in string.printable if not character.isspace()]
    for word in WORDS:
        for length in range(1, len(word) + 1):
            merges.append((("▁" + word)[:length], word[length - 1]))
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *characters]
    vocabulary += ["".join(merge) for merge in merges]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    bpe = models.BPE(vocabulary, list(dict.fromkeys(merges)), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    if kind == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(strip)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        metaspace = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
        tokenizer.decoder = decoders.Sequence(strip if kind == "first" else metaspace)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


class Scripted:
    """An engine that answers what it was told to."""

    max_model_len = None

    def __init__(self, answers):
        self.answers = answers

    def generate(self, prompt_ids, seeds):
        return [[Generated(ids, [-1.0] * len(ids), ids[-1] == 2) for ids in self.answers] for _ in prompt_ids]

    def close(self):
        pass


def sample_scripted(folder, monkeypatch, tokenizer, row, answers, **settings):
    LlamaConfig(max_position_embeddings=512, eos_token_id=2).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    monkeypatch.setattr("trl_ext.sampling.candidates._open_engine", lambda *arguments: Scripted(answers))
    config = SamplingConfig(num_candidates=len(answers), keep_duplicates=True, **settings)
    rows, _ = sample_candidates(folder / "model", [row], config, folder / "candidates", keep_empty=True)
    return rows[0]


@pytest.mark.parametrize("kind", ["llama", "first", "metaspace"])
@pytest.mark.parametrize("prompt", ["Human: hi\n\nAssistant:", "Go on: a, b,", "é\n"])
def test_training_gets_the_sampled_tokens_back(kind, prompt, tmp_path, monkeypatch):
    tokenizer = sentencepiece_tokenizer(kind)
    texts = [" Sure thing", "  Sure", "Sure", " é!", "\n Sure", " ", "Human"]
    prompt_ids = tokenizer(prompt)["input_ids"]
    assert decode(tokenizer, tokenizer(prompt + " Sure")["input_ids"][len(prompt_ids) :]).lstrip() == "Sure"
    sampled = []
    for text in texts:
        ids = tokenizer(prompt + text)["input_ids"]
        assert ids[: len(prompt_ids)] == prompt_ids, text
        sampled.append([*ids[len(prompt_ids) :], 2])
    row = sample_scripted(tmp_path, monkeypatch, tokenizer, {"prompt": prompt}, sampled)
    assert row["completions"] == texts
    assert tokenize_candidates(tokenizer, prompt, row["completions"], eos_token="</s>")[:2] == (prompt_ids, sampled)


@pytest.mark.parametrize(
    ("stop", "text", "whole_tokens"),
    [
        ("END", " Sure ", " Sure"),
        (" END", " Sure", " Sure"),
        ("Sure", " ", ""),
        (" Sure", "", ""),
        ("x", " Sure END ", " Sure END "),
    ],
)
def test_a_space_that_is_not_decoded_alone_is_part_of_a_stop_string(stop, text, whole_tokens, tmp_path, monkeypatch):
    tokenizer, prompt = sentencepiece_tokenizer("llama"), "Assistant:"
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = tokenizer(prompt + " Sure END x")["input_ids"][len(prompt_ids) :]
    row = sample_scripted(tmp_path, monkeypatch, tokenizer, {"prompt": prompt}, [ids], stop_strings=[stop])
    assert row["completions"] == [text]
    pieces = tokenizer.convert_ids_to_tokens(ids[: row["num_tokens"][0]])
    assert "".join(pieces).replace("▁", " ") == whole_tokens and row["logps"] == [-len(pieces)]
    # the engine ends the answer by the same text
    engine = SimpleNamespace(config=SamplingConfig(stop_strings=[stop]), tokenizer=tokenizer, end_ids=[2])
    assert not TransformersEngine._extend(engine, Generated([], [], False), prompt_ids, ids, [0.0] * len(ids))


@pytest.mark.parametrize("kind", ["llama", "first"])
@pytest.mark.parametrize(
    ("reply", "content"),
    [("m.content", " Sure"), ("' ' + m.content", "Sure"), ("' ' + m.content | trim", "Sure"), ("m['no']", "Sure")],
    ids=["none", "space", "trims", "raises"],
)
def test_a_template_may_bring_the_space_along(kind, reply, content, tmp_path, monkeypatch):
    def with_reply(reply):
        return (
            "{% for m in messages %}{% if m.role == 'user' %}Human: {{ m.content }} Assistant:{% else %}"
            "{{ " + reply + " + '</s>' }}{% endif %}{% endfor %}"
        )

    tokenizer = sentencepiece_tokenizer(kind, with_reply("' Sure'" if "no" in reply else reply))
    row = chat({"prompt": "hi"})
    prompt_ids, (sampled,), _ = tokenize_candidates(tokenizer, row["prompt"], [answer(content)])
    assert tokenizer.convert_ids_to_tokens(sampled)[-2:] == ["▁Sure", "</s>"] and prompt_ids
    tokenizer.chat_template = with_reply(reply)
    row = sample_scripted(tmp_path, monkeypatch, tokenizer, row, [sampled])
    assert row["completions"] == [answer(content)]


def test_byte_level_tokens_are_decoded_as_ever(tokenizer):
    generator = np.random.default_rng(0)
    for _ in range(300):
        ids = generator.integers(0, len(tokenizer), size=generator.integers(0, 12)).tolist()
        prompt_ids = tokenizer("Fußgängerübergänge: ".encode()[: 2 * len(ids)].decode(errors="ignore"))["input_ids"]
        assert decode_behind(tokenizer, prompt_ids, ids) == decode(tokenizer, ids)


# mixing in


def test_answers_of_the_data_join_the_sampled_ones(sampler_dir, unlimited, tmp_path):
    known = unlimited[1]["completions"][0]
    row = {**PROMPTS[1], "chosen": "4", "rejected": known, "completions": ["4", " ", "five", None]}
    config = SamplingConfig(**{**SETTINGS, "keep_duplicates": False})
    columns = ["chosen", "rejected", "completions"]
    rows, _ = sample_candidates(sampler_dir, [row], config, tmp_path, mix_in=columns)
    assert rows[0]["completions"] == [*unlimited[1]["completions"], "4", "five"]
    assert rows[0]["sources"] == ["sampled"] * 3 + ["chosen", "completions"]
    assert rows[0]["logps"][3:] == rows[0]["num_tokens"][3:] == [None, None] and None not in rows[0]["logps"][:3]
    assert rows[0]["chosen"] == "4" and rows[0]["number"] == 1
    # nothing is mixed into what is kept
    rows, _ = sample_candidates(sampler_dir, [row], config, tmp_path)
    assert rows[0]["completions"] == unlimited[1]["completions"]
    rows, _ = sample_candidates(sampler_dir, [row], config, tmp_path, mix_in="chosen")
    assert rows[0]["completions"] == [*unlimited[1]["completions"], "4"]


def test_conversations_may_repeat_the_prompt(sampler_dir, tmp_path):
    row = chat(PROMPTS[2])
    prompt = [{**row["prompt"][0], "name": None}]  # a table fills in keys that other rows have
    row |= {
        "chosen": prompt + answer("4"),
        "rejected": answer("5"),
        "reply": "six",
        "completions": [answer("4"), prompt + answer("7"), answer(" "), prompt],
    }
    columns = ["chosen", "rejected", "reply", "completions"]
    rows, _ = sample_candidates(sampler_dir, [row], SamplingConfig(max_new_tokens=20), tmp_path, mix_in=columns)
    num_sampled = rows[0]["sources"].count("sampled")
    assert num_sampled and rows[0]["sources"] == ["sampled"] * num_sampled + columns
    assert rows[0]["completions"][num_sampled:] == [answer(text) for text in ("4", "5", "six", "7")]
    assert all(one == answer(one[0]["content"]) for one in rows[0]["completions"])


def test_wrong_columns_to_mix_in(sampler_dir, tmp_path):
    with pytest.raises(ValueError, match=r"`mix_in` names the column 'best', and row 0 has \['number', 'prompt'\]"):
        sample_candidates(sampler_dir, PROMPTS, SamplingConfig(), tmp_path, mix_in=["best"])
    rows = [{**PROMPTS[0], "chosen": answer("4")}]
    with pytest.raises(
        ValueError, match="'chosen', which in row 0 does not hold text as the prompt does: .* all text"
    ):
        sample_candidates(sampler_dir, rows, SamplingConfig(), tmp_path, mix_in=["chosen"])
    for rows, message in [
        ([], "There are no prompts"),
        ([{"text": "x"}], r"Row 0 has no prompt \(its columns are \['text'\]\)"),
        ([{"prompt": ""}], "`prompt` is ''. It has to be text or a list of messages"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample_candidates(sampler_dir, rows, SamplingConfig(), tmp_path)
    with pytest.raises(ValueError, match="shard_size=0"):
        sample_candidates(sampler_dir, PROMPTS, SamplingConfig(), tmp_path, shard_size=0)
    assert not list(tmp_path.iterdir())


def test_prompts_too_long_for_the_window_are_skipped_and_counted(sampler_dir, tmp_path):
    config = SamplingConfig(num_candidates=2, max_new_tokens=28)
    rows = [{"prompt": "x" * length, "chosen": "c"} for length in (100, 101, 5)]
    sampled, report = sample_candidates(sampler_dir, rows, config, tmp_path / "a")
    assert [len(row["prompt"]) for row in sampled] == [100, 5]
    assert (report.num_prompts, report.num_candidates) == (2, 4)
    assert (report.num_too_long, report.num_without_candidates) == (1, 0)
    mixed, report = sample_candidates(sampler_dir, rows, config, tmp_path / "a", mix_in=["chosen"])
    assert mixed[1]["completions"] == ["c"] and (report.num_too_long, report.num_without_candidates) == (1, 0)
    with pytest.raises(ValueError, match="None of the 1 prompts has a usable candidate: .* exceed the model's window"):
        sample_candidates(sampler_dir, rows[1:2], config, tmp_path / "b")


class FakeVllm:
    """Takes what `VllmEngine` takes, and answers with one token."""

    started: list[dict] = []

    def __init__(self, model, config, **settings):
        FakeVllm.started.append(settings)
        self.max_model_len = (config.vllm_args or {}).get("max_model_len", 128)

    def generate(self, prompt_ids, seeds):
        assert all(len(ids) + 28 <= self.max_model_len for ids in prompt_ids)
        return [[Generated([7, 2], [-1.0, -1.0], True) for _ in row] for row in seeds]

    def close(self):
        pass


@pytest.fixture
def fake_vllm(monkeypatch):
    monkeypatch.setattr("trl_ext.sampling.vllm_engine.VllmEngine", FakeVllm)
    monkeypatch.setattr(FakeVllm, "started", [])
    kwargs = {"sampling_engine": "vllm", "vllm_python": "python", "num_candidates": 2, "max_new_tokens": 28}

    def config(**vllm_args):
        return SamplingConfig(**kwargs, vllm_args=vllm_args)

    return config


@pytest.mark.parametrize(("limit", "fitting"), [(None, [100, 40, 5]), (68, [40, 5]), (1000, [100, 40, 5])])
def test_vllm_may_be_given_a_shorter_window(limit, fitting, sampler_dir, tmp_path, fake_vllm):
    rows = [{"prompt": "x" * length} for length in (100, 40, 5, 101)]
    config = fake_vllm(**({} if limit is None else {"max_model_len": limit}), enforce_eager=True)
    sampled, report = sample_candidates(sampler_dir, rows, config, tmp_path)
    assert [len(row["prompt"]) for row in sampled] == fitting and report.num_too_long == 4 - len(fitting)
    (settings,) = FakeVllm.started
    assert settings == {"dtype": "float32", "engine_args": {"revision": "main", "trust_remote_code": False}}


# models and prompts


def test_the_dtype_is_the_same_for_all_engines_and_said(sampler_dir, tmp_path, monkeypatch):
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(sampler_dir, dtype=torch.bfloat16).save_pretrained(half)
    byte_level_tokenizer().save_pretrained(half)
    given = [None, "auto", "float16", torch.float16]
    assert [sampling_dtype(half, dtype) for dtype in given] == ["float32", "bfloat16", "float16", "float16"]
    config = SamplingConfig(num_candidates=1, max_new_tokens=3)
    seen, load = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *a, **k: seen.append(load(*a, **k)) or seen[-1]
    )
    for dtype, name in [(None, "float32"), ("auto", "bfloat16")]:
        folder = tmp_path / name
        _, report = sample_candidates(half, PROMPTS[:2], config, folder, model_init_kwargs={"dtype": dtype})
        assert seen[-1].dtype == getattr(torch, name)
        assert report.dtype == name and f"candidates in {name}, " in str(report)
    with pytest.raises(FileExistsError, match="something else: dtype was 'bfloat16' and is 'float32'. Go on"):
        sample_candidates(half, PROMPTS[:2], config, tmp_path / "bfloat16")
    monkeypatch.setattr("trl_ext.runtime.models.process_state", lambda: SimpleNamespace(device=torch.device("cuda")))
    assert [sampling_dtype(model) for model in (half, sampler_dir)] == ["bfloat16", "float32"]


def test_a_model_that_never_ends_is_refused_before_its_weights_are_read(tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    LlamaConfig(eos_token_id=None).save_pretrained(tmp_path / "model")  # and nothing else
    with pytest.raises(ValueError, match="Neither the model's generation config nor the tokenizer has an end-of-seq"):
        sample_candidates(tmp_path / "model", PROMPTS, SamplingConfig(), tmp_path / "candidates")
    assert not (tmp_path / "candidates").exists()
    for ends in (GenerationConfig(eos_token_id=3), LlamaConfig(eos_token_id=[3])):  # in either place
        ends.save_pretrained(tmp_path / "model")
        with pytest.raises(OSError, match="no file named|safetensors"):  # the weights come next
            sample_candidates(tmp_path / "model", PROMPTS, SamplingConfig(), tmp_path / type(ends).__name__)
        (tmp_path / "model" / "generation_config.json").unlink(missing_ok=True)


def test_an_adapter_is_sampled_from(sampler_dir, tokenizer, unlimited, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(sampler_dir)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    config = SamplingConfig(num_candidates=1, temperature=0, max_new_tokens=22)
    asked = [*PROMPTS, {"prompt": "x" * 107, "number": 12}]
    rows, report = sample_candidates(tmp_path / "adapter", asked, config, tmp_path / "candidates", keep_empty=True)
    assert report.num_too_long == 1, "the window is that of the base"
    unchanged, merged = AutoModelForCausalLM.from_pretrained(sampler_dir), model.merge_and_unload()
    answers = []
    for model in (merged, unchanged):
        found = [plain_generate(model, tokenizer(text)["input_ids"], 22) for text in TEXTS]
        answers.append([[tokenizer.decode(ids, skip_special_tokens=True)] for ids in found])
    assert [row["completions"] for row in rows] == answers[0] != answers[1]


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}: {{ message['content'] }}{% if tools %} "
    "[{{ tools | map(attribute='function') | map(attribute='name') | join(',') }}]{% endif %}{{ mood or '' }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


def test_conversations_are_rendered_as_in_training(sampler_dir, sampler, tmp_path):
    shutil.copytree(sampler_dir, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(sampler_dir)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    tools = [{"type": "function", "function": {"name": "look_up", "description": "", "parameters": {}}}]
    rows = [
        {**chat(PROMPTS[1]), "tools": json.dumps(tools), "chat_template_kwargs": {"mood": "!"}},
        {**chat(PROMPTS[3]), "tools": None, "chat_template_kwargs": None},
    ]
    texts = ["user: What is 2 + 2?  [look_up]!", "user: Say yes. "]
    config = SamplingConfig(num_candidates=1, temperature=0, max_new_tokens=22)
    sampled, _ = sample_candidates(tmp_path / "model", rows, config, tmp_path / "candidates")
    for row, text, found in zip(rows, texts, sampled, strict=True):
        ids = prompt_token_ids(tokenizer, row)
        assert tokenizer.decode(ids) == f"<|im_start|>{text}<|im_end|><|im_start|>assistant: "
        assert ids == tokenize_candidates(tokenizer, row["prompt"], [answer("x")], **template_kwargs(row))[0]
        expected = tokenizer.decode(plain_generate(sampler, ids, 22), skip_special_tokens=True)
        assert found["completions"] == [answer(expected)]


# folders


def shard_files(folder):
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in sorted(folder.glob("shards/*.jsonl"))}


MANY = [{"prompt": f"{number}: {text}", "number": number} for number, text in enumerate(TEXTS * 2)]


def sample_many(model, folder):
    return sample_candidates(model, MANY, SamplingConfig(**SETTINGS), folder, shard_size=1)


def test_killed_and_resumed(sampler_dir, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))  # it is one for all tests, and those of stages need it like that
    process = context.Process(target=sample_many, args=(sampler_dir, tmp_path / "killed"))
    process.start()
    deadline = time.monotonic() + 120
    while len(shard_files(tmp_path / "killed")) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    finished = shard_files(tmp_path / "killed")
    assert process.exitcode == -9 and 3 <= len(finished) < len(MANY), "killed half-way"
    rows, report = sample_many(sampler_dir, tmp_path / "killed")
    now = shard_files(tmp_path / "killed")
    assert len(now) == len(MANY) and {name: now[name] for name in finished} == finished, "nothing is made again"
    expected, expected_report = sample_many(sampler_dir, tmp_path / "whole")
    assert rows == expected and report == expected_report


def test_a_folder_of_something_else_is_refused(sampler_dir, tmp_path, unlimited):
    folder, config = tmp_path / "candidates", SamplingConfig(**SETTINGS)
    sample_candidates(sampler_dir, PROMPTS, config, folder)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    files = shard_files(folder)
    shutil.copytree(sampler_dir, tmp_path / "moved")
    shutil.copytree(sampler_dir, tmp_path / "trained")
    model = AutoModelForCausalLM.from_pretrained(sampler_dir)
    model.lm_head.weight.data[5, 5] += 1e-3
    model.save_pretrained(tmp_path / "trained")
    tokenizer = AutoTokenizer.from_pretrained(sampler_dir)
    tokenizer.chat_template = TEMPLATE
    shutil.copytree(sampler_dir, tmp_path / "other-template")
    tokenizer.save_pretrained(tmp_path / "other-template")
    changed = {**SETTINGS, "temperature": 0.5, "sampling_seed": 7, "role_markers": None}
    vllm = SamplingConfig(**SETTINGS, sampling_engine="vllm", vllm_python="python")  # draws in its own way
    for arguments, kwargs, message in [
        ((tmp_path / "trained", PROMPTS, config), {}, "something else: model was 'sha256:.*' and is 'sha256:.*'. Go"),
        ((tmp_path / "other-template", PROMPTS, config), {}, "something else: chat_template was '.*' and is '.*'. Go"),
        ((sampler_dir, PROMPTS[:5], config), {}, "something else: prompts was [^,]*. Go on with what they were"),
        ((sampler_dir, PROMPTS, vllm), {}, "something else: sampling_engine was 'transformers' and is 'vllm'. Go on"),
        ((sampler_dir, PROMPTS, config), {"shard_size": 3}, "something else: shard_size was 12 and is 3. Go on"),
        (
            (sampler_dir, PROMPTS, SamplingConfig(**changed)), {},
            r"role_markers was \['.*'\] and is None, sampling_seed was 42 and is 7, temperature was 1.0 and is 0.5",
        ),
    ]:  # fmt: skip
        with pytest.raises(FileExistsError, match=message):
            sample_candidates(*arguments, folder, **kwargs)
    same = SamplingConfig(**SETTINGS, sampling_batch_size=5)
    same.role_markers = tuple(same.role_markers)  # as good as a list
    rows, _ = sample_candidates(tmp_path / "moved", PROMPTS, same, folder, mix_in=["prompt"])
    assert rows[3]["completions"] == [*unlimited[3]["completions"], PROMPTS[3]["prompt"]]
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert shard_files(folder) == files


def test_candidates_from_before_an_option_was_added_are_kept(sampler_dir, tmp_path, unlimited):
    """Their shards have a hash over the settings of that time."""
    config = SamplingConfig(**SETTINGS)
    sample_candidates(sampler_dir, PROMPTS, config, tmp_path, shard_size=5)
    of_now = read_sealed(tmp_path / "sampling.json", {})
    of_then = {name: value for name, value in of_now.items() if name not in ("min_p", "stop_strings")}
    assert len(of_then) == len(of_now) - 2
    (tmp_path / "sampling.json").write_text(sealed(of_then))
    for shard in (tmp_path / "shards").iterdir():
        shard.write_text(_shard(_read_shard(shard, checksum(of_now)), checksum(of_then)))
    (tmp_path / "shards" / "00001.jsonl").unlink()
    before = shard_files(tmp_path)
    with pytest.raises(FileExistsError, match="something else: min_p was 0.0 and is 0.1. Go on"):
        sample_candidates(sampler_dir, PROMPTS, SamplingConfig(**SETTINGS, min_p=0.1), tmp_path)
    rows, _ = sample_candidates(sampler_dir, PROMPTS, config, tmp_path)
    assert by_number(rows) == by_number(unlimited)
    assert len(before) == 2 and shard_files(tmp_path).items() > before.items()


def changed_files(folder):
    """Copies of a model, each with something else in one file, and whether its answers may depend on it."""

    def replace(file, old, new):
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    config = json.loads((folder / "config.json").read_text())
    for name, change, counts in [
        ("config.json", lambda file: file.write_text(json.dumps({**config, "rope_theta": 7.0})), True),
        ("config.json", lambda file: file.write_text(json.dumps({**config, "_name_or_path": "/elsewhere"})), False),
        ("generation_config.json", lambda file: file.write_text('{"eos_token_id": [2, 9]}'), True),
        ("tokenizer.json", lambda file: replace(file, '"use_regex": false', '"use_regex": true'), True),
        ("tokenizer_config.json", lambda file: replace(file, "<|pad|>", "<|im_start|>"), True),
        ("chat_template.jinja", lambda file: file.write_text("another"), True),
        ("modeling_own.py", lambda file: file.write_text("another"), True),
        ("training_args.bin", lambda file: file.write_text("another"), False),
        ("trainer_state.json", lambda file: file.write_text("{}"), False),
        ("README.md", lambda file: file.write_text("another"), False),
    ]:
        copy = folder.with_name(f"{folder.name}-{name}-{counts}")
        shutil.copytree(folder, copy)
        change(copy / name)
        yield name, copy, counts


def test_a_model_is_known_by_all_its_answers_depend_on(sampler_dir, tokenizer, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(sampler_dir, model)
    fingerprint = model_fingerprint(model)
    for name, copy, counts in changed_files(model):
        assert (model_fingerprint(copy) != fingerprint) == counts, name
    base = AutoModelForCausalLM.from_pretrained(model)
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    before = model_fingerprint(tmp_path / "adapter")
    shutil.copytree(model, tmp_path / "moved")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "moved")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert model_fingerprint(tmp_path / "adapter") == before, "an equal base in another folder"
    base.lm_head.weight.data[5, 5] += 1e-3
    base.save_pretrained(tmp_path / "moved")
    assert model_fingerprint(tmp_path / "adapter") != before, "another base"
    # and each file is read once, until it is another
    read, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, *a: read.append(Path(file.name).name) or digest(file, *a))
    assert model_fingerprint(model) == fingerprint and not read
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert model_fingerprint(model) == fingerprint and read == ["model.safetensors"]


def test_only_some_arguments_of_vllm_may_change(sampler_dir, tmp_path, fake_vllm):
    first = fake_vllm(gpu_memory_utilization=0.5, quantization="fp8")
    rows, _ = sample_candidates(sampler_dir, PROMPTS, first, tmp_path)
    other = fake_vllm(quantization="fp8", enforce_eager=True, max_num_seqs=7)
    assert sample_candidates(sampler_dir, PROMPTS, other, tmp_path)[0] == rows
    for given in ({}, {"quantization": "fp8", "max_model_len": 100}, {"quantization": "fp8", "tokenizer": "other"}):
        with pytest.raises(FileExistsError, match=r"something else: vllm_args was \{'quantization': 'fp8'\} and is"):
            sample_candidates(sampler_dir, PROMPTS, fake_vllm(**given), tmp_path)


@pytest.mark.parametrize(
    ("num_prompts", "num_processes", "size"),
    [(1, 1, 1), (64, 1, 64), (65, 1, 33), (128, 8, 16), (3, 8, 1), (1000, 2, 63), (10**6, 8, 64)],
)
def test_every_process_gets_its_share_of_shards(num_prompts, num_processes, size):
    assert _default_shard_size(num_prompts, num_processes) == size <= 64
    num_shards = -(-num_prompts // size)
    assert num_prompts < num_processes or num_shards >= num_processes
    assert -(-num_shards // num_processes) == -(-num_prompts // (64 * num_processes)), "no more rounds than need be"


def test_shards_are_as_they_were_begun(sampler_dir, unlimited, tmp_path):
    sample_candidates(sampler_dir, PROMPTS, SamplingConfig(**SETTINGS), tmp_path, shard_size=5)
    (tmp_path / "shards" / "00001.jsonl").unlink()
    files = shard_files(tmp_path)
    rows, _ = sample_candidates(sampler_dir, PROMPTS, SamplingConfig(**SETTINGS), tmp_path)
    assert by_number(rows) == by_number(unlimited)
    assert len(files) == 2 and shard_files(tmp_path).items() > files.items()


def test_a_string_is_one_string():
    config = SamplingConfig(stop_strings="END", role_markers="\nUser:")
    assert (config.stop_strings, config.role_markers) == (["END"], ["\nUser:"])
    with pytest.raises(ValueError, match="An empty string in stop_strings"):
        SamplingConfig(stop_strings="")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_candidates": 0}, "num_candidates=0: there is nothing to sample. Set it to 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: there is nothing to sample"),
        ({"sampling_batch_size": 0}, "sampling_batch_size=0: "),
        ({"temperature": -0.1}, "temperature=-0.1: a temperature is 0"),
        ({"temperature": float("nan")}, "temperature=nan: a temperature is 0"),
        ({"temperature": float("inf")}, "temperature=inf: a temperature is 0"),
        ({"top_p": 0.0}, "top_p=0.0: set it above 0"),
        ({"top_p": 1.1}, "top_p=1.1: set it above 0, and at most to 1"),
        ({"top_k": -1}, "top_k=-1: set it to 1 or more, or to 0"),
        ({"min_p": -0.1}, "min_p=-0.1: set it to a share from 0, which switches it off, to 1"),
        ({"min_p": 1.1}, "min_p=1.1: set it to a share"),
        ({"min_p": float("nan")}, "min_p=nan: set it to a share"),
        ({"temperature": 0.0}, "num_candidates=4: greedy sampling .* gives one answer. Set a temperature, or 1"),
        ({"sampling_engine": "hf"}, "sampling_engine='hf': not known. Set it to one of transformers, vllm"),
        ({"sampling_engine": "vllm"}, "sampling_engine='vllm': .* Set `vllm_python` to the interpreter"),
        ({"vllm_python": "python"}, "vllm_python and vllm_args would do nothing. Set `sampling_engine` to 'vllm'"),
        (
            {"vllm_args": "{x", "sampling_engine": "vllm", "vllm_python": "python"},
            "vllm_args='{x' is not JSON .*. Mend it",
        ),
        (
            {"vllm_args": "[1]", "sampling_engine": "vllm", "vllm_python": "python"},
            r"vllm_args=\[1\]: no names. Write it like",
        ),
        (
            {"vllm_args": {"max_model_len": 128}, "sampling_engine": "vllm", "vllm_python": "python"},
            "vllm_args={'max_model_len': 128}: max_model_len holds prompt and answer: .* above `max_new_tokens`",
        ),
        ({"stop_strings": [""]}, "An empty string in stop_strings or role_markers would cut every answer to nothing"),
        ({"role_markers": ["a", ""]}, "An empty string in stop_strings or role_markers"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)


@pytest.mark.slow
def test_batches_are_faster_than_one_prompt_at_a_time():
    """16 prompts, 4 candidates of 40 tokens, a Llama of 5 M parameters; measured alternately."""
    tokenizer = byte_level_tokenizer()
    settings = common_settings() | {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**settings | {"num_attention_heads": 8})).eval()
    prompt_ids = [tokenizer(f"{number}: {text}")["input_ids"] for number, text in enumerate((TEXTS * 2)[:16])]
    config = SamplingConfig(num_candidates=4, temperature=1.0, max_new_tokens=40)
    engine = TransformersEngine(model, tokenizer, config)

    def ours():
        return [one.token_ids for row in engine.generate(prompt_ids, [[1, 2, 3, 4]] * 16) for one in row]

    def plain():
        return [
            output[len(ids) :].tolist()
            for ids in prompt_ids
            for output in model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=True,
                top_k=0, max_new_tokens=40, num_return_sequences=4,
            )
        ]  # fmt: skip

    rates = {ours: [], plain: []}
    for _ in range(4):
        for way, found in rates.items():
            start = time.perf_counter()
            tokens = sum(map(len, way()))
            found.append(tokens / (time.perf_counter() - start))
    fast, slow = (statistics.median(rates[way][1:]) for way in (ours, plain))
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{size:.1f} M parameters: {fast:.0f} tokens/s, one prompt at a time {slow:.0f}: {fast / slow:.1f}x")
    assert fast > 3 * slow


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(*sys.argv[1:])
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()
