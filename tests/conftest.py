"""Small data made on the spot: discs on gradients, in the layout of STL-10's binaries, and their shards."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# One thread: sums are the same from run to run, and a busy machine does not stall threads that wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

from vae_scale.data.images import Images
from vae_scale.data.stl10 import write_binaries

# How long an example takes says more about who else uses the machine.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

COUNTS = {"train": 60, "test": 30, "unlabeled": 90}
CLASSES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]

# A network and a loop small enough for a test, on data that it can learn.
TINY = [
    "--model.preset=tiny",
    "--model.width=16",
    "--data.window=2",
    "--train.batch_size=12",
    "--train.log_every=5",
    "--train.precision=fp32",
    "--optimizer.lr=0.003",
    "--optimizer.warmup=0",
    "--evaluate.samples=4",
]


def discs(count: int, seed: int) -> Images:
    """uint8 [count, 96, 96, 3]: a disc of random colour and place on a gradient of random colours."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0:96, 0:96] / 95
    images = np.empty((count, 96, 96, 3), np.uint8)
    for image in images:
        first, last, colour = draw.uniform(0, 255, (3, 3))
        image[:] = first + (last - first) * x[..., None]
        centre, radius = draw.uniform(0.3, 0.7, 2), draw.uniform(0.1, 0.3)
        image[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2] = colour
    return images


@pytest.fixture(autouse=True)
def every_test_chooses_its_precision() -> Iterator[None]:
    """Accelerate keeps the first precision of a process, which one test would hand down to the next."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of STL-10 binaries; its parent is a root for torchvision."""
    folder = tmp_path_factory.mktemp("root") / "stl10_binary"
    splits = {
        name: iter([(discs(count, seed), [row % 10 for row in range(count)])])
        for seed, (name, count) in enumerate(COUNTS.items())
    }
    write_binaries(folder, splits, CLASSES)
    folds = [list(range(start, COUNTS["train"], 10)) for start in range(10)]
    (folder / "fold_indices.txt").write_text("".join(" ".join(map(str, fold)) + "\n" for fold in folds))
    return folder


@pytest.fixture(scope="session")
def shards(binaries: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The binaries packed: seven shards of at most 25 images."""
    from vae_scale.pack import main

    out = tmp_path_factory.mktemp("shards")
    main(["--source=stl10", f"--data={binaries}", f"--out={out}", "--images-per-shard=25", "--workers=2"])
    return out
