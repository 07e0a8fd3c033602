"""Batches of images, gathered ahead of the trainer by threads."""

import atexit
import itertools
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vae_scale.data.plan import Plan, Rows
from vae_scale.data.reader import LOADERS, Reader
from vae_scale.data.shards import ShardSet
from vae_scale.data.transfer import to_device

COPIERS = 2  # threads, each with a batch of its own
WINDOW = 16  # shards; of those that are fetched or decoded, not all are to be there at once


def default_window(shards: ShardSet) -> int:
    """Shards that are mixed where nobody says how many: all that need not be fetched or decoded, else at most 16."""
    everything = len(shards.shards)
    return everything if shards.encoding == "npy" and shards.storage.local else min(WINDOW, everything)


@dataclass
class Batch:
    """This process's share of a batch.

    Attributes:
        images: uint8 [n, H, W, 3] on the trainer's device. Valid until the next batch is asked for.
        rows: Numbers of the samples in the set: int64 [n].
        missing: How many of them take the place of images that could not be read.
    """

    images: Tensor
    rows: Rows
    missing: int = 0


_Results = queue.SimpleQueue[tuple[Tensor, Rows, int] | BaseException]  # of one copier


class Stream:
    """An endless stream of batches that follows a `Plan`.

    `images_seen` is the whole state: a stream made with the same shards, seed and batch goes on from there exactly,
    on any number of ranks.

    Args:
        shards: What to read.
        batch: Images of a global batch; a multiple of `ranks`.
        seed: Keys the order.
        rank: This process.
        ranks: All processes.
        device: Where batches are wanted.
        images_seen: Where to begin.
        window: Shards of a stream that are mixed together; None for all of them (16 where shards are fetched or decoded).
        prefetch: Batches gathered ahead.
        cache: host, or device to keep the whole set in the device's memory.
        streams: Equal parts of a batch that come from different shards, so that ranks of different parts share none.
    """

    def __init__(
        self,
        shards: ShardSet,
        batch: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        device: torch.device | str = "cpu",
        images_seen: int = 0,
        window: int | None = None,
        prefetch: int = 4,
        cache: str = "host",
        streams: int = 1,
    ) -> None:
        if batch % ranks:
            raise ValueError(f"a batch of {batch} images cannot be shared by {ranks} ranks")
        self.shards = shards
        self.images_seen = images_seen
        self.wait_seconds = 0.0
        self.device = torch.device(device)
        self.plan = Plan([shard.samples for shard in shards.shards], seed, batch, window or default_window(shards), streams)
        self._rank, self._ranks, self._prefetch = rank, ranks, prefetch
        self._resident = self._load() if cache == "device" else None

    def state_dict(self) -> dict[str, int]:
        """The whole state."""
        return {"images_seen": self.images_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to where another stream was. Takes effect at the next `iter()`."""
        self.images_seen = state["images_seen"]

    def _load(self) -> Tensor:
        """The whole set on the device, shard by shard: uint8 [images, H, W, 3]."""
        resident = torch.empty((len(self.shards), *self.shards.image_shape), dtype=torch.uint8, device=self.device)
        self._stands = np.arange(len(self.shards))  # the sample that was read for each
        starts = self.shards.starts.tolist()
        with Reader(self.shards) as reader:
            for number, (start, stop) in enumerate(itertools.pairwise(starts)):
                reader.need(range(number, min(number + LOADERS, len(starts) - 1)))
                images = np.empty((stop - start, *self.shards.image_shape), np.uint8)
                found = reader.find(np.arange(start, stop))
                found.copy(images)
                self._stands[start:stop] = found.rows
                resident[start:stop] = torch.from_numpy(images)
        return resident

    def __iter__(self) -> Iterator[Batch]:
        """Endless batches. `wait_seconds` counts the time that the caller had to wait for them."""
        batches = self._from_device() if self._resident is not None else self._from_host()
        while True:
            begin = time.perf_counter()
            batch = next(batches)
            self.wait_seconds += time.perf_counter() - begin
            # Counted before the batch is handed out, so that whoever holds it finds it counted.
            self.images_seen += self.plan.batch
            self.shards.count(batch.missing)
            yield batch

    def _from_device(self) -> Iterator[Batch]:
        assert self._resident is not None
        while True:
            planned = self.plan.rows(self.images_seen, self._rank, self._ranks)
            rows = self._stands[planned]
            yield Batch(self._resident[to_device(rows, self.device)], rows, int((rows != planned).sum()))

    def _from_host(self) -> Iterator[Batch]:
        """Copies batches into a ring of buffers, in threads that take turns in planning them."""
        shape = (self.plan.batch // self._ranks, *self.shards.image_shape)
        pinned = self.device.type == "cuda"
        free: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        ready: queue.SimpleQueue[_Results] = queue.SimpleQueue()  # in the order of the batches: who copies each
        # One buffer is with the caller and some are being filled, besides those that wait.
        for _ in range(self._prefetch + 1 + COPIERS):
            free.put(torch.empty(shape, dtype=torch.uint8, pin_memory=pinned))
        turn, places = threading.Lock(), itertools.count(self.images_seen, self.plan.batch)
        begun, torch_threads = threading.Barrier(COPIERS + 1), torch.get_num_threads()

        def copy(reader: Reader) -> None:
            torch.get_num_threads()  # or its first use would set the default again
            torch.set_num_threads(1)  # threads that share a batch would wait for each other on a busy machine
            begun.wait()
            results: _Results = queue.SimpleQueue()
            while True:
                with turn:
                    buffer = free.get()
                    if buffer is None:
                        free.put(None)  # for the other threads
                        return
                    ready.put(results)
                    try:
                        rows, shards = self.plan.share(next(places), self._rank, self._ranks)
                        reader.need(shards)
                        found = reader.find(rows)
                    except BaseException as error:  # for the caller, who is waiting for a batch
                        results.put(error)
                        free.put(None)
                        return
                found.copy(buffer.numpy())
                results.put((buffer, found.rows, found.missing))

        with Reader(self.shards) as reader:
            threads = [threading.Thread(target=copy, args=[reader], name="stream", daemon=True) for _ in range(COPIERS)]
            for thread in threads:
                thread.start()
            begun.wait()
            torch.set_num_threads(torch_threads)  # or threads that begin from now on would have one, too

            def stop() -> None:
                free.put(None)
                for thread in threads:
                    thread.join(timeout=1)  # it may wait for a shard that is still on its way

            # A program may end with the stream half read, and would be aborted while threads of it copy.
            atexit.register(stop)
            try:
                yield from self._take(ready, free, pinned)
            finally:
                atexit.unregister(stop)
                stop()

    def _take(
        self, ready: "queue.SimpleQueue[_Results]", free: "queue.SimpleQueue[Tensor | None]", pinned: bool
    ) -> Iterator[Batch]:
        side = torch.cuda.Stream() if pinned else None

        def upload() -> tuple[Batch, Tensor, "torch.cuda.Event | None"]:
            result = ready.get().get()
            if isinstance(result, BaseException):
                raise result
            buffer, rows, missing = result
            if side is None:
                return Batch(buffer, rows, missing), buffer, None
            with torch.cuda.stream(side):
                images = buffer.to(self.device, non_blocking=True)
                return Batch(images, rows, missing), buffer, side.record_event()

        following = upload() if pinned else None
        while True:
            # On a GPU the next batch is on its way while the present one is worked on.
            batch, buffer, event = following or upload()
            if event is not None:
                torch.cuda.current_stream().wait_event(event)
                batch.images.record_stream(torch.cuda.current_stream())
                following = upload()
            yield batch
            if event is not None:
                event.synchronize()
            free.put(buffer)
