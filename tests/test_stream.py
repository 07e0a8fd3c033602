"""The stream: batches that follow the plan, from anywhere."""

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
from conftest import COUNTS, discs

from vae_scale.data.images import Images
from vae_scale.data.reader import Reader
from vae_scale.data.shard_file import Shard
from vae_scale.data.shards import ShardSet
from vae_scale.data.stl10 import write_binaries
from vae_scale.data.storage import Folder
from vae_scale.data.stream import Batch, Stream
from vae_scale.errors import UserError
from vae_scale.pack import main as pack


@pytest.fixture(scope="module")
def train_set(shards: Path) -> ShardSet:
    return ShardSet.open(shards).select("train", "unlabeled")


@pytest.fixture(scope="module")
def pixels() -> Images:
    return np.concatenate([discs(COUNTS["train"], 0), discs(COUNTS["unlabeled"], 2)])


def take(stream: Stream, count: int) -> list[Batch]:
    """Copies, since a batch is valid until the next only."""
    return [Batch(batch.images.clone(), batch.rows) for batch in islice(stream, count)]


def same(first: list[Batch], second: list[Batch]) -> bool:
    return all(torch.equal(a.images, b.images) and np.array_equal(a.rows, b.rows) for a, b in zip(first, second, strict=True))


def test_batches_are_the_images_that_the_plan_names(train_set: ShardSet, pixels: Images) -> None:
    stream = Stream(train_set, 16, seed=3)
    rows = []
    for batch in take(stream, 20):
        assert batch.images.shape == (16, 96, 96, 3)
        assert np.array_equal(batch.images.numpy(), pixels[batch.rows])
        rows += batch.rows.tolist()
    assert sorted(rows[: len(train_set)]) == list(range(len(train_set)))


def test_two_ranks_share_what_one_would_read(train_set: ShardSet) -> None:
    whole = take(Stream(train_set, 16, seed=3), 12)
    halves = [take(Stream(train_set, 16, seed=3, rank=rank, ranks=2), 12) for rank in (0, 1)]
    joined = [Batch(torch.cat([a.images, b.images]), np.concatenate([a.rows, b.rows])) for a, b in zip(*halves, strict=True)]
    assert same(joined, whole)


def test_a_stream_goes_on_exactly_where_another_was(train_set: ShardSet) -> None:
    first = Stream(train_set, 16, seed=3, window=2)
    before, state = take(first, 7), first.state_dict()
    assert state == {"images_seen": 7 * 16}
    second = Stream(train_set, 16, seed=3, window=2)
    second.load_state_dict(state)
    assert same(before + take(second, 8), take(Stream(train_set, 16, seed=3, window=2), 15))


def test_the_device_cache_gives_the_same_batches(train_set: ShardSet) -> None:
    assert same(take(Stream(train_set, 16, seed=3, cache="device"), 12), take(Stream(train_set, 16, seed=3), 12))


@pytest.mark.parametrize("encoding", ["png", "webp"])
def test_compact_shards_give_the_same_batches(binaries: Path, train_set: ShardSet, tmp_path: Path, encoding: str) -> None:
    pack(["--source=stl10", f"--data={binaries}", f"--out={tmp_path}", "--images-per-shard=25", f"--encoding={encoding}"])
    compact = ShardSet.open(tmp_path).select("train", "unlabeled")
    theirs = take(Stream(compact, 16, seed=3, window=1), 15)
    for ours, batch in zip(take(Stream(train_set, 16, seed=3, window=1), 15), theirs, strict=True):
        assert np.array_equal(ours.rows, batch.rows)
        assert (ours.images.int() - batch.images.int()).abs().float().mean() <= (0 if encoding == "png" else 8)


