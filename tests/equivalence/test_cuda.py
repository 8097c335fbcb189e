"""What only a CUDA GPU can show: FlexAttention's backward and recompilations, bf16 through SDPA's masked kernels."""

import pytest
import torch

from tests.equivalence.compare import assert_same, batch_of, random_sequences, run, two_of
from trl_ext.execution.masks import FLEX_BLOCK_SIZE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SHAPE = {"hidden_size": 64, "head_dim": 16}


def on_gpu(batch):
    return {name: tensor.cuda() for name, tensor in batch.items()}


def two_on_gpu(model_type, dtype=torch.float32, **overrides):
    padded, shared, prefix_sharing = two_of(model_type, **SHAPE, **overrides)
    return padded.cuda().to(dtype), shared.cuda().to(dtype), prefix_sharing


@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral", "gemma3_text"])
def test_gpu_backends_in_fp32(model_type, backend):
    padded, _, _ = two_on_gpu(model_type)
    _, shared, prefix_sharing = two_on_gpu(model_type, attn_implementation=backend)
    # atomics in the backward sum in no fixed order
    assert_same(padded, shared, on_gpu(batch_of(random_sequences(3, 4, (20, 150), (5, 90)))), tolerance=1e-4)
    assert prefix_sharing.statistics.batches_shared == 1


@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
def test_gpu_bf16_is_as_close_to_fp32_as_padded_bf16_is(backend):
    exact, _, _ = two_on_gpu("llama")
    padded, _, _ = two_on_gpu("llama", torch.bfloat16)
    _, shared, _ = two_on_gpu("llama", torch.bfloat16, attn_implementation=backend)
    batch = on_gpu(batch_of(random_sequences(4, 4, (30, 200), (20, 80))))
    found = [run(model, batch).log_probs.float() for model in (exact, padded, shared)]
    errors = [(logps - found[0]).norm() / found[0].norm() for logps in found[1:]]
    assert errors[1] <= 1.25 * errors[0]


def test_flex_attention_is_compiled_for_few_shapes():
    import torch._dynamo

    _, shared, prefix_sharing = two_on_gpu("llama", attn_implementation="flex_attention")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for seed in range(12):
        batch = on_gpu(batch_of(random_sequences(2 + seed % 3, 3, (60, 200), (20, 80), seed=seed)))
        run(shared, batch).log_probs.sum().backward()
        rows_length = prefix_sharing._last[-1].layout.row_length
        assert rows_length % FLEX_BLOCK_SIZE == 0
    assert prefix_sharing.statistics.batches_shared == 12
    # one graph for the first shape, and one with dynamic sizes once a second shape is seen
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
