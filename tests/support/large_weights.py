"""Weights with which a small model is far from uniform."""

import torch


def enlarge(model):
    """Give a fresh model larger weights, so that its distributions are far from uniform and mistakes show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
