"""Throughput of loading images: random copies from memory, the stream, webdataset and torchvision."""

import itertools
import math
import mmap
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader

from vae_scale.benchmark.measuring import Row, alternate
from vae_scale.data.images import Images
from vae_scale.data.shards import ShardSet
from vae_scale.data.stl10 import SIDE, write_binaries
from vae_scale.data.stream import Stream
from vae_scale.errors import UserError

SECONDS = 1.0  # duration of a run
NUM_BUFFERS = 6  # as in the stream
LIMIT = "random copies from memory"

Tasks = dict[str, Callable[[], float]]  # each returns images per second


@dataclass
class DataReport:
    """Throughput of loading images.

    Attributes:
        rows: Images per second of each loader.
        ratios: `of_gather_limit`, the stream over the fastest random copy from memory; `over_webdataset`, `over_torchvision`.
        first_batch_seconds: From opening the shards to the first batch.
        memory_bytes: Growth of resident memory while streaming with a shuffle window of two shards.
    """

    rows: list[Row]
    ratios: dict[str, float]
    first_batch_seconds: float
    memory_bytes: int


def measure(shards: ShardSet, batch: int, repeats: int) -> DataReport:
    """Measures how fast batches are loaded from shards, by the stream and by webdataset and torchvision.

    Args:
        shards: The images. torchvision's STL10 is measured only for images of 96x96, webdataset only for local shards.
        batch: Images per batch.
        repeats: Number of runs of each loader. The median is used.

    Raises:
        UserError: if there are fewer than two batches of images.
    """
    if len(shards) < 2 * batch:
        raise UserError(f"{shards.location}: {len(shards):,} images are too few to measure batches of {batch}")
    first_batch_seconds, memory_bytes = measure_start(shards, batch)
    images = shards.load_images(np.arange(len(shards)))
    with tempfile.TemporaryDirectory() as folder:
        tasks = gather_limit_tasks(images, batch) | stream_tasks(shards, batch)
        if shards.storage.is_local:
            tasks["webdataset"] = lambda: _measure_loader(_webdataset_loader(shards, batch))
        if shards.image_shape[:2] == (SIDE, SIDE):
            write_binaries(Path(folder) / "stl10_binary", {"unlabeled": iter([(images, list[int]())])}, ["none"])
            tasks["torchvision"] = lambda: _measure_loader(_torchvision_loader(Path(folder), batch))
        rows = alternate(tasks, repeats, "measuring")
    stream = rows[f"vae_scale, {shards.encoding}"].median
    ratios = {"of_gather_limit": stream / max(row.median for name, row in rows.items() if name.startswith(LIMIT))}
    ratios |= {f"over_{name}": stream / rows[name].median for name in ("webdataset", "torchvision") if name in rows}
    return DataReport(list(rows.values()), ratios, first_batch_seconds, memory_bytes)


def measure_start(shards: ShardSet, batch: int) -> tuple[float, int]:
    """Returns the seconds to the first batch, and the growth in memory while streaming with a window of two shards."""
    begin = time.perf_counter()
    next(iter(Stream(ShardSet.open(shards.location), batch, seed=0)))
    seconds = time.perf_counter() - begin
    process = psutil.Process()
    initial = peak = process.memory_info().rss
    for _ in itertools.islice(Stream(shards, batch, seed=0, window=2), len(shards) // batch):
        peak = max(peak, process.memory_info().rss)
    return seconds, peak - initial


def gather_limit_tasks(images: Images, batch: int) -> Tasks:
    """Returns tasks that copy random rows from memory into buffers, with one thread and with all: an upper limit."""
    memory = mmap.mmap(-1, images.nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # fewer page table lookups
    source = torch.frombuffer(memory, dtype=torch.uint8).view(len(images), -1)
    source.copy_(torch.from_numpy(images).view(len(images), -1))
    buffers = itertools.cycle([torch.empty((batch, source.shape[1]), dtype=torch.uint8) for _ in range(NUM_BUFFERS)])

    def batch_sizes() -> Iterator[int]:
        while True:
            for rows in torch.randperm(len(source)).split(batch)[:-1]:
                torch.index_select(source, 0, rows, out=next(buffers))
                yield len(rows)

    def run(threads: int) -> float:
        previous = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return measure_throughput(batch_sizes())
        finally:
            torch.set_num_threads(previous)

    tasks: Tasks = {f"{LIMIT}, 1 thread": lambda: run(1)}
    if (threads := torch.get_num_threads()) > 1:
        tasks[f"{LIMIT}, {threads} threads"] = lambda: run(threads)
    return tasks


def stream_tasks(shards: ShardSet, batch: int) -> Tasks:
    """Returns tasks that read the stream's uint8 batches to the CPU and, if available, to the GPU."""

    def run(device: str = "cpu", cache: str = "host") -> float:
        stream = Stream(shards, batch, seed=0, device=device, cache=cache)
        # In the first epoch, pages are mapped and compact shards are decoded.
        return measure_throughput((batch for _ in stream), skip=len(shards), device=device)

    name = f"vae_scale, {shards.encoding}"
    tasks: Tasks = {name: run}
    if torch.cuda.is_available():
        tasks[f"{name}, to the GPU"] = lambda: run("cuda")
        tasks[f"{name}, cached on the GPU"] = lambda: run("cuda", "device")
    return tasks


def measure_throughput(batch_sizes: Iterator[int], *, skip: int = 0, images: float = math.inf, device: str = "cpu") -> float:
    """Returns images per second over `images` images, or over `SECONDS`, after the first `skip` images."""
    count = 0
    while count < skip:
        count += next(batch_sizes)
    begin, count = time.perf_counter(), 0
    for size in batch_sizes:
        count += size
        if count >= images or (math.isinf(images) and time.perf_counter() - begin > SECONDS):
            break
    if device == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - begin)


def _measure_loader(loader: Any) -> float:
    """Returns images per second after the first batch."""
    return measure_throughput((len(batch[0]) for epoch in itertools.repeat(loader) for batch in epoch), skip=1)


def _webdataset_loader(shards: ShardSet, batch: int) -> Any:
    """Returns the pipeline of webdataset's README, in this process."""
    import webdataset

    urls = [str(Path(shards.location) / shard.url) for shard in shards.shards]
    extension = shards.encoding
    decoder = "rgb8" if extension != "npy" else None
    samples = webdataset.WebDataset(urls, shardshuffle=100).shuffle(1000).decode(*([decoder] if decoder else []))
    return samples.to_tuple(extension, "cls").batched(batch)


def _torchvision_loader(root: Path, batch: int) -> Any:
    """Returns a DataLoader of torchvision's STL10, in this process."""
    from torchvision.datasets import STL10
    from torchvision.transforms import Compose, Normalize, ToTensor

    class UncheckedSTL10(STL10):  # type: ignore[misc]
        def _check_integrity(self) -> bool:
            return True  # only the official files have its MD5 sums

    dataset = UncheckedSTL10(str(root), split="unlabeled", transform=Compose([ToTensor(), Normalize(0.5, 0.5)]))
    return DataLoader(dataset, batch, shuffle=True)
