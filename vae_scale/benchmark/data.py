"""How fast images come: the machine's limit, our stream, what else one could use; and how well windows shuffle."""

import functools
import hashlib
import itertools
import math
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from vae_scale.benchmark.data_peers import Peer, peers
from vae_scale.benchmark.measuring import Row, alternate
from vae_scale.data.images import Images
from vae_scale.data.packing import Packing, Source, pack
from vae_scale.data.plan import Plan, Rows
from vae_scale.data.shards import ShardSet
from vae_scale.data.stream import Stream
from vae_scale.errors import UserError

SECONDS = 1.0  # of a run that has no end of its own
BUFFERS = 6  # as many as the stream fills in turn
OURS = "vae_scale"
COMPACT = ("png", "jpg")
COMPACT_WINDOW = 4  # shards
EPOCHS = 5  # of a run with compact shards, which ends with windows decoded that nobody reads
JPEG_DIFFERENCE = 3.0  # mean absolute difference, of 255
LIMIT = "random copies from memory"

Tasks = dict[str, Callable[[], float]]  # each gives images per second


@dataclass
class Report:
    """What was found.

    Attributes:
        rows: All ways to get images, ours and others'.
        ratios: By name; 1 is equal speed.
        first_batch_seconds: From opening the set to its first batch.
        memory_bytes: By how much memory grew while windows of two shards were streamed.
        missing: Peers that cannot be had here, and why.
    """

    rows: list[Row]
    ratios: dict[str, float]
    first_batch_seconds: float
    memory_bytes: int
    missing: dict[str, str]


def measure(shards: ShardSet, batch: int, repeats: int, scratch: Path | None) -> Report:
    """Measures how fast batches of a set come. What is in them is compared with the set before anything is timed.

    Args:
        shards: What to read.
        batch: Images of a batch.
        repeats: Runs of each way to read, of which the median counts.
        scratch: Where the formats of peers are written; None to leave peers out.

    Raises:
        UserError: there are too few images, or somebody's batches do not hold the right images.
    """
    if len(shards) < 2 * batch:
        raise UserError(f"{shards.location}: {len(shards):,} images are too few to measure batches of {batch}")
    first_batch_seconds, memory_bytes = _start(shards, batch)
    images = shards.images(np.arange(len(shards)))
    sets = [shards]
    if scratch and shards.encoding == "npy":
        sets += [_packed(images, scratch, encoding) for encoding in COMPACT]
    tasks = _limits(images, batch)
    for found in sets:
        # A set that is lossy itself gives what it holds, and so exactly `images`.
        _verify_ours(found, images, batch, JPEG_DIFFERENCE if found is not shards and found.encoding == "jpg" else 0.0)
        tasks |= _ours(found, batch)
    rows = alternate(tasks, repeats, "measuring")
    # Peers come after: some leave threads behind that would take time from others' runs.
    others, missing = peers(images, scratch, batch) if scratch else ([], {})
    for peer in tqdm(others, "comparing contents", unit=" peers", disable=not others):
        _verify(peer, images)
    rows |= alternate({peer.name: functools.partial(_peer_epoch, peer) for peer in others}, repeats, "measuring others")
    ratios = _ratios(rows, others, shards.encoding)
    return Report(list(rows.values()), ratios, first_batch_seconds, memory_bytes, missing)


