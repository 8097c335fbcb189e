"""Candidates to be scored."""

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from trl_ext.playground.model import byte_level_tokenizer


def chat(row):
    """The same row as a conversation."""
    return {
        **row,
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completions": [[{"role": "assistant", "content": text}] for text in row["completions"]],
    }


CANDIDATES = [
    {"prompt": "What is 2 + 2? ", "completions": ["4", "four, I think", "22"], "answer": "4"},
    {"prompt": "Say yes. ", "completions": ["yes", "no"], "answer": "yes"},
    {"prompt": "Go on: one, two, three, ", "completions": ["four", "", "5", "four five six seven"], "answer": "four"},
]


def save_reward_model(directory, num_labels=1, architecture=LlamaForSequenceClassification):
    tokenizer = byte_level_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=128, num_labels=num_labels, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = architecture(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def calls(file):
    called = file.with_name("calls").read_text().split()
    file.with_name("calls").unlink()
    return list(map(int, called))