@pytest.mark.parametrize("streams", [2, 4])
def test_streams_deal_the_same_images_to_any_number_of_ranks(train_set: ShardSet, pixels: Images, streams: int) -> None:
    whole = take(Stream(train_set, 16, seed=3, window=1, streams=streams), 20)
    parts = [take(Stream(train_set, 16, 3, rank, 4, window=1, streams=streams), 20) for rank in range(4)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert np.array_equal(batch.images.numpy(), pixels[batch.rows])
        assert torch.equal(batch.images, torch.cat([share.images for share in shares]))
    rows = np.concatenate([batch.rows for batch in whole])
    assert sorted(rows[: len(train_set)].tolist()) == list(range(len(train_set)))


STREAM_AND_TELL = """
import os, sys
from itertools import islice
import psutil
from vae_scale.data.shards import ShardSet
from vae_scale.data.stream import Stream
shards = ShardSet.open(sys.argv[1])
next(iter(Stream(shards, 32, seed=1, window=1, prefetch=2)))  # libraries are loaded by now
before, most = psutil.Process().memory_info().rss, 0
for batch in islice(Stream(shards, 32, seed=1, window=2, prefetch=2), 3 * len(shards) // 32):
    most = max(most, psutil.Process().memory_info().rss - before)
print(most)
"""


@pytest.mark.parametrize("encoding", ["npy", "png"])
def test_memory_stays_within_two_windows_and_the_batches(tmp_path: Path, encoding: str) -> None:
    content, shards = discs(1_200, 7), 40
    write_binaries(tmp_path / "binaries", {"unlabeled": iter([(content, [-1] * len(content))])}, [])
    options = [f"--out={tmp_path / 'out'}", "--splits=unlabeled", "--images-per-shard=30", f"--encoding={encoding}"]
    pack(["--source=stl10", f"--data={tmp_path / 'binaries'}", *options])
    told = subprocess.run([sys.executable, "-c", STREAM_AND_TELL, str(tmp_path / "out")], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    shard = content.nbytes / shards
    # Two windows of two shards, of which one pair is let go of while the next is loading, and the ring of batches.
    budget = (3 * 2) * shard * 1.1 + (2 + 2) * 32 * 96 * 96 * 3
    assert int(told.stdout) < budget + 6e6  # what allocators keep
    assert budget + 6e6 < content.nbytes / 2


HALF_READ = """
import sys
from vae_scale.data.shards import ShardSet
from vae_scale.data.stream import Stream
batches = iter(Stream(ShardSet.open(sys.argv[1]), 32, seed=1))
next(batches)
print("read")
"""


def test_a_program_may_end_with_a_stream_half_read(shards: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", HALF_READ, str(shards)], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "read\n", "")


def test_a_shard_that_vanishes_ends_the_stream_with_its_name(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    stream = Stream(ShardSet.open(copy).select("train"), 16, seed=3)
    (copy / "stl10-train-000002.tar").unlink()
    with pytest.raises(UserError, match=r"stl10-train-000002\.tar: missing"):
        take(stream, 10)


def test_leaving_the_loop_ends_the_thread(train_set: ShardSet) -> None:
    batches = iter(Stream(train_set, 16, seed=3))
    next(batches)
    assert any(thread.name == "stream" for thread in threading.enumerate())
    batches.close()  # type: ignore[attr-defined]
    assert not any(thread.name == "stream" for thread in threading.enumerate())


def test_a_batch_stays_untouched_until_the_next_is_asked_for(train_set: ShardSet, pixels: Images) -> None:
    for batch in islice(Stream(train_set, 16, seed=3, prefetch=1), 20):
        threading.Event().wait(0.005)  # the thread fills every buffer that is free
        assert np.array_equal(batch.images.numpy(), pixels[batch.rows])


FEW_FILES = """
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


def test_more_shards_than_files_may_be_open_are_told_and_a_window_helps(binaries: Path, tmp_path: Path) -> None:
    pack(["--source=stl10", f"--data={binaries}", f"--out={tmp_path}", "--splits=unlabeled", "--images-per-shard=1"])
    told = [
        subprocess.run([sys.executable, "-c", FEW_FILES, str(tmp_path), window], capture_output=True, text=True, check=True)
        for window in ("90", "4")
    ]
    assert "may not have files of 90 shards open; lower data.window, or raise ulimit -n" in told[0].stdout
    assert not told[1].stdout


def test_what_was_found_stays_in_memory_though_all_is_let_go_of(shards: Path, pixels: Images) -> None:
    arrived = threading.Event()

    class Slow(Folder):
        def open(self, shard: Shard) -> BufferedReader:
            arrived.wait()
            return super().open(shard)

    rows, found = np.arange(20), []
    with Reader(replace(ShardSet.open(shards).select("train"), storage=Slow(shards))) as reader:
        reader.need([0])
        thread = threading.Thread(target=lambda: found.append(reader.find(rows)))
        thread.start()
        threading.Event().wait(0.2)  # it waits for the shard
        reader.need([])
        arrived.set()
        thread.join()
    gc.collect()
    out = np.empty((20, 96, 96, 3), np.uint8)
    found[0].copy(out)
    assert np.array_equal(out, pixels[rows])
