"""Batches of images, gathered ahead of the trainer in a background thread."""

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vae_scale.data.plan import Plan, Rows
from vae_scale.data.shard_file import Images
from vae_scale.data.shards import ShardSet

COMPACT_WINDOW = 16  # shards; decoded ones occupy memory, so they are not all mixed at once


class Reader:
    """Rows of a set of shards as arrays. Mapped shards stay open; of decoded ones, the last `keep` stay in memory."""

    def __init__(self, shards: ShardSet, keep: int) -> None:
        self.shards = shards
        self._keep = len(shards.shards) if shards.encoding == "npy" else keep
        self._arrays: OrderedDict[int, Images] = OrderedDict()

    def array(self, number: int) -> Images:
        """Images of shard `number`: uint8 [n, H, W, 3]."""
        if number not in self._arrays:
            self._arrays[number] = self.shards.read(number)
            if len(self._arrays) > self._keep:
                self._arrays.popitem(last=False)
        self._arrays.move_to_end(number)
        return self._arrays[number]

    def gather(self, rows: Rows, out: Images) -> None:
        """Copies samples `rows` (numbers in the set) into `out`, uint8 [len(rows), H, W, 3]."""
        starts = self.shards.starts
        numbers = np.searchsorted(starts, rows, side="right") - 1
        # Shard by shard, so that each decoded shard is needed once per batch however few are kept.
        for position in np.argsort(numbers, kind="stable"):
            number = int(numbers[position])
            out[position] = self.array(number)[rows[position] - starts[number]]


@dataclass
class Batch:
    """This process's share of a batch.

    Attributes:
        images: uint8 [n, H, W, 3] on the trainer's device. Valid until the next batch is asked for.
        rows: Numbers of the samples in the set: int64 [n].
    """

    images: Tensor
    rows: Rows


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
        window: Shards mixed together; None for all of them (16 where shards are decoded).
        prefetch: Batches gathered ahead.
        cache: host, or device to keep the whole set in the device's memory.
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
    ) -> None:
        if batch % ranks:
            raise ValueError(f"a batch of {batch} images cannot be shared by {ranks} ranks")
        self.shards = shards
        self.images_seen = images_seen
        self.wait_seconds = 0.0
        self.device = torch.device(device)
        everything = len(shards.shards)
        window = window or (everything if shards.encoding == "npy" else COMPACT_WINDOW)
        self.plan = Plan([shard.samples for shard in shards.shards], seed, batch, min(window, everything))
        self._rank, self._ranks, self._prefetch = rank, ranks, prefetch
        # Two windows: near its end, a batch also takes from the next.
        self._reader = Reader(shards, keep=2 * self.plan.window)
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
        for number, start in enumerate(self.shards.starts[:-1]):
            array = np.ascontiguousarray(self._reader.array(number))
            resident[start : start + len(array)] = torch.from_numpy(array)
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
            yield batch

    def _from_device(self) -> Iterator[Batch]:
        assert self._resident is not None
        while True:
            rows = self.plan.rows(self.images_seen, self._rank, self._ranks)
            yield Batch(self._resident[torch.from_numpy(rows).to(self.device)], rows)

    def _from_host(self) -> Iterator[Batch]:
        """Gathers into a ring of buffers in one thread."""
        shape = (self.plan.batch // self._ranks, *self.shards.image_shape)
        pinned = self.device.type == "cuda"
        # One buffer is with the caller and one being filled, besides those that wait.
        ring = [torch.empty(shape, dtype=torch.uint8, pin_memory=pinned) for _ in range(self._prefetch + 2)]
        free: queue.Queue[Tensor] = queue.Queue()
        ready: queue.Queue[tuple[Tensor, Rows] | BaseException] = queue.Queue()
        stopped = threading.Event()
        for buffer in ring:
            free.put(buffer)

        def gather(images_seen: int) -> None:
            try:
                while not stopped.is_set():
                    rows = self.plan.rows(images_seen, self._rank, self._ranks)
                    buffer = free.get()
                    if stopped.is_set():
                        return
                    self._reader.gather(rows, buffer.numpy())
                    ready.put((buffer, rows))
                    images_seen += self.plan.batch
            except BaseException as error:  # handed to the caller, who is waiting for a batch
                ready.put(error)

        thread = threading.Thread(target=gather, args=(self.images_seen,), name="stream", daemon=True)
        thread.start()
        try:
            yield from self._take(ready, free, pinned)
        finally:
            stopped.set()
            free.put(ring[0])  # wakes the thread, should it wait for a buffer
            thread.join()

    def _take(
        self,
        ready: "queue.Queue[tuple[Tensor, Rows] | BaseException]",
        free: "queue.Queue[Tensor]",
        pinned: bool,
    ) -> Iterator[Batch]:
        side = torch.cuda.Stream() if pinned else None

        def upload() -> tuple[Batch, Tensor, "torch.cuda.Event | None"]:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            buffer, rows = item
            if side is None:
                return Batch(buffer, rows), buffer, None
            with torch.cuda.stream(side):
                images = buffer.to(self.device, non_blocking=True)
                return Batch(images, rows), buffer, side.record_event()

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
