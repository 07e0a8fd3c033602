"""Gathers images from shards that threads prefetch."""

import queue
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch

from vae_scale.data.images import Images, Rows
from vae_scale.data.shards import ShardSet

NUM_LOADERS = 8  # shards mapped, downloaded or decoded at the same time
LoadedShard = Future[tuple[Images, int]]  # images, and the index of the shard they come from


@dataclass(frozen=True)
class RowAddresses:
    """Memory addresses of images.

    Attributes:
        rows: Rows of the set, after replacement of the rows of bad shards: int64 [n].
        addresses: Addresses of their pixels: int64 [n].
        shards: References that keep the memory alive.
        num_replaced: Number of rows that were replaced.
    """

    rows: Rows
    addresses: Rows
    shards: list[LoadedShard]
    num_replaced: int = 0

    def copy(self, out: Images) -> None:
        """Copies the images to `out`, contiguous uint8 [n, H, W, 3]. Thread-safe."""
        # The images are in many mapped files. The memory from the first to the last is viewed as overlapping rows, so that one
        # index_select gathers all images, without the interpreter lock and without a loop over images.
        first, last, size = int(self.addresses.min()), int(self.addresses.max()), out[0].size
        memory = torch.from_numpy(np.asarray(_Memory(first, (last - first + 1, size), (1, 1))))
        offsets = torch.from_numpy(self.addresses - first)
        torch.index_select(memory, 0, offsets, out=torch.from_numpy(out).view(len(out), size))


class _Memory:
    """Exposes raw memory to NumPy."""

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "data": (address, False),
            "shape": shape,
            "strides": strides,
        }


class Reader:
    """Gathers images from shards that threads prefetch. A context manager; exiting it stops the threads.

    If bad shards are skipped, their images are replaced and counted. If a mapped file is truncated, the system kills the
    process (SIGBUS).
    """

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self._requested: list[int] = []
        self._loaded: dict[int, LoadedShard] = {}
        self._references: list[LoadedShard] = []
        self._shard_of_row = np.repeat(np.arange(len(shards.shards)), np.diff(shards.starts))
        # For each shard, the address of its row r minus r * stride; 0 if not loaded.
        self._origins = np.zeros(len(shards.shards), np.int64)
        self._sources = np.arange(len(shards.shards))  # the shard read in place of each shard
        self._has_replacements = False
        self._stride = 0
        self._queue: queue.SimpleQueue[tuple[int, LoadedShard] | None] = queue.SimpleQueue()
        # Daemon threads, so that exiting does not wait for a download.
        self._threads = [threading.Thread(target=self._load, name="loader", daemon=True) for _ in range(NUM_LOADERS)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.prefetch([])
        for _ in self._threads:
            self._queue.put(None)

    def prefetch(self, indices: Iterable[int]) -> None:
        """Starts loading shards, in this order, and releases all other shards."""
        indices = list(indices)
        if indices == self._requested:
            return
        self._requested = indices
        for index in set(self._loaded) - set(indices):
            self._loaded.pop(index).cancel()
            self._origins[index] = 0
        for index in indices:
            if index not in self._loaded:
                self._loaded[index] = Future()
                self._queue.put((index, self._loaded[index]))
        self._references = list(self._loaded.values())

    def gather(self, rows: Rows, out: Images) -> None:
        """Copies rows of prefetched shards to `out`, contiguous uint8 [len(rows), H, W, 3].

        Raises:
            UserError: A shard is missing, damaged or cannot be downloaded.
        """
        addresses = self.locate(rows)
        addresses.copy(out)
        self.shards.count_replaced(addresses.num_replaced)

    def locate(self, rows: Rows) -> RowAddresses:
        """Waits until the shards of `rows`, which must be prefetched, are loaded, and returns the addresses of the rows.

        Raises:
            UserError: A shard is missing, damaged or cannot be downloaded.
        """
        references = self._references  # read before waiting, because another thread may release the shards
        indices = self._shard_of_row[rows]
        for index in set(indices[self._origins[indices] == 0].tolist()):
            array, source = self._loaded[index].result()
            self._stride = array.strides[0]
            self._sources[index] = source
            self._has_replacements |= source != index
            self._origins[index] = array.ctypes.data - int(self.shards.starts[source]) * self._stride
        num_replaced = 0
        if self._has_replacements:
            sources = self._sources[indices]
            rows, num_replaced = self.shards.replacement_rows(rows, indices, sources), int((sources != indices).sum())
        return RowAddresses(rows, self._origins[indices] + rows * self._stride, references, num_replaced)

    def _load(self) -> None:
        while (item := self._queue.get()) is not None:
            index, future = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self.shards.read_or_replace(index))
                except BaseException as error:  # raised in `locate`
                    future.set_exception(error)
            del item, future  # releases the images while the thread waits
