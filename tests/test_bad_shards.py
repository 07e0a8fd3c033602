"""Unreadable shards: training stops, or replaces their images and counts them."""

import contextlib
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_server import Server
from conftest import COUNTS, TINY, discs, take

from launch import train
from vae_scale.config.parsing import parse
from vae_scale.data import remote
from vae_scale.data.cache import Cache
from vae_scale.data.images import Images
from vae_scale.data.reader import Reader
from vae_scale.data.shards import ShardSet
from vae_scale.data.stream import Stream
from vae_scale.errors import UserError
from vae_scale.pack import main as pack
from vae_scale.training.trainer import Trainer

BAD = "stl10-train-000001.tar"  # samples 25 to 49; the next holds 50 to 59


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Path:
    """A set with a truncated shard in its train split."""
    folder = Path(shutil.copytree(shards, tmp_path / "copy"))
    os.truncate(folder / BAD, 100_000)
    return folder


def open_shards(folder: Path | str, on_bad_shard: str = "skip", cache: Cache | None = None) -> ShardSet:
    return ShardSet.open(folder, cache, on_bad_shard=on_bad_shard).select("train", "unlabeled")


def replace_bad(rows: np.ndarray) -> np.ndarray:
    """Returns the rows that are read in place of `rows` if BAD is skipped."""
    return np.where((rows >= 25) & (rows < 50), 50 + (rows - 25) % 10, rows)


def test_a_bad_shard_is_an_error_by_default(folder: Path) -> None:
    assert parse([])[0].data.on_bad_shard == "stop"
    with pytest.raises(UserError, match=rf"{BAD}: 100000 bytes, expected"):
        take(Stream(open_shards(folder, "stop"), 16, seed=3), 10)


@pytest.mark.parametrize("options", [{}, {"window": 1}, {"window": 2, "streams": 4}, {"cache": "device"}])
def test_only_images_of_a_bad_shard_are_replaced(
    shards: Path, folder: Path, pixels: Images, options: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    shard_set = open_shards(folder)
    expected = take(Stream(open_shards(shards, "stop"), 16, 3, **options), 20)  # type: ignore[arg-type]
    batches = take(Stream(shard_set, 16, 3, **options), 20)  # type: ignore[arg-type]
    for batch, reference in zip(batches, expected, strict=True):
        assert np.array_equal(batch.rows, replace_bad(reference.rows))
        assert np.array_equal(batch.images.numpy(), pixels[batch.rows])
        assert batch.num_replaced == (batch.rows != reference.rows).sum()
    rows = np.concatenate([batch.rows for batch in expected])
    assert shard_set.bad_shards is not None
    assert shard_set.bad_shards.replaced_images == ((rows >= 25) & (rows < 50)).sum() > 25  # more than two epochs
    warnings = [record.getMessage() for record in caplog.records if str(folder / BAD) in record.getMessage()]
    assert len(warnings) == 1
    assert "100000 bytes" in warnings[0]


@pytest.mark.parametrize("world_size", [2, 4])
def test_replacements_do_not_depend_on_world_size_or_start(folder: Path, world_size: int) -> None:
    batches = take(Stream(open_shards(folder), 16, 3, window=2), 20)
    ranks = [take(Stream(open_shards(folder), 16, 3, rank, world_size, window=2), 20) for rank in range(world_size)]
    for batch, *parts in zip(batches, *ranks, strict=True):
        assert np.array_equal(batch.rows, np.concatenate([part.rows for part in parts]))
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))
        assert batch.num_replaced == sum(part.num_replaced for part in parts)
    later = take(Stream(open_shards(folder), 16, 3, window=2, images_seen=9 * 16), 11)
    assert all(torch.equal(a.images, b.images) for a, b in zip(later, batches[9:], strict=True))


def test_a_restored_shard_is_used_again(shards: Path, folder: Path) -> None:
    stream = Stream(open_shards(folder), 50, 3, window=1, prefetch=1)
    batches = iter(stream)
    before = [next(batches).rows.copy() for _ in range(3)]
    shutil.copy(shards / BAD, folder / BAD)
    after = [next(batches).rows.copy() for _ in range(9)]
    assert not any(25 <= row < 50 for row in np.concatenate(before))
    assert set(range(25, 50)) < set(np.concatenate(after).tolist())


def test_a_set_without_a_readable_shard_is_an_error(folder: Path) -> None:
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match=r"copy: none of its 7 shards can be read: .*missing"):
        take(Stream(open_shards(folder), 16, seed=3), 1)


