"""The stream of batches."""

import gc
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from io import BufferedReader
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import discs, take
from stl10_binaries import write_binaries

from vae_scale.data.cache import Cache
from vae_scale.data.images import Images
from vae_scale.data.reader import Reader
from vae_scale.data.shard_file import Shard
from vae_scale.data.shards import ShardSet
from vae_scale.data.storage import Storage
from vae_scale.data.stream import Batch, Stream
from vae_scale.errors import UserError
from vae_scale.pack import main as pack


@pytest.fixture(scope="module")
def train_set(shards: Path) -> ShardSet:
    return ShardSet.open(shards).select("train", "unlabeled")


def batches_equal(first: list[Batch], second: list[Batch]) -> bool:
    return all(torch.equal(a.images, b.images) and np.array_equal(a.rows, b.rows) for a, b in zip(first, second, strict=True))


def test_batches_contain_the_planned_images(train_set: ShardSet, pixels: Images) -> None:
    stream = Stream(train_set, 16, seed=3)
    rows = []
    for batch in take(stream, 20):
        assert batch.images.shape == (16, 96, 96, 3)
        assert np.array_equal(batch.images.numpy(), pixels[batch.rows])
        rows += batch.rows.tolist()
    assert sorted(rows[: len(train_set)]) == list(range(len(train_set)))


def test_two_ranks_read_the_batches_of_a_single_rank(train_set: ShardSet) -> None:
    expected = take(Stream(train_set, 16, seed=3), 12)
    halves = [take(Stream(train_set, 16, seed=3, rank=rank, world_size=2), 12) for rank in (0, 1)]
    joined = [Batch(torch.cat([a.images, b.images]), np.concatenate([a.rows, b.rows])) for a, b in zip(*halves, strict=True)]
    assert batches_equal(joined, expected)


def test_a_stream_resumes_exactly(train_set: ShardSet) -> None:
    first = Stream(train_set, 16, seed=3, window=2)
    before, state = take(first, 7), first.state_dict()
    assert state == {"images_seen": 7 * 16}
    second = Stream(train_set, 16, seed=3, window=2)
    second.load_state_dict(state)
    assert batches_equal(before + take(second, 8), take(Stream(train_set, 16, seed=3, window=2), 15))


def test_device_cache_gives_the_same_batches(train_set: ShardSet) -> None:
    assert batches_equal(take(Stream(train_set, 16, seed=3, cache="device"), 12), take(Stream(train_set, 16, seed=3), 12))


@pytest.mark.parametrize("encoding", ["png", "webp"])
def test_compact_shards_give_the_same_batches(binaries: Path, train_set: ShardSet, tmp_path: Path, encoding: str) -> None:
    pack(["--source=stl10", f"--data={binaries}", f"--out={tmp_path}", "--images-per-shard=25", f"--encoding={encoding}"])
    compact = ShardSet.open(tmp_path).select("train", "unlabeled")
    batches, expected = (take(Stream(shard_set, 16, seed=3, window=1), 15) for shard_set in (compact, train_set))
    for batch, reference in zip(batches, expected, strict=True):
        assert np.array_equal(batch.rows, reference.rows)
        assert (batch.images.int() - reference.images.int()).abs().float().mean() <= (0 if encoding == "png" else 8)


@pytest.mark.parametrize("streams", [2, 4])
def test_streams_give_the_same_batches_for_any_world_size(train_set: ShardSet, pixels: Images, streams: int) -> None:
    batches = take(Stream(train_set, 16, seed=3, window=1, streams=streams), 20)
    ranks = [take(Stream(train_set, 16, 3, rank, 4, window=1, streams=streams), 20) for rank in range(4)]
    for batch, *parts in zip(batches, *ranks, strict=True):
        assert np.array_equal(batch.images.numpy(), pixels[batch.rows])
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))
    rows = np.concatenate([batch.rows for batch in batches])
    assert sorted(rows[: len(train_set)].tolist()) == list(range(len(train_set)))


PRINT_PEAK_MEMORY = """
import os, sys
from itertools import islice
import psutil
from vae_scale.data.shards import ShardSet
from vae_scale.data.stream import Stream
shards = ShardSet.open(sys.argv[1])
next(iter(Stream(shards, 32, seed=1, window=1, prefetch=2)))  # loads libraries
before, peak = psutil.Process().memory_info().rss, 0
for batch in islice(Stream(shards, 32, seed=1, window=2, prefetch=2), 3 * len(shards) // 32):
    peak = max(peak, psutil.Process().memory_info().rss - before)
print(peak)
"""


