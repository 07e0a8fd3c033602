"""Throughput of loading images: random copies from memory, the stream, webdataset and torchvision."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import STL10, VisionDataset
from torchvision.transforms import Compose, Normalize, ToTensor

from vae_scale.benchmark.measuring import Report, alternate
from vae_scale.data.images import Images
from vae_scale.data.shards import ShardSet
from vae_scale.data.stream import Stream
from vae_scale.errors import UserError

SECONDS = 1.0  # duration of a run
NUM_BUFFERS = 6  # as in the stream
LIMIT = "random copies from memory"


def measure(shards: ShardSet, batch: int, repeats: int) -> Report:
    """Measures how fast batches are loaded from shards, by the stream and, in this process, by webdataset and torchvision.

    The ratios are those of the stream to each of the others: `of_gather_limit`, `over_webdataset`, `over_torchvision`.

    Args:
        shards: The images. webdataset is measured only for local shards.
        batch: Images per batch.
        repeats: Number of runs of each loader. The median is used.

    Raises:
        UserError: if there are fewer than two batches of images.
    """
    images, stream_name = load_images(shards, batch), f"vae_scale, {shards.encoding}"
    normalized = Compose([ToTensor(), Normalize(0.5, 0.5)])
    loaders: dict[str, Any] = {"torchvision": DataLoader(InMemorySTL10(images, normalized), batch, shuffle=True)}
    if shards.is_local:
        loaders["webdataset"] = _webdataset_loader(shards, batch)
    tasks = {LIMIT: partial(gather_limit, images, batch), stream_name: partial(measure_stream, shards, batch)}
    speeds = alternate(tasks | {name: partial(_measure_loader, loader) for name, loader in loaders.items()}, repeats)
    median = {name: statistics.median(runs) for name, runs in speeds.items()}
    ratios = {"of_gather_limit": median[stream_name] / median[LIMIT]}
    ratios |= {f"over_{name}": median[stream_name] / median[name] for name in loaders}
    return Report({"images": len(shards), "shards": len(shards.shards), "batch": batch}, speeds, ratios)


def load_images(shards: ShardSet, batch: int) -> Images:
    """Loads all images, uint8 [n, H, W, 3].

    Raises:
        UserError: if there are fewer than two batches.
    """
    if len(shards) < 2 * batch:
        raise UserError(f"{shards.location}: {len(shards):,} images are too few to measure batches of {batch}")
    return shards.load_images(np.arange(len(shards)))


def gather_limit(images: Images, batch: int) -> float:
    """Returns images per second of copying random rows from memory into buffers with all threads: an upper limit."""
    source = torch.from_numpy(images).view(len(images), -1)  # in huge pages, which NumPy requests for large arrays
    buffers = itertools.cycle([torch.empty((batch, source.shape[1]), dtype=torch.uint8) for _ in range(NUM_BUFFERS)])

    def batch_sizes() -> Iterator[int]:
        while True:
            for rows in torch.randperm(len(source)).split(batch)[:-1]:
                torch.index_select(source, 0, rows, out=next(buffers))
                yield len(rows)

    return measure_throughput(batch_sizes())


def measure_stream(shards: ShardSet, batch: int) -> float:
    """Returns images per second of the stream after an epoch, in which pages are mapped and compact shards are decoded."""
    stream = iter(Stream(shards, batch, seed=0))
    for _ in range(math.ceil(len(shards) / batch)):
        next(stream)
    return measure_throughput(len(batch.images) for batch in stream)


def measure_throughput(batch_sizes: Iterator[int]) -> float:
    """Returns images per second during `SECONDS`."""
    begin, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - begin) < SECONDS:
        count += next(batch_sizes)
    return count / seconds


def _measure_loader(loader: Any) -> float:
    """Returns images per second after the first batch."""
    batch_sizes = (len(batch[0]) for epoch in itertools.repeat(loader) for batch in epoch)
    next(batch_sizes)
    return measure_throughput(batch_sizes)


def _webdataset_loader(shards: ShardSet, batch: int) -> Any:
    """Returns the pipeline of webdataset's README."""
    import webdataset

    urls = [str(Path(shards.location) / shard.url) for shard in shards.shards]
    samples = webdataset.WebDataset(urls, shardshuffle=100).shuffle(1000)
    samples = samples.decode() if shards.encoding == "npy" else samples.decode("rgb8")
    return samples.to_tuple(shards.encoding, "cls").batched(batch)


class InMemorySTL10(STL10):  # type: ignore[misc]
    """torchvision's STL10 of images in memory, uint8 [n, H, W, 3]. The label of an image is its index."""

    def __init__(self, images: Images, transform: Callable[[Any], Any]) -> None:
        VisionDataset.__init__(self, "", transform=transform)
        # The memory layout in which STL10 loads its binaries: column-major planes.
        self.data = np.ascontiguousarray(images.transpose(0, 3, 2, 1)).transpose(0, 1, 3, 2)
        self.labels = np.arange(len(images))
