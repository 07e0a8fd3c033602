"""Verification and inspection of packed shards."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bad_server import Server
from commands import pack
from conftest import CLASSES, COUNTS, discs
from PIL import Image

STRIDE = 29_696


def verify_problems(capsys: pytest.CaptureFixture[str], folder: Path) -> list[str]:
    """Runs --verify, which must fail, and returns the printed problems."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        pack("--verify", folder, "--workers=2")
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert sum(line.startswith("error: ") for line in output.err.splitlines()) == 1
    return output.out.splitlines()


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def test_intact_set_passes(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack("--verify", shards)
    assert capsys.readouterr().out == f"{shards}: 180 images in 9 shards match the manifest\n"


def test_every_problem_is_reported(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overwrite(copy / "stl10-train-000000.tar", 3 * STRIDE + 10_000, b"\0\1")  # pixels of the fourth image
    overwrite(copy / "stl10-train-000001.tar", 2 * STRIDE + 512, b"6")  # a label
    overwrite(copy / "stl10-train-000002.tar", STRIDE + 1536, b"?")  # an npy header
    (copy / "stl10-test-000000.tar").unlink()
    truncated = copy / "stl10-test-000001.tar"
    truncated.write_bytes(truncated.read_bytes()[:-1])
    overwrite(copy / "stl10-unlabeled-000000.tar", 5 * STRIDE, b"\xff")  # a tar header
    index = json.loads((copy / "index.json").read_text())
    entry = next(entry for entry in index["shardlist"] if entry["url"] == "stl10-unlabeled-000001.tar")
    entry["labels"][4] = 3
    entry["md5sum"] = "0" * 32
    (copy / "index.json").write_text(json.dumps(index))
    problems = verify_problems(capsys, copy)
    for name, parts in {
        "stl10-train-000000.tar": ["md5", "sha256 is", "sha256 of its pixels"],
        "stl10-train-000001.tar": ["md5", "sha256 is", "train-00000027.cls is '6', expected 7"],
        "stl10-train-000002.tar": ["md5", "sha256 is"],
        "stl10-test-000000.tar": ["missing"],
        "stl10-test-000001.tar": ["bytes"],
        "stl10-unlabeled-000000.tar": ["md5", "sha256 is", "contains 5 images, expected 25"],
        "stl10-unlabeled-000001.tar": ["md5", "unlabeled-00000029.cls is '-1', expected 3"],
    }.items():
        lines = [line for line in problems if f"/{name}: " in line]
        assert len(lines) == len(parts), lines
        assert all(part in line for part, line in zip(parts, lines, strict=True)), lines
    assert len(problems) == 15


def test_misplaced_samples_are_reported(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = copy / "stl10-train-000000.tar"
    content = damaged.read_bytes()
    damaged.write_bytes(content[STRIDE : 2 * STRIDE] + content[:STRIDE] + content[2 * STRIDE :])
    problems = verify_problems(capsys, copy)
    assert sum("sha256 of its pixels" in line for line in problems) == 1
    assert sum("cls is '" in line for line in problems) == 2


def test_problems_per_shard_are_limited(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = json.loads((copy / "index.json").read_text())
    index["shardlist"][0]["labels"] = [(label + 1) % 10 for label in index["shardlist"][0]["labels"]]
    (copy / "index.json").write_text(json.dumps(index))
    problems = verify_problems(capsys, copy)
    assert len(problems) == 11
    assert problems[-1].endswith("and 15 more problems")


@pytest.mark.parametrize("encoding", ["png", "jpg", "webp"])
def test_undecodable_images_are_reported(
    binaries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], encoding: str
) -> None:
    options = (f"--encoding={encoding}", "--splits=train", "--limit=6", "--images-per-shard=3")
    pack("--source=stl10", f"--data={binaries}", f"--out={tmp_path}", *options)
    pack("--verify", tmp_path)
    damaged = tmp_path / "stl10-train-000001.tar"
    content = bytearray(damaged.read_bytes())
    for key in (b"train-00000003", b"train-00000005"):  # the first is reported
        begin = content.index(key + b"." + encoding.encode()) + 512
        content[begin : begin + 40] = bytes(40)
    damaged.write_bytes(content)
    problems = verify_problems(capsys, tmp_path)
    assert len(problems) == 3
    assert f"train-00000003.{encoding} cannot be decoded" in problems[2]


def test_inspect_prints_splits_and_classes(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack("--inspect", shards, f"--out={tmp_path / 'sheet.png'}")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for split, (count, labeled) in {"train": (60, 60), "test": (30, 30), "unlabeled": (90, 0)}.items():
        line = next(line for line in lines if line[:1] == [split])
        assert (line[2], line[4]) == (str(count), str(labeled))
    (classes,) = (line[1:] for line in lines if line[:1] == ["class"])
    assert set(classes) == set(COUNTS)
    for name in CLASSES:
        line = next(line for line in lines if line[:1] == [name])
        assert dict(zip(classes, line[1:], strict=True)) == {"train": "6", "test": "3", "unlabeled": "0"}


def test_contact_sheet_contains_images_of_the_set(shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    pack("--inspect", copy)
    with Image.open(copy / "contact_sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    pack("--inspect", copy)  # gives the same picture
    with Image.open(copy / "contact_sheet.png") as sheet:
        assert np.array_equal(np.asarray(sheet), pixels)
    assert pixels.shape == (8 * 98 + 2, 8 * 98 + 2, 3)
    images = {image.tobytes() for seed, count in enumerate(COUNTS.values()) for image in discs(count, seed)}
    cells = [pixels[y : y + 96, x : x + 96].tobytes() for y in range(2, 786, 98) for x in range(2, 786, 98)]
    blank = bytes([255]) * (96 * 96 * 3)  # if a shard has fewer than eight images
    assert all(cell in images or cell == blank for cell in cells)
    assert len(set(cells)) > 50
    pack("--verify", copy)


@pytest.mark.parametrize("splits", [["train"], ["test", "unlabeled"]])
def test_contact_sheet_of_one_image(binaries: Path, tmp_path: Path, splits: list[str]) -> None:
    pack("--source=stl10", f"--data={binaries}", f"--out={tmp_path}", "--limit=1", f"--splits={','.join(splits)}")
    pack("--inspect", tmp_path)
    assert (tmp_path / "contact_sheet.png").is_file()


@pytest.fixture
def url(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of a server for the copy; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    running = Server(copy)
    yield running.url
    running.stop()


def test_remote_set_is_verified_and_inspected(
    url: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "current"
    folder.mkdir()
    monkeypatch.chdir(folder)
    pack("--verify", url)
    assert "match the manifest" in capsys.readouterr().out
    pack("--inspect", url)
    assert (folder / "contact_sheet.png").is_file()
    shutil.rmtree(tmp_path / "cache")
    (copy / "stl10-train-000001.tar").unlink()
    with pytest.raises(SystemExit):
        pack("--verify", url)
    output = capsys.readouterr()
    assert sum("stl10-train-000001.tar" in line for line in output.out.splitlines()) == 1
    assert "problems: 1" in output.err
