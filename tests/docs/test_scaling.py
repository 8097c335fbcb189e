"""The model of memory and traffic behind the tables in `docs`, against published, counted and measured figures."""

import csv
import functools

import pytest
import scaling
import scaling_model
import scaling_tables
import torch
from transformers import LlamaConfig, LlamaModel

from tests.support.data import REPOSITORY

RESULTS = REPOSITORY / "benchmarks" / "results"


def test_the_figures_of_the_zero_paper():
    """Its figure 1: 7.5 billion parameters on 64 GPUs (https://huggingface.co/papers/1910.02054)."""
    published = {"ddp": 120.0, "zero1": 31.4, "zero2": 16.6, "zero3": 1.9}
    for strategy, gigabytes in published.items():
        assert scaling_model.states(strategy, 7.5e9, 7.5e9, 64) / 1e9 == pytest.approx(gigabytes, abs=0.05), strategy


def test_only_what_is_trained_takes_more_than_its_weights():
    assert scaling_model.states("ddp", 100.0, 0.0, 8) == 200
    assert scaling_model.states("zero2", 100.0, 10.0, 8) == 90 * 2 + 10 * (2 + 14 / 8)
    assert scaling_model.states("zero3", 100.0, 0.0, 8) == scaling_model.frozen_bytes("zero3", 8) * 100 == 25


@functools.cache
def kept_by_autograd(layers, tokens, hidden, mlp, heads):
    """Bytes, weights not counted, of the forward of a bf16 Llama under SDPA with a mask."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 2, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = LlamaModel(config).to(torch.bfloat16)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that no address is used twice
        return tensor

    mask = torch.zeros(1, 1, tokens, tokens, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long), attention_mask=mask)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("sizes", [(64, 128, 4), (64, 192, 4), (128, 128, 8)])
def test_activations_are_what_autograd_keeps(sizes):
    def of_a_layer(tokens):
        return kept_by_autograd(3, tokens, *sizes) - kept_by_autograd(2, tokens, *sizes)

    counted = (of_a_layer(96) - of_a_layer(32)) / 64  # tokens * tokens stands in the mask alone, which layers share
    hidden, mlp, heads = sizes
    model = scaling_model.Architecture("", 0, hidden, mlp, heads, heads // 2, layers=5)
    without = model.activations(10, 10, checkpointing=False, shared=False)
    assert without == 10 * 5 * counted
    assert model.activations(10, 10, checkpointing=True, shared=True) == 10 * (5 * 2 * hidden + counted) + 2 * 10**2


def test_the_measured_rows_are_those_of_the_model():
    """
    The rest, under DDP, is its buckets being put in order once, in the second step; under ZeRO, padding, and weights
    too small to be split.
    """
    with (RESULTS / "scaling.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["strategy"] for row in rows} == set(scaling_model.STRATEGIES)
    for row in rows:
        tolerance = 2e-4 if row["strategy"] == "ddp" else 0.03
        assert int(row["volume_bytes"]) == pytest.approx(scaling_tables.expected(row), rel=tolerance), row
        assert int(row["other_bytes"]) < 2000  # the number of prompts, and the metrics once
    for strategy in scaling_model.STRATEGIES:
        plain = {"strategy": strategy, "lora": "False", "checkpointing": "False", "max_completions_per_forward": ""}
        for keeps_weights in {row["keeps_weights"] for row in rows if row["strategy"] == strategy}:
            alike = [row for row in rows if row.items() >= {**plain, "keeps_weights": keeps_weights}.items()]
            assert {row["way"] for row in alike} == {"padded", "shared"}
            assert len({row["volume_bytes"] for row in alike}) == 1, "prefix sharing changed what is sent"


@pytest.mark.slow
def test_what_two_processes_send():
    found = scaling.launch({**scaling_model.BASE, "strategy": "ddp", "count": True, "steps": 2, "model": "30M"})
    volume = sum(volume for inside, _, _, volume in found["calls"] if inside)
    expected = scaling_model.communication("ddp", found["parameters"], found["trained"], bytes_each=4)
    assert volume == pytest.approx(expected, rel=2e-4)
    others = [name for inside, name, _, _ in found["calls"] if not inside]
    assert 1 <= len(others) <= 5
