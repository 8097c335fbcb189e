"""Loaded models are ready to sample and to score."""

import pytest
import torch

from trl_ext.runtime.models import for_inference


class OnAnyDevice(torch.nn.Linear):
    def to(self, device):
        return self


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sampling_and_scoring_leave_cudnn_out(device, monkeypatch):
    """A plan of cuDNN's attention takes 25 to 100 ms, and each length needs one."""
    switched = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", switched.append)
    model = for_inference(OnAnyDevice(2, 2), torch.device(device))
    assert not model.training and not model.weight.requires_grad
    assert switched == ([False] if device == "cuda" else [])
