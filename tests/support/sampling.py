"""A small model that ends some of its answers, and prompts to sample from it."""

import os
import sys

import torch
from transformers import AutoModelForCausalLM

from tests.support import warm
from tests.support.data import REPOSITORY
from tests.support.large_weights import enlarge
from trl_ext.playground.model import byte_level_tokenizer
from trl_ext.sampling.config import SamplingConfig
from trl_ext.sampling.engine import Generated
from trl_ext.sampling.transformers_engine import TransformersEngine

TEXTS = [
    "a", "What is 2 + 2? ", "Capital of France: ", "Say yes. ", "b", "Opposite of up? ", "Go on: one, two, three, ",
    "One word. ", "Bye! ", "7 times 6? ", "Colour of grass? ", "Tell me a story about a cat that could not sleep. ",
]  # fmt: skip
PROMPTS = [{"prompt": text, "number": number} for number, text in enumerate(TEXTS)]
SETTINGS = {"num_candidates": 3, "temperature": 1.0, "max_new_tokens": 20, "keep_duplicates": True}


def tiny_model(config):
    """A model whose distributions are far from uniform, and which ends some of its answers."""
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    enlarge(model)
    with torch.no_grad():
        model.get_output_embeddings().weight[config.get_text_config().eos_token_id] *= 1.7
    return model


def common_settings():
    tokenizer = byte_level_tokenizer()
    return {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip


def by_number(rows):
    return {row["number"]: (row["completions"], row["num_tokens"]) for row in rows}


def torchrun(file, *arguments, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return warm.run(
        [*command, str(file), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300
    )


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


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}: {{ message['content'] }}{% if tools %} "
    "[{{ tools | map(attribute='function') | map(attribute='name') | join(',') }}]{% endif %}{{ mood or '' }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


def shard_files(folder):
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in sorted(folder.glob("shards/*.jsonl"))}
