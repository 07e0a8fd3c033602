"""Checkpoints: complete or absent, and never trusted."""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vae_scale.errors import UserError
from vae_scale.models.vae import FORMAT_VERSION
from vae_scale.training import checkpoint
from vae_scale.training.checkpoint import Writer, checkpoints, damage, images_of, load, newest

CONFIG = {"format_version": FORMAT_VERSION}
CONTENT = {"model": {"w": torch.arange(6.0)}, "ema": {"w": torch.ones(3)}}


def save(run: Path, *counts: int, keep: int = 10) -> None:
    writer = Writer(run, keep)
    for count in counts:
        writer.save(count, CONTENT, {"images_seen": count}, CONFIG)
    writer.wait()


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    save(tmp_path, 12)
    folder = newest(tmp_path)
    assert folder is not None
    assert folder.name == "images_000000012"
    state, tensors = load(folder, "model", "ema")
    assert state == {"images_seen": 12}
    assert torch.equal(tensors["model"]["w"], CONTENT["model"]["w"])
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 12)
    writer = Writer(tmp_path, 3)
    writer.save(24, CONTENT, {}, {"library": "vae_scale"})  # as version 1 wrote it
    writer.wait()
    with pytest.raises(UserError, match=r"images_000000024: has format version 1, and this version of vae_scale reads 2"):
        newest(tmp_path)


def test_what_is_saved_is_what_was_there_when_save_was_called(tmp_path: Path) -> None:
    weight, writer = torch.zeros(1_000_000), Writer(tmp_path, 3)
    writer.save(1, {"model": {"w": weight}}, {}, CONFIG)
    weight.add_(1)
    writer.wait()
    folder = newest(tmp_path)
    assert folder is not None
    assert load(folder, "model")[1]["model"]["w"].sum() == 0


def test_the_buffers_of_a_checkpoint_are_used_again(tmp_path: Path) -> None:
    model, writer = torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last), Writer(tmp_path, 3)
    places = []
    for count in (12, 24):
        writer.save(count, {"model": dict(model.named_parameters())}, {}, CONFIG)
        places.append([tensor.data_ptr() for tensor in writer._staged["model"].values()])
        with torch.no_grad():
            model.weight.add_(1)
    writer.wait()
    assert places[0] == places[1]
    first, second = (load(folder, "model")[1]["model"]["weight"] for folder in checkpoints(tmp_path))
    assert torch.allclose(second, first + 1)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda folder: (folder / "ema.safetensors").unlink(), "ema.safetensors is missing"),
        (lambda folder: (folder / "ema.safetensors").write_bytes(b"x"), "1 bytes instead of"),
        (lambda folder: flip(folder / "model.safetensors"), "does not match its sha256"),
        (lambda folder: (folder / "manifest.json").write_text(json.dumps({"files": {"../x": {}}})), "names a path"),
    ],
)
def test_a_damaged_one_is_skipped_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage, reason) -> None:  # type: ignore[no-untyped-def]
    save(tmp_path, 12, 24)
    damage(checkpoints(tmp_path)[-1])
    folder = newest(tmp_path)
    assert folder is not None
    assert folder.name == "images_000000012"
    assert reason in capsys.readouterr().out


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_the_newest_are_kept_and_leftovers_are_no_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 5, 10, 100, 1000, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["images_000000100", "images_000001000"]
    (tmp_path / "checkpoints" / ".images_000002000.tmp").mkdir()
    (tmp_path / "checkpoints" / "images_x").mkdir()
    folder = newest(tmp_path)
    assert folder is not None
    assert folder.name == "images_000001000"
    save(tmp_path, 3000, keep=2)
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert newest(tmp_path / "nothing") is None


def test_a_checkpoint_that_cannot_be_written_is_told_tried_again_and_an_error_only_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "RETRY_SECONDS", 0.2)
    save(tmp_path, 12)
    (tmp_path / "checkpoints").rename(tmp_path / "aside")
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    writer = Writer(tmp_path, 3)
    writer.save(24, CONTENT, {}, CONFIG)
    wait_for(lambda: "training goes on, and it is tried again" in capsys.readouterr().err)
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "aside").rename(tmp_path / "checkpoints")
    wait_for(lambda: len(checkpoints(tmp_path)) == 2)
    writer.wait()
    (tmp_path / "checkpoints").rename(tmp_path / "aside")
    (tmp_path / "checkpoints").write_text("again")
    writer.save(36, CONTENT, {}, CONFIG)
    writer.save(48, CONTENT, {}, CONFIG)  # does not fail for the one before
    with pytest.raises(UserError, match="images_000000048: cannot be written"):
        writer.wait()


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_full_disk_leaves_the_last_one_whole_and_no_piece_of_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 12)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = Writer(tmp_path, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))  # as a disk with so much space
    try:
        writer.save(24, {"model": {"w": torch.ones(2**20)}}, {}, CONFIG)
        wait_for(lambda: "cannot be written" in capsys.readouterr().err)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["images_000000012"]
    assert damage(checkpoints(tmp_path)[0]) is None
    writer.wait()  # tries again, now that there is space
    assert [images_of(path) for path in checkpoints(tmp_path)] == [24]
    assert damage(checkpoints(tmp_path)[0]) is None


def test_the_first_after_each_multiple_is_kept_besides_the_newest(tmp_path: Path) -> None:
    writer = Writer(tmp_path, 2, keep_every=100)
    for count in range(24, 400, 24):
        writer.save(count, CONTENT, {}, CONFIG)
    writer.wait()
    assert [images_of(path) for path in checkpoints(tmp_path)] == [120, 216, 312, 360, 384]
