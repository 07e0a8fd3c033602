"""Gathers images from shards that threads prefetch."""

import queue
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from types import SimpleNamespace

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
    """

    rows: Rows
    addresses: Rows
    shards: list[LoadedShard]

    def copy(self, out: Images) -> None:
        """Copies the images to `out`, contiguous uint8 [n, H, W, 3]. Thread-safe."""
        # The images are in many mapped files. The memory from the first to the last is viewed as overlapping rows, so that one
        # index_select gathers all images, without the interpreter lock and without a loop over images.
        first, last, size = int(self.addresses.min()), int(self.addresses.max()), out[0].size
        layout = {"version": 3, "typestr": "|u1", "data": (first, False), "shape": (last - first + 1, size), "strides": (1, 1)}
        memory = torch.from_numpy(np.asarray(SimpleNamespace(__array_interface__=layout)))
        offsets = torch.from_numpy(self.addresses - first)
        torch.index_select(memory, 0, offsets, out=torch.from_numpy(out).view(len(out), size))


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
        # Of the images that were read for each shard: their address (0 if not loaded), number, and row of the first image.
        self._addresses, self._sizes, self._first_rows = np.zeros((3, len(shards.shards)), np.int64)
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
            self._addresses[index] = 0
        for index in indices:
            if index not in self._loaded:
                self._loaded[index] = Future()
                self._queue.put((index, self._loaded[index]))
        self._references = list(self._loaded.values())

    def gather(self, rows: Rows) -> Images:
        """Copies rows of prefetched shards: uint8 [len(rows), H, W, 3].

        Raises:
            UserError: A shard is missing, damaged or cannot be downloaded.
        """
        located, images = self.locate(rows), np.empty((len(rows), *self.shards.image_shape), np.uint8)
        located.copy(images)
        self.shards.count_replaced((located.rows != rows).sum())
        return images

    def locate(self, rows: Rows) -> RowAddresses:
        """Waits until the shards of `rows`, which must be prefetched, are loaded, and returns the addresses of the rows.

        Raises:
            UserError: A shard is missing, damaged or cannot be downloaded.
        """
        references = self._references  # read before waiting, because another thread may release the shards
        indices = self.shards.shard_indices(rows)
        for index in set(indices[self._addresses[indices] == 0].tolist()):
            images, source = self._loaded[index].result()
            self._stride = images.strides[0]
            self._sizes[index], self._first_rows[index] = len(images), self.shards.starts[source]
            self._addresses[index] = images.ctypes.data
        positions = (rows - self.shards.starts[indices]) % self._sizes[indices]
        addresses = self._addresses[indices] + positions * self._stride
        return RowAddresses(self._first_rows[indices] + positions, addresses, references)

    def _load(self) -> None:
        while (item := self._queue.get()) is not None:
            index, future = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self.shards.read_or_replace(index))
                except BaseException as error:  # raised in `locate`
                    future.set_exception(error)
            del item, future  # releases the images while the thread waits
