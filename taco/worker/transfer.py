"""Copies from host to device that the host does not wait for.

A copy out of ordinary memory waits until the device has come to it, and with it for the step before. Out of pinned
memory it does not; torch hands pinned memory out again only when the copies out of it have ended.
"""

from __future__ import annotations

import numpy as np
import torch


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor on the device: on a CPU the same memory, else a copy of what it holds now."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.contiguous().pin_memory().to(device, non_blocking=True)
