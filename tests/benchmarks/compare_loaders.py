"""Images per second of the stream and of other loaders on the same images, and the quality of shuffle windows.

    python tests/benchmarks/compare_loaders.py --shards DIR [--scratch DIR] [--json FILE]

Requires `pip install -e ".[bench]"` for litdata and MosaicML Streaming; FFCV is measured if it is installed.
"""

import argparse
import hashlib
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from loader_peers import Peer, peers
from torch import Tensor
from tqdm import tqdm

from vae_scale.bench import add_data_options
from vae_scale.benchmark.data import LIMIT, gather_limit, load_images, measure_stream
from vae_scale.benchmark.measuring import Report, Speeds, alternate, markdown, print_report
from vae_scale.data.images import Images, Rows
from vae_scale.data.packing import PackOptions, Source, pack
from vae_scale.data.plan import Plan
from vae_scale.data.shards import ShardSet
from vae_scale.data.stream import Stream
from vae_scale.errors import UserError, cli_main

COMPACT_ENCODINGS = ("png", "jpg")
COMPACT_WINDOW = 4  # shards
EPOCHS = 5  # per run with compressed shards, so that decoding ahead at the end of a run has little effect
MAX_JPEG_DIFFERENCE = 3.0  # mean absolute difference, of 255
SHUFFLE_WINDOWS = (1, 4, 16)


@dataclass(frozen=True)
class ShuffleQuality:
    """How random an order of n images is. A random permutation has 1/3, 2/n, and the largest shard's fraction.

    Attributes:
        window: Shards shuffled together; None for a random permutation.
        displacement: Mean distance between an image's positions in the set and in the order, over n.
        neighbors: Fraction of images followed by one of their two neighbors in the set.
        same_shard: Fraction of images followed by an image of the same shard.
    """

    window: int | None
    displacement: float
    neighbors: float
    same_shard: float


def measure(shards: ShardSet, batch: int, repeats: int, scratch: Path) -> tuple[Report, dict[str, str]]:
    """Measures all loaders, after checking that each returns every image of the set once per epoch.

    Returns:
        The report, whose ratios are `of_gather_limit` and the stream over the fastest loader of each library; and the
        libraries that cannot be measured, with the reason.

    Raises:
        UserError: there are too few images, or a loader returns other images.
    """
    images = load_images(shards, batch)
    check_stream(shards, images, batch)
    tasks = {LIMIT: partial(gather_limit, images, batch), stream_name(shards): partial(measure_stream, shards, batch)}
    if shards.encoding == "npy":
        for encoding in COMPACT_ENCODINGS:
            packed = pack_images(images, scratch, encoding)
            check_stream(packed, images, batch, MAX_JPEG_DIFFERENCE if encoding == "jpg" else 0.0)
            tasks[stream_name(packed)] = partial(measure_compact_stream, packed, batch)
    speeds = alternate(tasks, repeats)
    # Measured last, since threads left running by some loaders would slow down the stream.
    loaders, missing = peers(images, scratch, batch)
    for peer in tqdm(loaders, "checking images", unit=" loaders"):
        check_peer(peer, images)
    speeds |= alternate({peer.name: partial(measure_epoch, peer) for peer in loaders}, repeats)
    details = {"images": len(images), "shards": len(shards.shards), "batch": batch}
    return Report(details, speeds, compare(speeds, loaders, stream_name(shards))), missing


def stream_name(shards: ShardSet) -> str:
    """Returns the name of the stream over shards in tables."""
    return f"vae_scale, {shards.encoding}"


