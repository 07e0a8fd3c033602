"""The cache of downloaded shards."""

import dataclasses
import os
import shutil
import signal
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_server import READ_ALL, Server, cache_bytes, read_pixels, start

from vae_scale.config.parsing import parse
from vae_scale.data.cache import Cache
from vae_scale.data.shards import ShardSet
from vae_scale.data.stream import Stream
from vae_scale.errors import UserError

FIRST = "stl10-train-000000.tar"
pytestmark = pytest.mark.usefixtures("fast_retries")


def test_two_processes_share_a_cache_and_download_each_shard_once(shards: Path, server: Server, cache: Cache) -> None:
    readers = [start(READ_ALL, server.url, cache.folder) for _ in range(2)]
    server.delay = 0.3
    outputs = [reader.communicate(timeout=60) for reader in readers]
    assert [reader.returncode for reader in readers] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    del server.requests["index.json"]
    assert server.requests == {shard.url: 1 for shard in ShardSet.open(shards).shards}
    assert 2 <= server.max_active <= 8


def test_a_cache_smaller_than_the_set_keeps_its_limit(shards: Path, server: Server, tmp_path: Path) -> None:
    local = ShardSet.open(shards).select("train", "unlabeled")
    largest = max(shard.filesize for shard in local.shards)
    cache = Cache(tmp_path / "cache", 2.5 * largest)
    remote_set = ShardSet.open(server.url, cache).select("train", "unlabeled")
    peak, stopped = [0], threading.Event()

    def monitor() -> None:
        while not stopped.wait(0.002):
            peak[0] = max(peak[0], cache_bytes(cache))

    thread = threading.Thread(target=monitor)
    thread.start()
    streams = [Stream(shard_set, 30, seed=3, window=1) for shard_set in (local, remote_set)]
    for expected, actual in zip(*(islice(stream, 15) for stream in streams), strict=True):
        assert torch.equal(actual.images, expected.images)
    stopped.set()
    thread.join()
    assert largest < peak[0] <= cache.max_bytes
    assert server.requests.total() > len(local.shards) + 1  # some were downloaded again
    small = ShardSet.open(server.url, Cache(tmp_path / "small", largest - 1)).select("unlabeled")
    with pytest.raises(UserError, match=r"data\.cache_size_gib is 0\.\d+, but .*\.tar has"):
        small.read(0)


def test_least_recently_used_shards_are_evicted(server: Server, tmp_path: Path) -> None:
    shard_set = ShardSet.open(server.url, Cache(tmp_path / "cache")).select("unlabeled")
    cache = Cache(tmp_path / "cache", 2 * shard_set.shards[0].filesize)
    shard_set = dataclasses.replace(shard_set, storage=ShardSet.open(server.url, cache).storage)
    for index in (0, 1, 0, 2, 0):
        time.sleep(0.01)
        shard_set.read(index)
    assert [server.requests[shard.url] for shard in shard_set.shards] == [1, 1, 1, 0]


def test_the_cache_is_usable_after_a_killed_download(shards: Path, server: Server, cache: Cache) -> None:
    server.faults = {FIRST: ["stalled"] * 3}
    reader = start(READ_ALL, server.url, cache.folder)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 300_000 for path in cache.folder.glob(".*.part*/1")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    reader.send_signal(signal.SIGKILL)
    reader.communicate()
    assert list(cache.folder.glob(".*.part*"))
    server.faults.clear()
    # The cache has no spare room, so the incomplete download of the killed process must not count.
    small = Cache(cache.folder, max(shard.filesize for shard in ShardSet.open(shards).shards))
    assert read_pixels(ShardSet.open(server.url, small)) == read_pixels(ShardSet.open(shards))
    assert list(cache.folder.glob(".*.part*")) == []


def test_damaged_or_deleted_cache_files_are_downloaded_again(shards: Path, server: Server, cache: Cache) -> None:
    shard_set = ShardSet.open(server.url, cache).select("test")
    shard_set.read(0)
    (path,) = [path for path in cache.folder.glob("*.tar") if path.stat().st_size == shard_set.shards[0].filesize]
    os.truncate(path, 1000)
    assert np.array_equal(shard_set.read(0), ShardSet.open(shards).select("test").read(0))
    shutil.rmtree(cache.folder)
    shard_set.read(0)
    assert server.requests[shard_set.shards[0].url] == 3


def test_an_unwritable_cache_is_reported(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache_dir .*file/cache: Not a directory"):
        ShardSet.open(server.url, Cache(tmp_path / "file" / "cache")).read(0)
    # A limit on the size of files simulates a full disk.
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
    stderr = start(limited + READ_ALL, server.url, tmp_path / "cache").communicate(timeout=60)[1]
    assert "data.cache_dir" in stderr.splitlines()[-1], stderr
    assert "free some space" in stderr.splitlines()[-1]
    assert server.requests.total() <= 16


def test_cache_options_and_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert Cache.from_options(None, None) == Cache(Path("/somewhere/vae_scale/shards"), 50 * 2**30)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Cache().folder == Path.home() / ".cache" / "vae_scale" / "shards"
    assert Cache.from_options("/fast", 0.5) == Cache(Path("/fast"), 2**29)
    with pytest.raises(UserError, match=r"data\.cache_size_gib"):
        parse(["--data.cache_size_gib=0"])
