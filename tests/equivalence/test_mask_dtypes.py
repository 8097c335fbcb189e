"""Masks come in the dtype of the queries, of which cuDNN silently gives wrong results otherwise."""

import contextlib

import pytest
import torch

from tests.equivalence.compare import batch_of, random_sequences, run, two_of
from tests.equivalence.small_models import SHARING, WINDOW


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@pytest.mark.parametrize("model_type", SHARING)
def test_masks_have_the_dtype_of_the_queries(model_type, autocast, monkeypatch):
    attend, dtypes = torch.nn.functional.scaled_dot_product_attention, []

    def attention(query, key, value, attn_mask=None, **kwargs):
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            # under autocast SDPA brings its floating-point arguments to one dtype itself
            dtypes.append(torch.bfloat16 if autocast and query.dtype == torch.float32 else query.dtype)
            assert attn_mask.dtype == dtypes[-1] == torch.bfloat16
        return attend(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    _, shared, prefix_sharing = two_of(model_type)
    under = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    shared = shared if autocast else shared.bfloat16()
    with torch.no_grad(), under:
        run(shared, batch_of(random_sequences(2, 2, (WINDOW + 1, 2 * WINDOW), (1, WINDOW))))
    assert prefix_sharing.statistics.batches_shared == 1
    if shared.config._attn_implementation == "sdpa" and model_type != "stablelm":
        assert dtypes
