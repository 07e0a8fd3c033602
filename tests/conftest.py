"""Generated test data (discs on gradients) as STL-10 binaries and as shards, and a server for the shards."""

import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import hypothesis
import numpy as np
import pytest

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# One thread makes sums reproducible, and avoids stalls on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"

from bad_server import Server
from stl10_binaries import write_binaries

from vae_scale.data import remote
from vae_scale.data.cache import Cache
from vae_scale.data.images import Images
from vae_scale.data.stream import Batch, Stream

# The duration of an example depends on the load of the machine.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

COUNTS = {"train": 60, "test": 30, "unlabeled": 90}
CLASSES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]

# Options of a model and a run that are small enough for a test.
TINY = [
    "--model.preset=tiny",
    "--model.width=16",
    "--data.shuffle_window=2",
    "--train.batch_size=12",
    "--train.log_every=5",
    "--train.precision=fp32",
    "--optimizer.lr=0.003",
    "--optimizer.warmup_images=0",
    "--evaluate.samples=4",
]


def discs(count: int, seed: int) -> Images:
    """Returns discs of random colour and position on random gradients: uint8 [count, 96, 96, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:96, 0:96] / 95
    images = np.empty((count, 96, 96, 3), np.uint8)
    for image in images:
        first, last, colour = rng.uniform(0, 255, (3, 3))
        image[:] = first + (last - first) * x[..., None]
        centre, radius = rng.uniform(0.3, 0.7, 2), rng.uniform(0.1, 0.3)
        image[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2] = colour
    return images


def write_discs(folder: Path) -> Path:
    """Writes discs as STL-10 binaries, with labels 0 to 9 in turn, and returns the folder."""
    splits = {name: (discs(count, seed), [n % 10 for n in range(count)]) for seed, (name, count) in enumerate(COUNTS.items())}
    return write_binaries(folder, splits, CLASSES)


def take(stream: Stream, count: int) -> list[Batch]:
    """Copies batches, because a batch is valid only until the next."""
    return [Batch(batch.images.clone(), batch.rows, batch.num_replaced) for batch in islice(stream, count)]


@pytest.fixture(autouse=True)
def reset_accelerate() -> Iterator[None]:
    """Resets the state of Accelerate, which keeps the first precision of a process."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of STL-10 binaries; its parent is a root folder for torchvision."""
    folder = write_discs(tmp_path_factory.mktemp("root") / "stl10_binary")
    folds = [list(range(start, COUNTS["train"], 10)) for start in range(10)]
    (folder / "fold_indices.txt").write_text("".join(" ".join(map(str, fold)) + "\n" for fold in folds))
    return folder


@pytest.fixture(scope="session")
def shards(binaries: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The binaries packed into seven shards of at most 25 images."""
    from vae_scale.pack import main

    out = tmp_path_factory.mktemp("shards")
    main(["--source=stl10", f"--data={binaries}", f"--out={out}", "--images-per-shard=25", "--workers=2"])
    return out


@pytest.fixture(scope="session")
def pixels() -> Images:
    """The images of the splits train and unlabeled."""
    return np.concatenate([discs(COUNTS["train"], 0), discs(COUNTS["unlabeled"], 2)])


@pytest.fixture(scope="session")
def small_binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three labelled and two unlabelled images as STL-10 binaries."""
    folder = tmp_path_factory.mktemp("small") / "stl10_binary"
    write_binaries(folder, {"train": (discs(3, 1), [0, 4, 9]), "unlabeled": (discs(2, 2), [])}, CLASSES)
    (folder / "fold_indices.txt").write_text("0 1\n2\n")
    return folder


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    """A web server for the shards."""
    running = Server(shards)
    yield running
    running.stop()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """An empty cache."""
    return Cache(tmp_path / "cache")


@pytest.fixture
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transfers are retried without delay."""
    monkeypatch.setattr(remote, "RETRY_POLICY", remote.RetryPolicy(3, 0.01, 5.0))