def test_a_shard_with_an_undecodable_image_is_skipped(binaries: Path, tmp_path: Path) -> None:
    options = ("--encoding=png", "--splits=train", "--images-per-shard=20")
    pack(["--source=stl10", f"--data={binaries}", f"--out={tmp_path}", *options])
    damaged = tmp_path / "stl10-train-000001.tar"
    content = bytearray(damaged.read_bytes())
    begin = content.index(b"train-00000033.png") + 512
    content[begin : begin + 40] = bytes(40)
    damaged.write_bytes(content)
    shard_set, images = open_shards(tmp_path), discs(COUNTS["train"], 0)
    with Reader(shard_set) as reader:
        reader.prefetch(range(3))
        out = reader.gather(np.arange(60))
    expected = np.concatenate([images[:20], images[40:60], images[40:60]])
    assert np.array_equal(out, expected)
    assert np.array_equal(shard_set.load_images(np.arange(15, 45)), expected[15:45])
    assert shard_set.bad_shards is not None
    assert shard_set.bad_shards.replaced_images == 20 + 20


def test_a_failed_download_is_skipped_but_a_full_cache_is_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RETRY_POLICY", remote.RetryPolicy(2, 0.01, 5.0))
    server = Server(folder)
    server.faults = {"stl10-unlabeled-000000.tar": ["bit flip"] * 99, "stl10-unlabeled-000002.tar": ["404"] * 99}
    remote_set = open_shards(server.url, cache=Cache(tmp_path / "cache"))
    rows = np.concatenate([batch.rows for batch in take(Stream(remote_set, 30, seed=3, window=2), 5)])
    small = open_shards(server.url, cache=Cache(tmp_path / "small", 1000))
    with pytest.raises(UserError, match=r"data\.cache_size_gib"):
        take(Stream(small, 30, seed=3, window=2), 1)
    server.stop()
    assert remote_set.bad_shards is not None
    assert remote_set.bad_shards.replaced_images == 3 * 25
    assert set(range(7)) - set(remote_set.shard_indices(rows).tolist()) == {1, 3, 5}


def replaced_images(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(("eval/neg_elbo" in line) == ("data/replaced_images" in line) for line in lines)
    return [line["data/replaced_images"] for line in lines if "eval/neg_elbo" in line]


def test_training_logs_replaced_images_at_every_evaluation(
    shards: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The prior is fitted to one image of a readable shard, so that only training images are counted.
    common = [*TINY, "--track.tracker=none", "--evaluate.prior_fit_images=1", "--evaluate.every=60", "--train.images=120"]
    arguments = [f"--data.shards={folder}", *common, "--data.shuffle_window=1", "--train.batch_size=30"]
    trainer = Trainer(parse([*arguments, f"--run={tmp_path / 'stop'}"])[0])
    with pytest.raises(UserError, match=BAD):
        trainer.run()
    with caplog.at_level(logging.WARNING):
        Trainer(parse([*arguments, f"--run={tmp_path / 'one'}", "--data.on_bad_shard=skip"])[0]).run()
    assert sum(str(folder / BAD) in record.getMessage() for record in caplog.records) == 1
    plan = Stream(open_shards(shards, "stop"), 30, 0, window=1).plan
    counts = np.cumsum([((rows >= 25) & (rows < 50)).sum() for rows in (plan.rows(30 * step) for step in range(4))])
    assert replaced_images(tmp_path / "one") == [counts[1], counts[3]]
    assert counts[3] > 0
    output = train(2, *arguments, f"--run={tmp_path / 'two'}", "--data.on_bad_shard=skip")
    assert BAD in output
    assert replaced_images(tmp_path / "two") == replaced_images(tmp_path / "one")
    with contextlib.suppress(FileNotFoundError):
        assert "data/replaced_images" not in (tmp_path / "stop" / "metrics.jsonl").read_text()


def test_evaluation_skips_bad_shards(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "stl10-train-000000.tar", folder / BAD)  # a readable shard of the right size
    (folder / "stl10-test-000001.tar").unlink()
    arguments = [f"--data.shards={folder}", f"--run={tmp_path / 'run'}", *TINY, "--track.tracker=none", "--train.images=12"]
    Trainer(parse([*arguments, "--evaluate.prior_fit_images=1", "--data.on_bad_shard=skip"])[0]).run()
    (count,) = replaced_images(tmp_path / "run")
    assert count >= 5  # in the evaluation, without padding, and in the grid of reconstructions