def _start(shards: ShardSet, batch: int) -> tuple[float, int]:
    begin = time.perf_counter()
    for _ in Stream(ShardSet.open(shards.location), batch, seed=0):
        break
    seconds = time.perf_counter() - begin
    process = psutil.Process()
    before = highest = process.memory_info().rss
    for _ in itertools.islice(Stream(shards, batch, seed=0, window=2), len(shards) // batch):
        highest = max(highest, process.memory_info().rss)
    return seconds, highest - before


def _limits(images: Images, batch: int) -> Tasks:
    """The speed at which random images are copied from memory to buffers, beyond which no reader of images can go."""
    memory = mmap.mmap(-1, images.nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # fewer addresses to translate, where the system has such pages
    resident = torch.frombuffer(memory, dtype=torch.uint8).view(len(images), -1)
    resident.copy_(torch.from_numpy(images).view(len(images), -1))
    buffers = itertools.cycle([torch.empty((batch, resident.shape[1]), dtype=torch.uint8) for _ in range(BUFFERS)])

    def batches() -> Iterator[int]:
        while True:
            for rows in torch.randperm(len(resident)).split(batch)[:-1]:
                torch.index_select(resident, 0, rows, out=next(buffers))
                yield len(rows)

    def speed(threads: int) -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return _speed(batches())
        finally:
            torch.set_num_threads(before)

    tasks: Tasks = {f"{LIMIT}, 1 thread": lambda: speed(1)}
    if (threads := torch.get_num_threads()) > 1:
        tasks[f"{LIMIT}, {threads} threads"] = lambda: speed(threads)
    return tasks


def _ours(shards: ShardSet, batch: int) -> Tasks:
    """Our stream: into uint8 batches on the CPU and, where there is one, on the GPU."""

    def speed(device: str = "cpu", cache: str = "host") -> float:
        stream = Stream(shards, batch, seed=0, device=device, cache=cache, window=None if mapped else COMPACT_WINDOW)
        batches = (batch for _ in stream)
        if mapped:  # in the first epoch the system maps the pages
            return _speed(batches, skip=len(shards), device=device)
        # What is decoded ahead of the first batch must be paid for, so a run is of whole epochs from the start.
        return _speed(batches, images=EPOCHS * len(shards))

    name, mapped = f"{OURS}, {shards.encoding}", shards.encoding == "npy"
    tasks: Tasks = {name: speed}
    if mapped and torch.cuda.is_available():
        tasks[f"{name}, to the GPU"] = lambda: speed("cuda")
        tasks[f"{name}, kept on the GPU"] = lambda: speed("cuda", "device")
    return tasks


def _speed(batches: Iterator[int], *, skip: int = 0, images: int | None = None, device: str = "cpu") -> float:
    """Images per second, of `images` images from the start; or, by default, of about a second after the first `skip` images."""
    begin, count = time.perf_counter(), 0
    if images is None:
        while count <= skip:
            count += next(batches)
        begin, count = time.perf_counter(), 0
    for size in batches:
        count += size
        if count >= images if images is not None else time.perf_counter() - begin > SECONDS:
            break
    if device == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - begin)


def _packed(images: Images, scratch: Path, encoding: str) -> ShardSet:
    """The same images in a compact encoding."""
    out = scratch / f"{hashlib.sha256(images.data).hexdigest()[:12]}-{encoding}"
    pack(Source([_Resident("train", images)], [], dict), out, Packing(OURS, encoding), os.cpu_count() or 1)
    return ShardSet.open(out)


class _Resident:
    """Images in memory as a split to be packed."""

    def __init__(self, name: str, images: Images) -> None:
        self.name, self.images = name, images
        self.labels = [-1] * len(images)
        self.shape = images.shape[1:]

    def fetch(self, start: int, stop: int) -> Images:
        return self.images[start:stop]

    def decode(self, raw: Images) -> Images:
        return raw


def _verify_ours(shards: ShardSet, images: Images, batch: int, tolerance: float) -> None:
    batches = ((found.images, found.rows) for found in Stream(shards, batch, seed=0))
    _compare(f"{OURS}, {shards.encoding}", itertools.islice(batches, -(-len(shards) // batch)), images, tolerance)


def _verify(peer: Peer, images: Images) -> None:
    batches = ((peer.pixels(found), numbers.numpy()) for found, numbers in peer.epoch())
    _compare(peer.name, batches, images, 0.0 if peer.lossless else JPEG_DIFFERENCE)


def _compare(name: str, batches: Iterator[tuple[Tensor, Rows]], images: Images, tolerance: float) -> None:
    seen = np.zeros(len(images), np.int64)
    for found, rows in batches:
        difference = np.abs(found.numpy().astype(np.int16) - images[rows]).reshape(len(rows), -1).mean(1)
        if (difference > tolerance).any():
            raise UserError(
                f"{name}: image {rows[difference.argmax()]} differs from the set's by {difference.max():.1f} of 255"
            )
        np.add.at(seen, rows, 1)
    if (seen == 0).any():
        raise UserError(f"{name}: {(seen == 0).sum():,} of {len(seen):,} images did not come")


def _peer_epoch(peer: Peer) -> float:
    """Images per second of an epoch, after its first batch."""
    sizes = (len(numbers) for _, numbers in peer.epoch())
    next(sizes)
    begin = time.perf_counter()
    return sum(sizes) / (time.perf_counter() - begin)


def _ratios(rows: dict[str, Row], others: Sequence[Peer], encoding: str) -> dict[str, float]:
    """Ours over the limit, and over the best of each family; where encodings are compared, over webdataset's in the same."""

    def best(*names: str) -> float:
        return max((row.median for row in rows.values() if row.name.startswith(names)), default=math.nan)

    ours = rows[f"{OURS}, {encoding}"].median
    ratios = {"of_gather_limit": ours / best(LIMIT)}
    for family in dict.fromkeys(peer.family for peer in others):
        ratios[f"over_{family}"] = ours / best(*(peer.name for peer in others if peer.family == family))
    for compact in COMPACT:
        ratios[f"{compact}_over_webdataset"] = best(f"{OURS}, {compact}") / best(f"webdataset, {compact}")
    return {name: ratio for name, ratio in ratios.items() if not math.isnan(ratio)}


@dataclass(frozen=True)
class Shuffle:
    """How well an order is shuffled. Of a perfectly random order of n images: 1/3, 2/n, and the largest shard's share.

    Attributes:
        window: Shards mixed together; None for a random permutation.
        displacement: Mean distance between an image's place in the set and in the order, over the number of images.
        neighbours: Share of the images that are followed by one of their two neighbours in the set.
        same_shard: Share of the images that are followed by one of the same shard.
    """

    window: int | None
    displacement: float
    neighbours: float
    same_shard: float


def shuffle_quality(sizes: Sequence[int], batch: int, windows: Sequence[int], epochs: int = 10) -> list[Shuffle]:
    """How well windows of so many shards shuffle, and last a random permutation; means over epochs.

    Args:
        sizes: Images of each shard.
        batch: Images of a batch.
        windows: Shards mixed together.
        epochs: How many are looked at.
    """
    images, shard_of = sum(sizes), np.repeat(np.arange(len(sizes)), sizes)

    def quality(window: int | None, orders: list[Rows]) -> Shuffle:
        displacement = np.mean([np.abs(order - np.arange(images)).mean() / images for order in orders])
        neighbours = np.mean([(np.abs(np.diff(order)) == 1).mean() for order in orders])
        same_shard = np.mean([(np.diff(shard_of[order]) == 0).mean() for order in orders])
        return Shuffle(window, float(displacement), float(neighbours), float(same_shard))

    plans = {window: Plan(sizes, 0, batch, window) for window in windows}
    found = [quality(window, [plan.order(epoch) for epoch in range(epochs)]) for window, plan in plans.items()]
    return [*found, quality(None, [np.random.default_rng(epoch).permutation(images) for epoch in range(epochs)])]
