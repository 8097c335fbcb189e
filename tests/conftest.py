"""Small models and data that all tests share. Nothing is downloaded."""

import functools
import gc
import importlib.metadata
import json
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# threads that wait by spinning take the cores from the other processes of a test: many times slower
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from trl_ext.playground.model import save_byte_level_model

disable_progress_bars()
# read from files again at every step of a trainer, by accelerate
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)

REPOSITORY = Path(__file__).parents[1]


NOT_RUN = "NOT RUN: the time for long tests is over (LONG_TESTS_UNTIL)"


def pytest_runtest_setup(item):
    """Where time is limited, long tests that would begin after `LONG_TESTS_UNTIL` (seconds since 1970) are skipped."""
    until = os.environ.get("LONG_TESTS_UNTIL")
    if until is not None and time.time() > float(until) and any(map(item.get_closest_marker, ("slow", "matrix"))):
        pytest.skip(NOT_RUN)


# files that take longest, and begin first so that no process is left alone with one at the end
LONGEST = (
    "test_playground_runs", "distributed/test_matrix", "distributed/test_distributed", "test_comparison",
    "distributed/test_faults", "test_self_play", "distributed/test_launches", "test_recipes", "test_printed_commands",
    "test_fuzz", "test_rounds", "distributed/test_two_hosts",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    def place(item):
        return next((number for number, name in enumerate(LONGEST) if f"{name}.py" in item.nodeid), len(LONGEST))

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """What `--dist loadfile` does, function by function where a file takes minutes: processes end at the same time."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            if file.endswith(("test_matrix.py", "test_distributed.py")):
                return "runs that share their launches"
            if file.endswith(("test_playground_runs.py", "test_self_play.py", "test_rounds.py")):
                return file  # its tests share runs
            is_long = any(file.endswith(f"{name}.py") for name in LONGEST)
            return nodeid.partition("[")[0] if is_long else file

    if config.option.dist != "loadfile":
        return None
    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_terminal_summary(terminalreporter):
    """They are named one by one, where pytest's own summary has a number."""
    missed = [report.nodeid for report in terminalreporter.getreports("skipped") if NOT_RUN in str(report.longrepr)]
    if missed:
        terminalreporter.section(f"{len(missed)} long tests were not run, as their time was over")
        terminalreporter.write("".join(f"{name}\n" for name in missed))


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
    # larger weights than a fresh model's, so that its distributions are far from uniform and mistakes show
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
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


PAIRS = [
    {"prompt": "What is 2 + 2? ", "chosen": "4", "rejected": "22, I should think"},
    {"prompt": "Capital of France: ", "chosen": "Paris", "rejected": "Lyon"},
    {"prompt": "Opposite of up? ", "chosen": "Down it is.", "rejected": "Up"},
    {"prompt": "Say yes. ", "chosen": "yes", "rejected": "no no no"},
    {"prompt": "Colour of grass? ", "chosen": "Green, mostly", "rejected": "Blue"},
    {"prompt": "One word. ", "chosen": "word", "rejected": "two words"},
    {"prompt": "Bye! ", "chosen": "Good bye", "rejected": "Hello"},
    {"prompt": "7 times 6? ", "chosen": "42", "rejected": "13"},
]


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


def real_data(name: str) -> Path:
    """A file of real data next to the checkout; the test skips where there is none."""
    path = REPOSITORY.parent / "shared" / "data" / name
    if not path.is_file():
        pytest.skip(f"real data {name} is not here")
    return path


def read_jsonl(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
