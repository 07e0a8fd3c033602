"""STL-10 as a source: its archive, its download, and damaged binaries."""

import hashlib
import resource
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_server import Server
from commands import error_line, hash_files, pack
from conftest import COUNTS
from torchvision.datasets import STL10

from vae_scale.data.shards import ShardSet
from vae_scale.pack import main


def make_archive(binaries: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "stl10_binary.tar.gz", "w:gz") as tar:
        tar.add(binaries, "stl10_binary")
    return folder / "stl10_binary.tar.gz"


def test_archive_is_extracted_once_and_packed_like_the_folder(
    binaries: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, options = make_archive(binaries, tmp_path / "data"), [f"--out={tmp_path / 'out'}", "--images-per-shard=25"]
    for data in (archive, archive.parent, archive.parent / "stl10_binary"):
        pack("--source=stl10", f"--data={data}", *options)
        archive.unlink(missing_ok=True)
        archive.touch()  # it is not read again
    assert capsys.readouterr().out.count("note: extracting") == 1
    assert hash_files(tmp_path / "out") == hash_files(shards)
    assert hash_files(archive.parent / "stl10_binary") == hash_files(binaries)


def test_parts_packed_concurrently_extract_the_archive_once(binaries: Path, shards: Path, tmp_path: Path) -> None:
    archive, out = make_archive(binaries, tmp_path / "data"), tmp_path / "out"
    options = ["--source=stl10", f"--data={archive}", f"--out={out}", "--images-per-shard=25"]
    command = [sys.executable, "-m", "vae_scale.pack", *options]
    processes = [subprocess.Popen([*command, f"--part={part}/2"], stdout=subprocess.PIPE, text=True) for part in (1, 2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("extracting" in output for output in outputs) == 1
    pack("--merge", out)
    assert hash_files(out) == hash_files(shards)


def truncate_images(folder: Path) -> str:
    path = folder / "train_X.bin"
    path.write_bytes(path.read_bytes()[:-100])
    return "train_X.bin"


def truncate_labels(folder: Path) -> str:
    path = folder / "test_y.bin"
    path.write_bytes(path.read_bytes()[:-1])
    return "test_y.bin"


def write_invalid_label(folder: Path) -> str:
    path = folder / "train_y.bin"
    path.write_bytes(b"\x0b" + path.read_bytes()[1:])
    return "label 11"


def remove_images(folder: Path) -> str:
    (folder / "unlabeled_X.bin").unlink()
    return "unlabeled_X.bin"


def write_invalid_fold(folder: Path) -> str:
    (folder / "fold_indices.txt").write_text("1 2 60\n")
    return "fold_indices.txt"


def remove_folder(folder: Path) -> str:
    shutil.rmtree(folder)
    return "--download"


DAMAGES = [truncate_images, truncate_labels, write_invalid_label, remove_images, write_invalid_fold, remove_folder]


@pytest.mark.parametrize("damage", DAMAGES)
def test_error_names_the_damaged_binary(binaries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "copy"
    shutil.copytree(binaries, folder)
    name = damage(folder)
    assert name in error_line(capsys, main, "--source=stl10", f"--data={folder}", f"--out={tmp_path / 'out'}")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_unusable_archive_leaves_no_incomplete_folder(
    binaries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = make_archive(binaries, tmp_path / "data")
    content = archive.read_bytes()
    middle = len(content) // 2
    # A single flipped bit may change nothing: in a periodic image, several distances of a match give the same bytes.
    overwritten = content[:middle] + bytes(100) + content[middle + 100 :]
    wrong_checksum = content[:-8] + bytes([content[-8] ^ 1]) + content[-7:]
    for damaged in (overwritten, wrong_checksum, content[:-5000], content[:100], b"not an archive"):
        archive.write_bytes(damaged)
        error = error_line(capsys, main, "--source=stl10", f"--data={archive}", f"--out={tmp_path / 'out'}")
        assert f"{archive}: cannot be extracted" in error
        assert "download it again" in error
        assert {path.name for path in archive.parent.iterdir()} <= {archive.name, ".stl10_binary.lock"}


def test_full_disk_leaves_no_incomplete_folder(binaries: Path, tmp_path: Path) -> None:
    archive = make_archive(binaries, tmp_path / "data")
    run = subprocess.run(
        [sys.executable, "-m", "vae_scale.pack", "--source=stl10", f"--data={archive}", f"--out={tmp_path / 'out'}"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    (error,) = (line for line in run.stderr.splitlines() if line.startswith("error:"))
    assert f"{archive}: cannot be extracted" in error
    assert "free some space" in error
    assert {path.name for path in archive.parent.iterdir()} <= {archive.name, ".stl10_binary.lock"}


@pytest.fixture
def served_archive(binaries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An archive that is served at STL-10's URL."""
    archive = make_archive(binaries, tmp_path / "served")
    running = Server(archive.parent)
    monkeypatch.setattr(STL10, "url", f"{running.url}/{archive.name}")
    yield archive
    running.stop()


def test_download_is_packed(served_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(STL10, "tgz_md5", hashlib.md5(served_archive.read_bytes()).hexdigest())
    options = ("--source=stl10", "--download", f"--data={tmp_path / 'data'}", f"--out={tmp_path / 'out'}")
    pack(*options)
    assert ShardSet.open(tmp_path / "out").splits == COUNTS
    served_archive.unlink()
    (tmp_path / "data" / served_archive.name).unlink()
    pack(*options)  # reads the extracted binaries


def test_download_with_a_wrong_md5_is_rejected(
    served_archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--source=stl10", "--download", f"--data={tmp_path / 'data'}", f"--out={tmp_path / 'out'}")
    assert "could not be downloaded" in error_line(capsys, main, *options)
    assert not (tmp_path / "out").exists()