def measure_compact_stream(shards: ShardSet, batch: int) -> float:
    """Returns images per second of the stream over compressed shards, which starts cold so that decoding ahead is included."""
    batches = itertools.islice(Stream(shards, batch, seed=0, window=COMPACT_WINDOW), EPOCHS * len(shards) // batch)
    return measure_speed(len(batch.images) for batch in batches)


def pack_images(images: Images, scratch: Path, encoding: str) -> ShardSet:
    """Packs images into shards with another encoding."""
    out = scratch / f"{hashlib.sha256(images.data).hexdigest()[:12]}-{encoding}"
    pack(Source([_InMemorySplit("train", images)], [], {}), out, PackOptions("vae_scale", encoding), os.cpu_count() or 1)
    return ShardSet.open(out)


class _InMemorySplit:
    """Images in memory as a split to pack."""

    def __init__(self, name: str, images: Images) -> None:
        self.name, self.images = name, images
        self.labels = [-1] * len(images)
        self.shape = images.shape[1:]

    def fetch(self, start: int, stop: int) -> Images:
        return self.images[start:stop]

    def decode(self, raw: Images) -> Images:
        return raw


def check_stream(shards: ShardSet, images: Images, batch: int, tolerance: float = 0.0) -> None:
    """Raises UserError unless an epoch of the stream holds all images, to a mean absolute difference of `tolerance`."""
    batches = ((batch.images, batch.rows) for batch in Stream(shards, batch, seed=0))
    num_batches = -(-len(shards) // batch)
    check_images(stream_name(shards), itertools.islice(batches, num_batches), images, tolerance)


def check_peer(peer: Peer, images: Images) -> None:
    """Raises UserError unless an epoch of a loader holds all images."""
    batches = ((peer.pixels(batch), numbers.numpy()) for batch, numbers in peer.epoch())
    check_images(peer.name, batches, images, 0.0 if peer.lossless else MAX_JPEG_DIFFERENCE)


def check_images(name: str, batches: Iterator[tuple[Tensor, Rows]], images: Images, tolerance: float) -> None:
    """Raises UserError if an image differs or is missing."""
    counts = np.zeros(len(images), np.int64)
    for pixels, rows in batches:
        difference = np.abs(pixels.numpy().astype(np.int16) - images[rows]).reshape(len(rows), -1).mean(1)
        if (difference > tolerance).any():
            worst = difference.argmax()
            raise UserError(f"{name}: image {rows[worst]} differs from the set's by {difference[worst]:.1f} of 255")
        np.add.at(counts, rows, 1)
    if (counts == 0).any():
        raise UserError(f"{name}: {(counts == 0).sum():,} of {len(counts):,} images are missing")


def measure_epoch(peer: Peer) -> float:
    """Returns images per second of an epoch, after its first batch."""
    sizes = (len(numbers) for _, numbers in peer.epoch())
    next(sizes)
    return measure_speed(sizes)


def measure_speed(sizes: Iterator[int]) -> float:
    """Returns images per second of batches of the given sizes."""
    begin = time.perf_counter()
    return sum(sizes) / (time.perf_counter() - begin)


def compare(speeds: Speeds, loaders: Sequence[Peer], stream: str) -> dict[str, float]:
    """Returns the ratios of the stream to the gather limit, to the best loader of each library, and to webdataset."""

    def best(*prefixes: str) -> float:
        return max((statistics.median(runs) for name, runs in speeds.items() if name.startswith(prefixes)), default=math.nan)

    ratios = {"of_gather_limit": best(stream) / best(LIMIT)}
    for family in dict.fromkeys(peer.family for peer in loaders):
        ratios[f"over_{family}"] = best(stream) / best(*(peer.name for peer in loaders if peer.family == family))
    for compact in COMPACT_ENCODINGS:
        ratios[f"{compact}_over_webdataset"] = best(f"vae_scale, {compact}") / best(f"webdataset, {compact}")
    return {name: ratio for name, ratio in ratios.items() if not math.isnan(ratio)}


def shuffle_quality(sizes: Sequence[int], batch: int, windows: Sequence[int], epochs: int = 10) -> list[ShuffleQuality]:
    """Measures orders shuffled within windows of shards of the given sizes, and a random permutation; means over epochs."""
    num_images, shard_of = sum(sizes), np.repeat(np.arange(len(sizes)), sizes)

    def quality(window: int | None, orders: list[Rows]) -> ShuffleQuality:
        displacement = np.mean([np.abs(order - np.arange(num_images)).mean() / num_images for order in orders])
        neighbors = np.mean([(np.abs(np.diff(order)) == 1).mean() for order in orders])
        same_shard = np.mean([(np.diff(shard_of[order]) == 0).mean() for order in orders])
        return ShuffleQuality(window, float(displacement), float(neighbors), float(same_shard))

    plans = {window: Plan(sizes, 0, batch, window) for window in windows}
    measured = [quality(window, [plan.epoch_order(epoch) for epoch in range(epochs)]) for window, plan in plans.items()]
    return [*measured, quality(None, [np.random.default_rng(epoch).permutation(num_images) for epoch in range(epochs)])]


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv`, which defaults to `sys.argv[1:]`."""
    parser = argparse.ArgumentParser(description="Measure the stream and other loaders on the same images.")
    add_data_options(parser)
    text = "folder for the other formats (default: a temporary folder)"
    parser.add_argument("--scratch", type=Path, metavar="DIR", help=text)
    args = parser.parse_args(argv)
    shards = ShardSet.open(args.shards)
    with tempfile.TemporaryDirectory() as temporary:
        report, missing = measure(shards, args.batch, args.repeats, args.scratch or Path(temporary))
    sizes = [shard.samples for shard in shards.shards]
    windows = [*(window for window in SHUFFLE_WINDOWS if window < len(sizes)), len(sizes)]
    shuffle = shuffle_quality(sizes, args.batch, windows)
    print_report(report, args.json, missing=missing, shuffle=[asdict(quality) for quality in shuffle])
    print()
    lines = [["window (shards)", "displacement", "neighbors", "same shard"]]
    for quality in shuffle:
        window = "all" if quality.window == len(sizes) else str(quality.window or "random permutation")
        lines.append([window, f"{quality.displacement:.3f}", f"{quality.neighbors:.5f}", f"{quality.same_shard:.3f}"])
    print(markdown(lines))
    for family, reason in missing.items():
        print(f"skipped {family}: {reason}")


if __name__ == "__main__":
    main()
