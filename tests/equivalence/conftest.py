"""What whole runs of training are compared on."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from tests.support.large_weights import enlarge
from trl_ext.playground.model import byte_level_tokenizer


@pytest.fixture(scope="module")
def strong_model_dir(tmp_path_factory, model_dir):
    """The small model with weights large enough that mistakes show."""
    directory = str(tmp_path_factory.mktemp("strong"))
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    enlarge(model)
    model.save_pretrained(directory)
    byte_level_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def long_prompts():
    question = "Here is a question that takes its time: what is {} plus {}? "
    return Dataset.from_list(
        [
            {"prompt": question.format(a, b), "chosen": f"{a + b}" + "." * (a % 4), "rejected": f"{a - b}, I think"}
            for a, b in [(1, 2), (30, 4), (5, 600), (7, 8), (90, 1), (11, 12), (13, 140)]
        ]
    )


@pytest.fixture
def settings(config_kwargs):
    # SGD: Adam turns gradients that are only rounding (keys' biases) into steps of full size
    config_kwargs.update(optim="sgd", learning_rate=0.02, max_grad_norm=1.0, seed=3)
    return config_kwargs
