"""Shards that cannot be read: training stops at them, or goes on without them and says how much is missing."""

import contextlib
import json
import logging
import os
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_server import Server
from conftest import COUNTS, TINY, discs

from launch import train
from vae_scale.config import parse
from vae_scale.data import remote
from vae_scale.data.images import Images
from vae_scale.data.reader import Reader
from vae_scale.data.shards import ShardSet
from vae_scale.data.storage import Cache
from vae_scale.data.stream import Batch, Stream
from vae_scale.errors import UserError
from vae_scale.pack import main as pack
from vae_scale.training.trainer import Trainer

BAD = "stl10-train-000001.tar"  # samples 25 to 49; the next holds 50 to 59


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    """A set of which one shard of the train split is cut off."""
    folder = Path(shutil.copytree(shards, tmp_path / "copy"))
    os.truncate(folder / BAD, 100_000)
    return folder


def opened(folder: Path | str, on_bad_shard: str = "skip", cache: Cache | None = None) -> ShardSet:
    return ShardSet.open(folder, cache, on_bad_shard=on_bad_shard).select("train", "unlabeled")


def take(stream: Stream, count: int) -> list[Batch]:
    return [Batch(batch.images.clone(), batch.rows, batch.missing) for batch in islice(stream, count)]


def replaced(rows: np.ndarray) -> np.ndarray:
    """What the rows of a whole set become without BAD."""
    return np.where((rows >= 25) & (rows < 50), 50 + (rows - 25) % 10, rows)


@pytest.fixture(scope="module")
def pixels() -> Images:
    return np.concatenate([discs(COUNTS["train"], 0), discs(COUNTS["unlabeled"], 2)])


def test_by_default_a_bad_shard_stops_training_with_its_name(copy: Path) -> None:
    assert parse([])[0].data.on_bad_shard == "stop"
    with pytest.raises(UserError, match=rf"{BAD}: 100000 bytes, the manifest says"):
        take(Stream(opened(copy, "stop"), 16, seed=3), 10)


@pytest.mark.parametrize("options", [{}, {"window": 1}, {"window": 2, "streams": 4}, {"cache": "device"}])
def test_other_images_take_the_place_of_those_that_are_missing_and_all_else_stays(
    shards: Path, copy: Path, pixels: Images, options: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    lame = opened(copy)
    whole = take(Stream(opened(shards, "stop"), 16, 3, **options), 20)  # type: ignore[arg-type]
    found = take(Stream(lame, 16, 3, **options), 20)  # type: ignore[arg-type]
    for ours, theirs in zip(found, whole, strict=True):
        assert np.array_equal(ours.rows, replaced(theirs.rows))
        assert np.array_equal(ours.images.numpy(), pixels[ours.rows])
        assert ours.missing == (ours.rows != theirs.rows).sum()
    wanted = np.concatenate([batch.rows for batch in whole])
    assert lame.missing is not None
    assert lame.missing.images == ((wanted >= 25) & (wanted < 50)).sum() > 25  # two epochs and a bit
    warned = [record.getMessage() for record in caplog.records if str(copy / BAD) in record.getMessage()]
    assert len(warned) == 1
    assert "100000 bytes" in warned[0]


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_processes_agree_and_go_on_from_anywhere(copy: Path, ranks: int) -> None:
    whole = take(Stream(opened(copy), 16, 3, window=2), 20)
    shares = [take(Stream(opened(copy), 16, 3, rank, ranks, window=2), 20) for rank in range(ranks)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert np.array_equal(batch.rows, np.concatenate([part.rows for part in parts]))
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))
        assert batch.missing == sum(part.missing for part in parts)
    later = take(Stream(opened(copy), 16, 3, window=2, images_seen=9 * 16), 11)
    assert all(torch.equal(a.images, b.images) for a, b in zip(later, whole[9:], strict=True))


def test_a_shard_that_comes_back_is_read_again(shards: Path, copy: Path) -> None:
    stream = Stream(opened(copy), 50, 3, window=1, prefetch=1)
    batches = iter(stream)
    seen = [next(batches).rows.copy() for _ in range(3)]
    shutil.copy(shards / BAD, copy / BAD)
    rows = [next(batches).rows.copy() for _ in range(9)]
    assert not any(25 <= row < 50 for row in np.concatenate(seen))
    assert set(range(25, 50)) < set(np.concatenate(rows).tolist())


def test_where_no_shard_is_good_training_stops(copy: Path) -> None:
    for path in copy.glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match=r"copy: not one of its 7 shards can be read: .*missing"):
        take(Stream(opened(copy), 16, seed=3), 1)


