"""Checkpoints are either complete or absent, and are verified before they are loaded."""

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launch import wait_for
from vae_scale.errors import UserError
from vae_scale.models.pretrained import FORMAT_VERSION
from vae_scale.runtime import checkpoint
from vae_scale.runtime.checkpoint import (
    CheckpointWriter,
    images_seen_at,
    integrity_error,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
)

CONFIG = {"format_version": FORMAT_VERSION}
CONTENT = {"model": {"w": torch.arange(6.0)}, "ema": {"w": torch.ones(3)}}


def save(run: Path, *counts: int, keep: int = 10) -> None:
    writer = CheckpointWriter(run, keep)
    for count in counts:
        writer.save(count, CONTENT, {"images_seen": count}, CONFIG)
    writer.wait()


def test_save_load_round_trip(tmp_path: Path) -> None:
    save(tmp_path, 12)
    folder = newest_checkpoint(tmp_path)
    assert folder is not None
    assert folder.name == "images_000000012"
    state, tensors = load_checkpoint(folder, "model", "ema")
    assert state == {"images_seen": 12}
    assert torch.equal(tensors["model"]["w"], CONTENT["model"]["w"])
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def test_other_format_versions_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 12)
    writer = CheckpointWriter(tmp_path, 3)
    writer.save(24, CONTENT, {}, {"library": "vae_scale"})  # version 1
    writer.wait()
    with pytest.raises(UserError, match=f"images_000000024: has format version 1, and .* reads {FORMAT_VERSION}"):
        newest_checkpoint(tmp_path)


def test_save_snapshots_the_tensors(tmp_path: Path) -> None:
    weight, writer = torch.zeros(1_000_000), CheckpointWriter(tmp_path, 3)
    writer.save(1, {"model": {"w": weight}}, {}, CONFIG)
    weight.add_(1)
    writer.wait()
    folder = newest_checkpoint(tmp_path)
    assert folder is not None
    assert load_checkpoint(folder, "model")[1]["model"]["w"].sum() == 0


def test_host_buffers_are_reused(tmp_path: Path) -> None:
    model, writer = torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last), CheckpointWriter(tmp_path, 3)
    pointers = []
    for count in (12, 24):
        writer.save(count, {"model": dict(model.named_parameters())}, {}, CONFIG)
        pointers.append([tensor.data_ptr() for tensor in writer._staged["model"].values()])
        with torch.no_grad():
            model.weight.add_(1)
    writer.wait()
    assert pointers[0] == pointers[1]
    first, second = (load_checkpoint(folder, "model")[1]["model"]["weight"] for folder in list_checkpoints(tmp_path))
    assert torch.allclose(second, first + 1)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda folder: (folder / "ema.safetensors").unlink(), "ema.safetensors is missing"),
        (lambda folder: (folder / "ema.safetensors").write_bytes(b"x"), "1 bytes instead of"),
        (lambda folder: flip_bit(folder / "model.safetensors"), "does not match its sha256"),
        (lambda folder: (folder / "manifest.json").write_text(json.dumps({"files": {"../x": {}}})), "contains a path"),
    ],
)
def test_damaged_checkpoints_are_skipped_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], reason: str
) -> None:
    save(tmp_path, 12, 24)
    damage(list_checkpoints(tmp_path)[-1])
    folder = newest_checkpoint(tmp_path)
    assert folder is not None
    assert folder.name == "images_000000012"
    assert reason in capsys.readouterr().out


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_newest_checkpoints_are_kept_and_leftovers_ignored(tmp_path: Path) -> None:
    save(tmp_path, 5, 10, 100, 1000, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["images_000000100", "images_000001000"]
    (tmp_path / "checkpoints" / ".images_000002000.tmp").mkdir()
    (tmp_path / "checkpoints" / "images_x").mkdir()
    folder = newest_checkpoint(tmp_path)
    assert folder is not None
    assert folder.name == "images_000001000"
    save(tmp_path, 3000, keep=2)
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_no_checkpoints(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nothing") is None


def test_failed_writes_are_reported_retried_and_raised_by_wait(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "RETRY_SECONDS", 0.2)
    save(tmp_path, 12)
    (tmp_path / "checkpoints").rename(tmp_path / "aside")
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    writer = CheckpointWriter(tmp_path, 3)
    writer.save(24, CONTENT, {}, CONFIG)
    wait_for(lambda: "training continues and writing is retried" in capsys.readouterr().out)
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "aside").rename(tmp_path / "checkpoints")
    wait_for(lambda: len(list_checkpoints(tmp_path)) == 2)
    writer.wait()
    (tmp_path / "checkpoints").rename(tmp_path / "aside")
    (tmp_path / "checkpoints").write_text("again")
    writer.save(36, CONTENT, {}, CONFIG)
    writer.save(48, CONTENT, {}, CONFIG)  # replaces the failed one
    with pytest.raises(UserError, match="images_000000048: cannot be written"):
        writer.wait()


def test_full_disk_keeps_the_last_checkpoint_and_leaves_no_partial_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 12)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = CheckpointWriter(tmp_path, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))  # like a disk with this much space left
    try:
        writer.save(24, {"model": {"w": torch.ones(2**20)}}, {}, CONFIG)
        wait_for(lambda: "cannot be written" in capsys.readouterr().out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["images_000000012"]
    assert integrity_error(list_checkpoints(tmp_path)[0]) is None
    writer.wait()  # retries with enough space
    assert [images_seen_at(path) for path in list_checkpoints(tmp_path)] == [24]
    assert integrity_error(list_checkpoints(tmp_path)[0]) is None


def test_keep_every_keeps_the_first_after_each_multiple(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 2, keep_every=100)
    for count in range(24, 400, 24):
        writer.save(count, CONTENT, {}, CONFIG)
    writer.wait()
    assert [images_seen_at(path) for path in list_checkpoints(tmp_path)] == [120, 216, 312, 360, 384]
