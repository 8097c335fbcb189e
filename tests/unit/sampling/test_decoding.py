"""Sampled tokens as text: spaces, end tokens, stop strings, and the same tokens back for training."""

import shutil
import string
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from tests.support.sampling import PROMPTS, SETTINGS, TEXTS, answer, chat, greedy, plain_logps
from trl_ext.data.tokens import tokenize_candidates
from trl_ext.sampling.candidates import sample_candidates
from trl_ext.sampling.config import SamplingConfig
from trl_ext.sampling.decoding import decode, decode_behind
from trl_ext.sampling.engine import Generated
from trl_ext.sampling.transformers_engine import TransformersEngine


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
