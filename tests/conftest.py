"""Small models and data that all tests share. Nothing is downloaded."""

import functools
import gc
import importlib.metadata
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# threads that wait by spinning take the cores from the other processes of a test: many times slower
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig

from tests.support.data import PAIRS
from tests.support.large_weights import enlarge
from tests.support.sampling import PROMPTS, SETTINGS, common_settings, tiny_model
from tests.support.schedule import (  # noqa: F401
    pytest_collection_modifyitems,
    pytest_runtest_setup,
    pytest_terminal_summary,
    pytest_xdist_make_scheduler,
)
from trl_ext.playground.model import byte_level_tokenizer, save_byte_level_model
from trl_ext.sampling.candidates import sample_candidates
from trl_ext.sampling.config import SamplingConfig

disable_progress_bars()
# read from files again at every step of a trainer, by accelerate
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)


@pytest.fixture(scope="module", autouse=True)
def imports_are_left_alone():
    """By the garbage collector: trainers call it, and all modules are looked through each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A byte-level Llama of about 50 000 parameters."""
    directory = tmp_path_factory.mktemp("model")
    return str(save_byte_level_model(directory, hidden_size=32, num_layers=2, max_position_embeddings=512))


@pytest.fixture
def model(model_dir):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    enlarge(model)
    return model


@pytest.fixture(scope="session")
def tokenizer(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="session")
def gpt2(tokenizer, tmp_path_factory):
    """A model with 24 learned positions."""
    folder = tmp_path_factory.mktemp("gpt2")
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=24, n_embd=16, n_layer=1, n_head=2))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pairs():
    return Dataset.from_list(PAIRS)


@pytest.fixture
def chat_pairs():
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
            }
            for row in PAIRS
        ]
    )


@pytest.fixture
def ranked():
    """Ragged lists, with a tie and an all-equal row."""
    return Dataset.from_list(
        [
            {"prompt": "a? ", "completions": ["x", "yy", "zzz"], "scores": [0.1, 0.9, 0.5]},
            {"prompt": "bb? ", "completions": ["one", "two"], "scores": [1.0, 2.0]},
            {"prompt": "c ", "completions": ["p", "q", "rr", "s"], "scores": [0.5, 0.5, 0.1, 0.9]},
            {"prompt": "dd ", "completions": ["same", "score"], "scores": [1.0, 1.0]},
        ]
    )


@pytest.fixture
def config_kwargs(tmp_path):
    """Settings under which two runs can be compared number by number."""
    return {
        "output_dir": str(tmp_path / "out"),
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "activation_checkpointing": False,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "num_train_epochs": 1,
        "disable_tqdm": True,
    }


@pytest.fixture(scope="module")
def sampler_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "sampler"
    tiny_model(LlamaConfig(**common_settings())).save_pretrained(directory)
    byte_level_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def sampler(sampler_dir):
    return AutoModelForCausalLM.from_pretrained(sampler_dir).eval()


@pytest.fixture(scope="module")
def unlimited(sampler_dir, tmp_path_factory):
    """Three candidates for each of the prompts, every one of them kept."""
    rows, _ = sample_candidates(sampler_dir, PROMPTS, SamplingConfig(**SETTINGS), tmp_path_factory.mktemp("whole"))
    return rows
