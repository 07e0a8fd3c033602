"""Asynchronous copies from host to device."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_device(values: npt.NDArray[np.generic] | Tensor, device: torch.device) -> Tensor:
    """Copies an array or CPU tensor to `device` through pinned memory, without synchronization with the GPU."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def normalize_images(images: Tensor, flips: Tensor | None = None) -> Tensor:
    """Converts uint8 [b, h, w, 3] to [-1, 1], [b, 3, h, w] in channels_last, and flips images where `flips` [b] is True."""
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return x if flips is None else torch.where(flips[:, None, None, None], x.flip(3), x)
