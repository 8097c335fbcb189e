"""A vLLM that is none."""

import pytest

from tests.support.sampling import FakeVllm
from trl_ext.sampling.config import SamplingConfig


@pytest.fixture
def fake_vllm(monkeypatch):
    monkeypatch.setattr("trl_ext.sampling.vllm_engine.VllmEngine", FakeVllm)
    monkeypatch.setattr(FakeVllm, "started", [])
    kwargs = {"sampling_engine": "vllm", "vllm_python": "python", "num_candidates": 2, "max_new_tokens": 28}

    def config(**vllm_args):
        return SamplingConfig(**kwargs, vllm_args=vllm_args)

    return config
