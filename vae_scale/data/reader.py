"""Rows of shards as arrays, with the shards loaded ahead of need."""

import queue
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch

from vae_scale.data.images import Images
from vae_scale.data.plan import Rows
from vae_scale.data.shards import ShardSet

LOADERS = 8  # shards mapped, fetched or decoded at the same time


@dataclass(frozen=True)
class Found:
    """Images somewhere in memory.

    Attributes:
        places: Their addresses: int64 [n].
        held: What keeps that memory.
    """

    places: Rows
    held: list[Future[Images]]

    def copy(self, out: Images) -> None:
        """Copies them into `out`, contiguous uint8 [n, H, W, 3]. Any thread may call it."""
        # The images lie in many mapped files, in no order. Seen as overlapping rows of all memory between the first and the
        # last of them, they are gathered by a single call, which holds no interpreter lock and loses nothing per image.
        first, last, size = int(self.places.min()), int(self.places.max()), out[0].size
        rows = torch.from_numpy(np.asarray(_Memory(first, (last - first + 1, size), (1, 1))))
        torch.index_select(rows, 0, torch.from_numpy(self.places - first), out=torch.from_numpy(out).view(len(out), size))


class _Memory:
    """Memory as NumPy can see it."""

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "data": (address, False),
            "shape": shape,
            "strides": strides,
        }


class Reader:
    """Gathers images of a set from shards that threads load ahead. Use it in a `with`, which ends the threads.

    It holds no more than the shards named last, those being replaced, and those whose loading cannot be stopped any more.
    """

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self._needed: list[int] = []
        self._held: list[Future[Images]] = []
        self._arrays: dict[int, Future[Images]] = {}
        self._numbers = np.repeat(np.arange(len(shards.shards)), np.diff(shards.starts))
        # Where sample 0 of the set would be, if it lay before a shard as its own samples do; 0 before its first use.
        self._origins = np.zeros(len(shards.shards), np.int64)
        self._stride = 0
        self._queue: queue.SimpleQueue[tuple[int, Future[Images]] | None] = queue.SimpleQueue()
        # Daemons: a process that wants to end does not wait for a shard that is still on its way.
        self._threads = [threading.Thread(target=self._load, name="loader", daemon=True) for _ in range(LOADERS)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.need([])
        for _thread in self._threads:
            self._queue.put(None)

    def need(self, numbers: Iterable[int]) -> None:
        """Starts loading these shards, the first one first, and lets go of all others."""
        numbers = list(numbers)
        if numbers == self._needed:
            return
        self._needed = numbers
        for number in set(self._arrays) - set(numbers):
            self._arrays.pop(number).cancel()
            self._origins[number] = 0
        for number in numbers:
            if number not in self._arrays:
                self._arrays[number] = Future()
                self._queue.put((number, self._arrays[number]))
        self._held = list(self._arrays.values())

    def gather(self, rows: Rows, out: Images) -> None:
        """Copies samples `rows` (numbers in the set) of needed shards into `out`, contiguous uint8 [len(rows), H, W, 3].

        Raises:
            UserError: a shard is missing, damaged or cannot be fetched.
        """
        self.find(rows).copy(out)

    def find(self, rows: Rows) -> Found:
        """Where samples `rows` of needed shards lie in memory; waits until they do.

        Raises:
            UserError: a shard is missing, damaged or cannot be fetched.
        """
        numbers, held = self._numbers[rows], self._held  # taken first: another thread may let go of all in the meantime
        for number in set(numbers[self._origins[numbers] == 0].tolist()):
            array = self._arrays[number].result()
            self._stride = array.strides[0]
            self._origins[number] = array.ctypes.data - int(self.shards.starts[number]) * self._stride
        return Found(self._origins[numbers] + rows * self._stride, held)

    def _load(self) -> None:
        while (item := self._queue.get()) is not None:
            number, future = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self.shards.read(number))
                except BaseException as error:  # for whoever gathers from it
                    future.set_exception(error)
            del item, future  # or this thread would hold on to the array until its next shard
