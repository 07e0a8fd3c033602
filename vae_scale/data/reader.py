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
Loaded = Future[tuple[Images, int]]  # images of a shard, or of the one that takes its place, and the number of that


@dataclass(frozen=True)
class Found:
    """Images somewhere in memory.

    Attributes:
        rows: Which samples of the set they are, after those of bad shards were replaced: int64 [n].
        places: Their addresses: int64 [n].
        held: What keeps that memory.
        missing: How many of them take the place of images of bad shards.
    """

    rows: Rows
    places: Rows
    held: list[Loaded]
    missing: int = 0

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

    Where the set skips bad shards, images of others take the place of theirs, and are counted. That is decided when a file is
    opened; one that is cut off while it is mapped ends the process (SIGBUS), which nothing here can prevent.
    It holds no more than the shards named last, those being replaced, and those whose loading cannot be stopped any more.
    """

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self._needed: list[int] = []
        self._held: list[Loaded] = []
        self._arrays: dict[int, Loaded] = {}
        self._numbers = np.repeat(np.arange(len(shards.shards)), np.diff(shards.starts))
        # Where sample 0 of the set would be, if it lay before a shard as its own samples do; 0 before its first use.
        self._origins = np.zeros(len(shards.shards), np.int64)
        self._others = np.arange(len(shards.shards))  # the shards that take their places, where they are bad
        self._replacing = False  # as long as none was bad, which costs nothing
        self._stride = 0
        self._queue: queue.SimpleQueue[tuple[int, Loaded] | None] = queue.SimpleQueue()
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
        found = self.find(rows)
        found.copy(out)
        self.shards.count(found.missing)

    def find(self, rows: Rows) -> Found:
        """Where samples `rows` of needed shards lie in memory; waits until they do.

        Raises:
            UserError: a shard is missing, damaged or cannot be fetched.
        """
        numbers, held = self._numbers[rows], self._held  # taken first: another thread may let go of all in the meantime
        for number in set(numbers[self._origins[numbers] == 0].tolist()):
            array, other = self._arrays[number].result()
            self._stride = array.strides[0]
            self._others[number] = other
            self._replacing |= other != number
            self._origins[number] = array.ctypes.data - int(self.shards.starts[other]) * self._stride
        missing = 0
        if self._replacing:
            others = self._others[numbers]
            rows, missing = self.shards.replaced(rows, numbers, others), int((others != numbers).sum())
        return Found(rows, self._origins[numbers] + rows * self._stride, held, missing)

    def _load(self) -> None:
        while (item := self._queue.get()) is not None:
            number, future = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self.shards.read_or_replace(number))
                except BaseException as error:  # for whoever gathers from it
                    future.set_exception(error)
            del item, future  # or this thread would hold on to the array until its next shard
