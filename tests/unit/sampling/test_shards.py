"""Folders of samples: killed and resumed, refused where they are of something else."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.sampling import PROMPTS, SETTINGS, TEMPLATE, by_number, shard_files
from trl_ext.runtime.files import checksum, read_sealed, sealed
from trl_ext.runtime.fingerprints import model_fingerprint
from trl_ext.sampling.candidates import sample_candidates
from trl_ext.sampling.config import SamplingConfig
from trl_ext.sampling.shards import _default_shard_size, _read_shard, _shard


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
        ((tmp_path / "trained", PROMPTS, config), {}, "other settings: model was 'sha256:.*' and is 'sha256:.*'. Re"),
        ((tmp_path / "other-template", PROMPTS, config), {}, "other settings: chat_template was '.*' and is '.*'. Re"),
        ((sampler_dir, PROMPTS[:5], config), {}, "other settings: prompts was [^,]*. Restore the settings"),
        ((sampler_dir, PROMPTS, vllm), {}, "other settings: sampling_engine was 'transformers' and is 'vllm'. R"),
        ((sampler_dir, PROMPTS, config), {"shard_size": 3}, "other settings: shard_size was 12 and is 3. Restore"),
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
    with pytest.raises(FileExistsError, match="other settings: min_p was 0.0 and is 0.1. Restore"):
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
        with pytest.raises(FileExistsError, match=r"other settings: vllm_args was \{'quantization': 'fp8'\} and is"):
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