def test_one_image_that_cannot_be_decoded_makes_its_shard_a_bad_one(binaries: Path, tmp_path: Path) -> None:
    options = ("--encoding=png", "--splits=train", "--images-per-shard=20")
    pack(["--source=stl10", f"--data={binaries}", f"--out={tmp_path}", *options])
    victim = tmp_path / "stl10-train-000001.tar"
    content = bytearray(victim.read_bytes())
    begin = content.index(b"train-00000033.png") + 512
    content[begin : begin + 40] = bytes(40)
    victim.write_bytes(content)
    lame, images = opened(tmp_path), discs(COUNTS["train"], 0)
    with Reader(lame) as reader:
        reader.need(range(3))
        out = np.empty((60, 96, 96, 3), np.uint8)
        reader.gather(np.arange(60), out)
    expected = np.concatenate([images[:20], images[40:60], images[40:60]])
    assert np.array_equal(out, expected)
    assert np.array_equal(lame.images(np.arange(15, 45)), expected[15:45])
    assert lame.missing is not None
    assert lame.missing.images == 20 + 20


def test_a_shard_that_cannot_be_fetched_whole_is_skipped_and_a_full_cache_is_not_its_fault(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PATIENCE", remote.Patience(2, 0.01, 5.0))
    server = Server(copy)
    server.faults = {"stl10-unlabeled-000000.tar": ["flipped"] * 99, "stl10-unlabeled-000002.tar": ["404"] * 99}
    there = opened(server.url, cache=Cache(tmp_path / "cache"))
    rows = np.concatenate([batch.rows for batch in take(Stream(there, 30, seed=3, window=2), 5)])
    small = opened(server.url, cache=Cache(tmp_path / "small", 1000))
    with pytest.raises(UserError, match=r"data\.cache_gib"):
        take(Stream(small, 30, seed=3, window=2), 1)
    server.stop()
    assert there.missing is not None
    assert there.missing.images == 3 * 25
    counts = Counter(there.numbers(rows).tolist())
    assert {number for number in range(7) if number not in counts} == {1, 3, 5}


def metrics(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(("eval/nats" in line) == ("data/missing_images" in line) for line in lines)
    return [line["data/missing_images"] for line in lines if "eval/nats" in line]


def test_training_goes_on_counts_and_tells_at_every_evaluation(
    shards: Path, copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # One image for the prior, and it is not of the bad shard: what is counted is what was trained on.
    common = [*TINY, "--track.tracker=none", "--evaluate.latents=1", "--evaluate.every=60", "--train.images=120"]
    words = [f"--data.shards={copy}", *common, "--data.window=1", "--train.batch_size=30"]
    stopping = Trainer(parse([*words, f"--run={tmp_path / 'stop'}"])[0])
    with pytest.raises(UserError, match=BAD):
        stopping.run()
    with caplog.at_level(logging.WARNING):
        Trainer(parse([*words, f"--run={tmp_path / 'one'}", "--data.on_bad_shard=skip"])[0]).run()
    assert sum(str(copy / BAD) in record.getMessage() for record in caplog.records) == 1
    wanted = Stream(opened(shards, "stop"), 30, 0, window=1).plan
    counts = np.cumsum([((rows >= 25) & (rows < 50)).sum() for rows in (wanted.rows(30 * step) for step in range(4))])
    assert metrics(tmp_path / "one") == [counts[1], counts[3]]
    assert counts[3] > 0
    told = train(2, *words, f"--run={tmp_path / 'two'}", "--data.on_bad_shard=skip")
    assert BAD in told
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")
    with contextlib.suppress(FileNotFoundError):
        assert "data/missing_images" not in (tmp_path / "stop" / "metrics.jsonl").read_text()


def test_a_bad_shard_of_held_out_images_does_not_stop_evaluation(copy: Path, tmp_path: Path) -> None:
    shutil.copy(copy / "stl10-train-000000.tar", copy / BAD)  # of the right size; its images are others
    (copy / "stl10-test-000001.tar").unlink()
    words = [f"--data.shards={copy}", f"--run={tmp_path / 'run'}", *TINY, "--track.tracker=none", "--train.images=12"]
    Trainer(parse([*words, "--evaluate.latents=1", "--data.on_bad_shard=skip"])[0]).run()
    (count,) = metrics(tmp_path / "run")
    assert count >= 5  # once evaluated, padding aside, and once drawn
