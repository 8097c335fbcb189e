"""Between host and device: what a plan needs comes in one transfer, and goes out without waiting."""

import numpy as np
import torch


def on_host(tensors: list[torch.Tensor]) -> list[np.ndarray]:
    """Integer or bool tensors of one shape as arrays, in one transfer; views of tensors that are on the CPU."""
    if tensors[0].device.type == "cpu":
        return [tensor.numpy() for tensor in tensors]
    return list(torch.stack([tensor.to(torch.int32) for tensor in tensors]).cpu().numpy())


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array on a device. The host does not wait for CUDA."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
