"""FlexAttention on a CPU, PyTorch's unfused operator in place of the kernel: gradients, and how often it compiles."""

import pytest
import torch
import torch._dynamo.utils as dynamo
import transformers.integrations.flex_attention as integration
from peft import LoraConfig, get_peft_model
from torch.nn.attention import flex_attention as flex

from tests.equivalence.compare import assert_same, batch_of, random_sequences, run, two_of
from tests.equivalence.small_models import SHARING, WINDOW
from trl_ext.execution import flex as flex_layer

# no FlexAttention in transformers, or sinks, whose log-sum-exp it does not give on a CPU
WITHOUT_FLEX = {"codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_oss", "gptj", "olmoe", "persimmon", "stablelm"}
# one of each kind, in every run of the tests
OFTEN = {"llama", "mistral", "gemma2", "gemma3_text", "mixtral", "gpt_neox", "deepseek_v3"}


@pytest.fixture
def uncompiled(monkeypatch):
    """The operator's plain forward and backward, which PyTorch refuses on a CPU only by a check of its own."""
    compile_ = torch.compile

    def init(self, training):
        if not self._is_flex_compiled or training != self.training:
            self.training, self._is_flex_compiled = training, True
            self._compiled_flex_attention = compile_(flex.flex_attention, backend="eager")

    monkeypatch.setattr(flex, "_validate_device", lambda *args: None)
    monkeypatch.setattr(integration.WrappedFlexAttention, "__init__", init)
    monkeypatch.setattr(integration.WrappedFlexAttention, "_is_flex_compiled", False)
    monkeypatch.setattr(integration.WrappedFlexAttention, "_instance", None)
    torch._dynamo.reset()
    dynamo.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow)
        for name in sorted(set(SHARING) - WITHOUT_FLEX)
    ],
)
def test_architecture(model_type, uncompiled):
    _, shared, prefix_sharing = two_of(model_type, attn_implementation="flex_attention")
    padded, _, _ = two_of(model_type, attn_implementation="eager")
    batch = batch_of(random_sequences(4, 3, (WINDOW + 1, 3 * WINDOW), (1, 2 * WINDOW)))
    assert_same(padded, shared, batch)
    assert prefix_sharing.statistics.batches_shared == 1


def graphs():
    return dynamo.counters["stats"].get("unique_graphs", 0)


# measured, to the digit. Dynamo's own limit is 8, beyond which it would go on unfused
@pytest.mark.parametrize(
    "kind, most",
    [("full", 10), *(pytest.param(*one, marks=pytest.mark.slow) for one in [("lora", 15), ("windows", 20)])],
)
def test_ragged_batches_are_compiled_for_few_shapes(kind, most, uncompiled):
    _, model, _ = two_of(
        "gemma3_text" if kind == "windows" else "llama", attn_implementation="flex_attention", num_hidden_layers=2,
        **({"layer_types": ["sliding_attention", "full_attention"]} if kind == "windows" else {}),
    )  # fmt: skip
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    counted = []
    for seed, (prompts, longest) in enumerate(2 * [(1, 150), (1, 12), (2, 12), (3, 100), (4, 120), (1, 10)]):
        batch = batch_of(random_sequences(prompts, 2, (3, longest), (2, 40), seed=seed))
        model.train()
        run(model, batch).log_probs.sum().backward()
        model.eval()
        with torch.no_grad():
            run(model, {name: tensor.clone() for name, tensor in batch.items()})
        counted.append(graphs())
    assert 8 < counted[-1] <= most and counted[5] == counted[9]


def test_it_stops_before_it_runs_unfused(uncompiled, monkeypatch):
    monkeypatch.setattr(flex_layer, "MOST_GRAPHS", 1)
    _, model, _ = two_of("llama", attn_implementation="flex_attention", num_hidden_layers=1)
    with torch.no_grad():
        run(model, batch_of(random_sequences(1, 2, (140, 150), (2, 40))))
        with pytest.raises(RuntimeError, match="compiled for 1 kinds of batches.*attn_implementation='sdpa'"):
            run(model, batch_of(random_sequences(3, 2, (100, 110), (2, 40))))
            run(model, batch_of(random_sequences(1, 2, (10, 12), (2, 5))))
