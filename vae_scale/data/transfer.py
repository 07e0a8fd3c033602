"""Asynchronous copies from host to device."""

import itertools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_device(values: npt.NDArray[np.generic] | Tensor, device: torch.device) -> Tensor:
    """Copies a small array or CPU tensor to `device` through pinned memory, without synchronization with the GPU."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def normalize_images(images: Tensor, flips: Tensor | None = None) -> Tensor:
    """Converts uint8 [b, h, w, 3] to [-1, 1], [b, 3, h, w] in channels_last, and flips images where `flips` [b] is True."""
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return x if flips is None else torch.where(flips[:, None, None, None], x.flip(3), x)


class Uploader:
    """Copies batches of uint8 images of one shape to `device`; one of two buffers is filled while the other is copied."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._device, is_cuda = device, device.type == "cuda"
        self._buffers = itertools.cycle([torch.empty(shape, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(2)])
        self._copied: dict[int, torch.cuda.Event] = {}
        self._stream = torch.cuda.Stream(device) if is_cuda else None
        self._buffer = next(self._buffers)

    def buffer(self) -> npt.NDArray[np.uint8]:
        """Returns the buffer for the next batch; valid until `upload`."""
        self._buffer = next(self._buffers)
        if copied := self._copied.get(id(self._buffer)):
            copied.synchronize()
        array: npt.NDArray[np.uint8] = self._buffer.numpy()
        return array

    def upload(self) -> Tensor:
        """Returns the batch in the buffer on the device; on a CPU it is the buffer, which is reused for every second batch."""
        if self._stream is None:
            return self._buffer.to(self._device)
        with torch.cuda.stream(self._stream):
            batch = self._buffer.to(self._device, non_blocking=True)
            self._copied[id(self._buffer)] = self._stream.record_event()
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        batch.record_stream(current)
        return batch
