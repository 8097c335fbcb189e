"""Candidates for prompts: what must not matter, what is mixed in, which models and prompts are refused."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from tests.support.sampling import (
    PROMPTS,
    SETTINGS,
    TEMPLATE,
    TEXTS,
    FakeVllm,
    answer,
    by_number,
    chat,
    greedy,
    plain_generate,
)
from trl_ext.data.messages import template_kwargs
from trl_ext.data.prompts import prompt_token_ids
from trl_ext.data.tokens import tokenize_candidates
from trl_ext.playground.model import byte_level_tokenizer
from trl_ext.runtime.files import checksum
from trl_ext.runtime.models import sampling_dtype
from trl_ext.sampling.candidates import sample_candidates
from trl_ext.sampling.config import SamplingConfig
from trl_ext.sampling.shards import _shard


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
        "  1 prompts skipped: no usable candidate",
    ]
    config.keep_duplicates = True
    rows, _ = sampled(records, keep_empty=True)
    assert [row["completions"] for row in rows] == [["x", "y", "x", " "], ["", "\n", "", ""], ["a", "b", "a", "a"]]
    with pytest.raises(ValueError, match="None of the 4 prompts has a usable candidate: all candidates are empty"):
        sampled([{**record, "text": [" "] * len(record["text"])} for record in records])


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
    with pytest.raises(ValueError, match=r"`mix_in` must name columns of the rows, got 'best'. Row 0 has"):
        sample_candidates(sampler_dir, PROMPTS, SamplingConfig(), tmp_path, mix_in=["best"])
    rows = [{**PROMPTS[0], "chosen": answer("4")}]
    with pytest.raises(
        ValueError, match="Row 0: 'chosen', which `mix_in` names, must be text as the prompt is, .* all text"
    ):
        sample_candidates(sampler_dir, rows, SamplingConfig(), tmp_path, mix_in=["chosen"])
    for rows, message in [
        ([], "`rows` must hold prompts, got none"),
        ([{"text": "x"}], r"Row 0: `prompt` must be text or .*, got None. The columns are \['text'\]"),
        ([{"prompt": ""}], "`prompt` must be text or a list of messages, got ''"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample_candidates(sampler_dir, rows, SamplingConfig(), tmp_path)
    with pytest.raises(ValueError, match="`shard_size` must be at least 1, got 0"):
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


@pytest.mark.parametrize(("limit", "fitting"), [(None, [100, 40, 5]), (68, [40, 5]), (1000, [100, 40, 5])])
def test_vllm_may_be_given_a_shorter_window(limit, fitting, sampler_dir, tmp_path, fake_vllm):
    rows = [{"prompt": "x" * length} for length in (100, 40, 5, 101)]
    config = fake_vllm(**({} if limit is None else {"max_model_len": limit}), enforce_eager=True)
    sampled, report = sample_candidates(sampler_dir, rows, config, tmp_path)
    assert [len(row["prompt"]) for row in sampled] == fitting and report.num_too_long == 4 - len(fitting)
    (settings,) = FakeVllm.started
    assert settings == {"dtype": "float32", "engine_args": {"revision": "main", "trust_remote_code": False}}


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
    with pytest.raises(FileExistsError, match="other settings: dtype was 'bfloat16' and is 'float32'. Restore"):
        sample_candidates(half, PROMPTS[:2], config, tmp_path / "bfloat16")
    monkeypatch.setattr("trl_ext.runtime.models.process_state", lambda: SimpleNamespace(device=torch.device("cuda")))
    assert [sampling_dtype(model) for model in (half, sampler_dir)] == ["bfloat16", "float32"]


def test_a_model_that_never_ends_is_refused_before_its_weights_are_read(tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    LlamaConfig(eos_token_id=None).save_pretrained(tmp_path / "model")  # and nothing else
    with pytest.raises(ValueError, match="The model's generation config or the tokenizer must have an end-of-seq"):
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


def test_a_string_is_one_string():
    config = SamplingConfig(stop_strings="END", role_markers="\nUser:")
    assert (config.stop_strings, config.role_markers) == (["END"], ["\nUser:"])
    with pytest.raises(ValueError, match="`stop_strings` must be without empty strings"):
        SamplingConfig(stop_strings="")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_candidates": 0}, "`num_candidates` must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
        ({"sampling_batch_size": 0}, "`sampling_batch_size` must be at least 1, got 0"),
        ({"temperature": -0.1}, r"`temperature` must be 0 .greedy. or a positive number, got -0.1"),
        ({"temperature": float("inf")}, "`temperature` must be .*, got inf"),
        ({"temperature": float("nan")}, "`temperature` must be .*, got nan"),
        ({"top_p": 0.0}, "`top_p` must be above 0 and at most 1 .1 switches it off., got 0.0"),
        ({"top_p": 1.1}, "`top_p` must be .*, got 1.1"),
        ({"top_k": -1}, "`top_k` must be at least 0 .0 switches it off., got -1"),
        ({"min_p": -0.1}, "`min_p` must be from 0 to 1 .0 switches it off., got -0.1"),
        ({"min_p": 1.1}, "`min_p` must be .*, got 1.1"),
        ({"min_p": float("nan")}, "`min_p` must be .*, got nan"),
        ({"temperature": 0.0}, "`num_candidates` must be 1 where `temperature` is 0 .greedy., got 4. Raise"),
        ({"sampling_engine": "hf"}, "`sampling_engine` must be one of transformers, vllm, got 'hf'"),
        ({"sampling_engine": "vllm"}, "`vllm_python` must be set where .*, got None. Set it to the interpreter"),
        ({"vllm_python": "python"}, "`sampling_engine` must be 'vllm' where `vllm_python` or `vllm_args` is set, got"),
        (
            {"vllm_args": "{x", "sampling_engine": "vllm", "vllm_python": "python"},
            "`vllm_args` must be JSON, got '{x'",
        ),
        (
            {"vllm_args": "[1]", "sampling_engine": "vllm", "vllm_python": "python"},
            r"`vllm_args` must be values by name, got \[1\]. Write it like",
        ),
        (
            {"vllm_args": {"max_model_len": 128}, "sampling_engine": "vllm", "vllm_python": "python"},
            r"`max_model_len` in `vllm_args` must be a number of tokens above `max_new_tokens` .128., got 128",
        ),
        ({"stop_strings": [""]}, r"`stop_strings` must be without empty strings, got \[''\]"),
        ({"role_markers": ["a", ""]}, "`role_markers` must be without empty strings"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)
