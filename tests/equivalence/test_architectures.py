"""Every architecture that is said to share prefixes gives the padded path's numbers, and really shares."""

import pytest

from tests.equivalence.compare import assert_same, batch_of, random_sequences, two_of
from tests.equivalence.small_models import SHARING, WINDOW
from trl_ext.execution.support import VERIFIED


def test_the_list_of_verified_architectures_is_this_one():
    assert set(SHARING) == VERIFIED


@pytest.mark.parametrize("model_type", SHARING)
def test_architecture(model_type):
    padded, shared, prefix_sharing = two_of(model_type)
    # prompts and answers longer than the windows, so that windows cut into both
    batch = batch_of(random_sequences(3, 3, (WINDOW + 1, 3 * WINDOW), (1, 2 * WINDOW)))
    assert_same(padded, shared, batch)
    assert prefix_sharing.statistics.batches_shared == 1
    assert prefix_sharing.statistics.positions_computed < 0.7 * prefix_sharing.statistics.positions_padded


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "mixtral", "gpt2"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(model_type, use_reentrant):
    padded, shared, _ = two_of(model_type, attention_dropout=0.0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    recomputed = []
    for model in (padded, shared):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        if use_reentrant:
            model.enable_input_require_grads()
    attention = next(m for m in shared.modules() if "Attention" in type(m).__name__)
    attention.register_forward_hook(lambda *_: recomputed.append(1))
    assert_same(padded, shared, batch_of(random_sequences(2, 3, (8, 20), (1, 12))))
    assert len(recomputed) == 2  # once on the way forward, once again on the way back


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral"])
def test_backends(model_type, backend):
    padded, shared, _ = two_of(model_type, attn_implementation=backend)
    assert shared.config._attn_implementation == backend
    assert_same(padded, shared, batch_of(random_sequences(2, 3, (8, 20), (1, 12))))
