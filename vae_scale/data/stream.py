"""A stream of batches that threads prefetch."""

import atexit
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vae_scale.data.images import Rows
from vae_scale.data.plan import Plan
from vae_scale.data.reader import NUM_LOADERS, Reader
from vae_scale.data.shards import ShardSet
from vae_scale.data.transfer import to_device

COPY_THREADS = 2  # each copies a different batch
DEFAULT_WINDOW = 16  # shards, if they are downloaded or decoded


def default_window(shards: ShardSet) -> int:
    """Returns the default shuffle window in shards: all local npy shards, otherwise at most 16."""
    count = len(shards.shards)
    return count if shards.encoding == "npy" and shards.is_local else min(DEFAULT_WINDOW, count)


@dataclass
class Batch:
    """The local part of a global batch.

    Attributes:
        images: uint8 [n, H, W, 3] on the device of the stream, valid until the next batch is requested.
        rows: Rows of the set: int64 [n].
        num_replaced: Number of images that replace images of bad shards.
    """

    images: Tensor
    rows: Rows
    num_replaced: int = 0


_Results = queue.SimpleQueue[Batch | BaseException]  # of one copy thread


class Stream:
    """An endless stream of batches in the order of a `Plan`.

    `images_seen` is the complete state: a stream with the same shards, seed and batch size resumes exactly from it, with any
    number of ranks.

    Args:
        shards: The set to read.
        batch: Global batch size, a multiple of `world_size`.
        seed: Seed of the permutations.
        rank: Rank of this process.
        world_size: Number of processes.
        device: Device of the batches.
        images_seen: Number of images of the run before the first batch.
        window: Number of shards whose rows are shuffled together; defaults to `default_window`.
        prefetch: Number of prefetched batches.
        cache: "host", or "device" to keep all images in the memory of the device.
        streams: Number of equal parts of a batch, which are read from different shards.
    """

    def __init__(
        self,
        shards: ShardSet,
        batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        images_seen: int = 0,
        window: int | None = None,
        prefetch: int = 4,
        cache: str = "host",
        streams: int = 1,
    ) -> None:
        if batch % world_size:
            raise ValueError(f"a batch of {batch} images is not divisible by {world_size} ranks")
        self.shards = shards
        self.images_seen = images_seen
        self.wait_seconds = 0.0
        self.device = torch.device(device)
        self.plan = Plan([shard.samples for shard in shards.shards], seed, batch, window or default_window(shards), streams)
        self._rank, self._world_size, self._prefetch = rank, world_size, prefetch
        self._device_cache = self._load() if cache == "device" else None

    def state_dict(self) -> dict[str, int]:
        """Returns `images_seen`."""
        return {"images_seen": self.images_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restores `images_seen`. Takes effect at the next `iter()`."""
        self.images_seen = state["images_seen"]

    def _load(self) -> tuple[Tensor, Rows]:
        """Loads all images to the device: uint8 [images, H, W, 3], and the rows that were read: int64 [images]."""
        images = torch.empty((len(self.shards), *self.shards.image_shape), dtype=torch.uint8, device=self.device)
        source_rows = np.arange(len(self.shards))
        starts = self.shards.starts.tolist()
        with Reader(self.shards) as reader:
            for index, (start, stop) in enumerate(itertools.pairwise(starts)):
                reader.prefetch(range(index, min(index + NUM_LOADERS, len(starts) - 1)))
                buffer = np.empty((stop - start, *self.shards.image_shape), np.uint8)
                located = reader.locate(np.arange(start, stop))
                located.copy(buffer)
                source_rows[start:stop] = located.rows
                images[start:stop] = torch.from_numpy(buffer)
        return images, source_rows

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches indefinitely. `wait_seconds` accumulates the time spent waiting for them."""
        batches = self._from_host() if self._device_cache is None else self._from_device(*self._device_cache)
        while True:
            begin = time.perf_counter()
            batch = next(batches)
            self.wait_seconds += time.perf_counter() - begin
            self.images_seen += self.plan.batch  # before the yield, so that the state includes the yielded batch
            self.shards.count_replaced(batch.num_replaced)
            yield batch

    def _from_device(self, images: Tensor, source_rows: Rows) -> Iterator[Batch]:
        while True:
            planned = self.plan.rows(self.images_seen, self._rank, self._world_size)
            rows = source_rows[planned]
            yield Batch(images[to_device(rows, self.device)], rows, int((rows != planned).sum()))

    def _from_host(self) -> Iterator[Batch]:
        """Yields batches from a ring of buffers that threads fill."""
        shape = (self.plan.batch // self._world_size, *self.shards.image_shape)
        pinned = self.device.type == "cuda"
        free: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        ready: queue.SimpleQueue[_Results] = queue.SimpleQueue()  # queues of the threads, in the order of the batches
        # In addition to the prefetched batches, the caller uses one buffer and each thread fills one.
        for _ in range(self._prefetch + 1 + COPY_THREADS):
            free.put(torch.empty(shape, dtype=torch.uint8, pin_memory=pinned))
        lock, positions = threading.Lock(), itertools.count(self.images_seen, self.plan.batch)
        started, torch_threads = threading.Barrier(COPY_THREADS + 1), torch.get_num_threads()

        def copy(reader: Reader) -> None:
            torch.get_num_threads()  # the first call in a thread resets the number
            torch.set_num_threads(1)  # on a busy machine, threads that share a batch would wait for each other
            started.wait()
            results: _Results = queue.SimpleQueue()
            while True:
                with lock:
                    buffer = free.get()
                    if buffer is None:
                        free.put(None)  # for the other threads
                        return
                    ready.put(results)
                    try:
                        rows, shards = self.plan.local_batch(next(positions), self._rank, self._world_size)
                        reader.prefetch(shards)
                        located = reader.locate(rows)
                    except BaseException as error:  # raised in the caller's thread
                        results.put(error)
                        free.put(None)
                        return
                located.copy(buffer.numpy())
                results.put(Batch(buffer, located.rows, int((located.rows != rows).sum())))

        with Reader(self.shards) as reader:
            threads = [threading.Thread(target=copy, args=[reader], name="stream", daemon=True) for _ in range(COPY_THREADS)]
            for thread in threads:
                thread.start()
            started.wait()
            torch.set_num_threads(torch_threads)  # otherwise threads that start later would inherit 1

            def stop() -> None:
                free.put(None)
                for thread in threads:
                    thread.join(timeout=1)  # it may be waiting for a download

            # Exiting the interpreter while threads copy would abort the process.
            atexit.register(stop)
            try:
                if pinned:
                    yield from self._upload(ready, free)
                while True:
                    batch = _take(ready)
                    yield batch
                    free.put(batch.images)
            finally:
                atexit.unregister(stop)
                stop()

    def _upload(self, ready: "queue.SimpleQueue[_Results]", free: "queue.SimpleQueue[Tensor | None]") -> Iterator[Batch]:
        """Copies batches to the GPU. The next batch is copied while the current one is used."""
        side_stream = torch.cuda.Stream()
        uploads: deque[tuple[Batch, Tensor, torch.cuda.Event]] = deque()
        while True:
            while len(uploads) < 2:
                batch = _take(ready)
                with torch.cuda.stream(side_stream):
                    images = batch.images.to(self.device, non_blocking=True)
                    uploads.append((replace(batch, images=images), batch.images, side_stream.record_event()))
            batch, buffer, event = uploads.popleft()
            torch.cuda.current_stream().wait_event(event)
            batch.images.record_stream(torch.cuda.current_stream())
            yield batch
            event.synchronize()
            free.put(buffer)


def _take(ready: "queue.SimpleQueue[_Results]") -> Batch:
    """Waits for the next batch, and raises the error of the thread that failed to copy it."""
    result = ready.get().get()
    if isinstance(result, BaseException):
        raise result
    return result
