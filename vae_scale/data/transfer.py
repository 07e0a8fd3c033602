"""Copies from the host to the device for which neither the host nor the device's computation waits."""

import itertools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BUFFERS = 2


def to_device(values: npt.NDArray[np.generic] | Tensor, device: torch.device) -> Tensor:
    """A small array or CPU tensor on `device`. A copy from memory that is not pinned would wait for the GPU's queue."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Uploader:
    """Uploads batches of one shape: the host fills a buffer while the batch before it is on its way.

    Args:
        shape: Of a batch of uint8 images.
        device: Where batches are wanted.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._buffers = itertools.cycle([torch.empty(shape, dtype=torch.uint8, pin_memory=self._cuda) for _ in range(BUFFERS)])
        self._copied: dict[int, torch.cuda.Event] = {}
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._buffer = next(self._buffers)

    def buffer(self) -> npt.NDArray[np.uint8]:
        """The buffer of the next batch, to be filled; valid until `upload`."""
        self._buffer = next(self._buffers)
        if copied := self._copied.get(id(self._buffer)):
            copied.synchronize()
        array: npt.NDArray[np.uint8] = self._buffer.numpy()
        return array

    def upload(self) -> Tensor:
        """The batch in the buffer, on the device. On a CPU it is the buffer itself, valid until the batch after the next."""
        if self._stream is None:
            return self._buffer.to(self._device)
        with torch.cuda.stream(self._stream):
            batch = self._buffer.to(self._device, non_blocking=True)
            self._copied[id(self._buffer)] = self._stream.record_event()
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        batch.record_stream(current)
        return batch
