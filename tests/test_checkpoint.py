"""Checkpoints: complete or absent, and never trusted."""

import json
from pathlib import Path

import pytest
import torch

from vae_scale.training.checkpoint import Writer, checkpoints, load, newest

CONTENT = {"model": {"w": torch.arange(6.0)}, "ema": {"w": torch.ones(3)}}


def save(run: Path, *counts: int, keep: int = 10) -> None:
    writer = Writer(run, keep)
    for count in counts:
        writer.save(count, CONTENT, {"images_seen": count}, {"a": 1})
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


def test_what_is_saved_is_what_was_there_when_save_was_called(tmp_path: Path) -> None:
    weight, writer = torch.zeros(1_000_000), Writer(tmp_path, 3)
    writer.save(1, {"model": {"w": weight}}, {}, {})
    weight.add_(1)
    writer.wait()
    folder = newest(tmp_path)
    assert folder is not None
    assert load(folder, "model")[1]["model"]["w"].sum() == 0


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


def test_an_error_while_writing_reaches_the_trainer(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    writer = Writer(tmp_path, 3)
    writer.save(1, CONTENT, {}, {})
    with pytest.raises(OSError, match="checkpoints"):
        writer.wait()