@pytest.mark.parametrize("encoding", ["npy", "png"])
def test_memory_is_bounded_by_two_windows_and_the_batches(tmp_path: Path, encoding: str) -> None:
    content, shards = discs(1_200, 7), 40
    write_binaries(tmp_path / "binaries", {"unlabeled": (content, [])})
    options = [f"--out={tmp_path / 'out'}", "--splits=unlabeled", "--images-per-shard=30", f"--encoding={encoding}"]
    pack(["--source=stl10", f"--data={tmp_path / 'binaries'}", *options])
    process = subprocess.run([sys.executable, "-c", PRINT_PEAK_MEMORY, str(tmp_path / "out")], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    shard = content.nbytes / shards
    # Two windows of two shards, one pair being replaced by the next, and the ring of batches.
    budget = (3 * 2) * shard * 1.1 + (2 + 2) * 32 * 96 * 96 * 3
    assert int(process.stdout) < budget + 6e6  # overhead of allocators
    assert budget + 6e6 < content.nbytes / 2


READ_ONE_BATCH = """
import sys
from vae_scale.data.shards import ShardSet
from vae_scale.data.stream import Stream
batches = iter(Stream(ShardSet.open(sys.argv[1]), 32, seed=1))
next(batches)
print("read")
"""


def test_a_program_can_exit_while_a_stream_is_open(shards: Path) -> None:
    process = subprocess.run([sys.executable, "-c", READ_ONE_BATCH, str(shards)], capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stdout, process.stderr) == (0, "read\n", "")


def test_error_names_a_deleted_shard(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    stream = Stream(ShardSet.open(copy).select("train"), 16, seed=3)
    (copy / "stl10-train-000002.tar").unlink()
    with pytest.raises(UserError, match=r"stl10-train-000002\.tar: missing"):
        take(stream, 10)


def test_closing_the_iterator_stops_its_threads(train_set: ShardSet) -> None:
    batches = iter(Stream(train_set, 16, seed=3))
    next(batches)
    assert any(thread.name == "stream" for thread in threading.enumerate())
    batches.close()  # type: ignore[attr-defined]
    assert not any(thread.name == "stream" for thread in threading.enumerate())


def test_a_batch_is_valid_until_the_next_is_requested(train_set: ShardSet, pixels: Images) -> None:
    for batch in islice(Stream(train_set, 16, seed=3, prefetch=1), 20):
        threading.Event().wait(0.005)  # threads fill all free buffers
        assert np.array_equal(batch.images.numpy(), pixels[batch.rows])


LIMIT_OPEN_FILES = """
import resource, sys
from vae_scale.data.shards import ShardSet
from vae_scale.data.stream import Stream
from vae_scale.errors import UserError
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
try:
    next(iter(Stream(ShardSet.open(sys.argv[1]), 16, seed=1, window=int(sys.argv[2]))))
except UserError as error:
    print(error)
"""


def test_too_many_open_files_are_reported_and_a_small_window_avoids_them(binaries: Path, tmp_path: Path) -> None:
    pack(["--source=stl10", f"--data={binaries}", f"--out={tmp_path}", "--splits=unlabeled", "--images-per-shard=1"])
    outputs = [
        subprocess.run(
            [sys.executable, "-c", LIMIT_OPEN_FILES, str(tmp_path), window], capture_output=True, text=True, check=True
        )
        for window in ("90", "4")
    ]
    assert "too many open files for 90 shards; lower data.shuffle_window, or raise ulimit -n" in outputs[0].stdout
    assert not outputs[1].stdout


def test_located_rows_stay_in_memory_after_their_shards_are_released(shards: Path, pixels: Images) -> None:
    available = threading.Event()

    class SlowStorage(Storage):
        def open(self, shard: Shard) -> BufferedReader:
            available.wait()
            return super().open(shard)

    rows, addresses = np.arange(20), []
    with Reader(replace(ShardSet.open(shards).select("train"), storage=SlowStorage(str(shards), Cache()))) as reader:
        reader.prefetch([0])
        thread = threading.Thread(target=lambda: addresses.append(reader.locate(rows)))
        thread.start()
        threading.Event().wait(0.2)  # lets the thread wait for the shard
        reader.prefetch([])
        available.set()
        thread.join()
    gc.collect()
    out = np.empty((20, 96, 96, 3), np.uint8)
    addresses[0].copy(out)
    assert np.array_equal(out, pixels[rows])
