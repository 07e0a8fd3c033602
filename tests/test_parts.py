"""Packing in parts on several machines, and merging them."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import hash_files, pack
from conftest import COUNTS

from vae_scale.data.shards import ShardSet

PARTS = 3


def recorded(folder: Path) -> set[str]:
    """Returns the names of the shards in all journals."""
    lines = [line for path in folder.glob(".packing*") for line in path.read_text().splitlines()[1:]]
    return {json.loads(line)["url"] for line in lines}


def start_pack(*options: object) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "vae_scale.pack", *map(str, options)], stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def options(binaries: Path) -> list[str]:
    return ["--source=stl10", f"--data={binaries}", "--images-per-shard=8", "--workers=2"]


@pytest.fixture(scope="module")
def single_pack(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set packed by one process: 24 shards."""
    out = tmp_path_factory.mktemp("single")
    pack(*options, "--out", out)
    return out


@pytest.fixture(scope="module")
def packed_parts(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all parts, before the merge."""
    out = tmp_path_factory.mktemp("parts")
    for number in range(1, PARTS + 1):
        pack(*options, "--out", out, f"--part={number}/{PARTS}")
    return out


@pytest.fixture
def parts(packed_parts: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed_parts, tmp_path / "parts"))


def merge_error(capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    """Runs --merge, which must fail and change nothing, and returns its one-line error message."""
    before = hash_files(folder)
    with pytest.raises(SystemExit) as caught:
        pack("--merge", folder)
    assert caught.value.code == 2
    assert hash_files(folder) == before
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return error


def test_parts_from_separate_folders_merge_to_the_same_files(options: list[str], single_pack: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merged.mkdir()
    for number in (2, 1, 3):
        out = tmp_path / str(number)
        pack(*options, "--out", out, f"--part={number}/{PARTS}")
        assert len(list(out.glob("*.tar"))) == 8
        assert not (out / "index.json").exists()
        shutil.copytree(out, merged, dirs_exist_ok=True)
    pack("--merge", merged)
    assert hash_files(merged) == hash_files(single_pack)


def test_parts_packed_concurrently_merge_to_the_same_files(options: list[str], single_pack: Path, tmp_path: Path) -> None:
    processes = [start_pack(*options, f"--out={tmp_path}", f"--part={number}/2") for number in (1, 2)]
    assert [part.wait() for part in processes] == [0, 0]
    pack("--merge", tmp_path)
    assert hash_files(tmp_path) == hash_files(single_pack)


def test_killed_part_resumes_in_a_folder_with_another_part(binaries: Path, tmp_path: Path) -> None:
    options = ["--source=stl10", f"--data={binaries}", "--images-per-shard=2", "--encoding=png", "--workers=1"]
    out = tmp_path / "out"
    pack(*options, "--out", out, "--part=1/2")
    other = out / ".stl10-train-000000.tar.tmp"
    other.write_bytes(b"being written by another machine")
    killed = start_pack(*options, f"--out={out}", "--part=2/2")
    journal = out / ".packing-2-of-2.jsonl"
    while killed.poll() is None and (not journal.exists() or len(journal.read_text().splitlines()) < 5):
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    recorded = len(journal.read_text().splitlines()) - 1
    pack(*options, "--out", out, "--part=2/2")
    kept = [path for path in finished if path.stat().st_mtime_ns == finished[path]]
    assert len(kept) >= 45 + recorded - 1
    assert other.exists()
    other.unlink()
    pack("--merge", out)
    pack(*options, "--out", tmp_path / "single")
    assert hash_files(out) == hash_files(tmp_path / "single")


def test_merged_set_is_not_changed(options: list[str], parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack("--merge", parts)
    before = {path: path.stat().st_mtime_ns for path in parts.iterdir()}
    for arguments in (["--merge", parts], [*options, "--out", parts, "--part=2/3"], [*options, "--out", parts]):
        capsys.readouterr()
        pack(*arguments)
        assert "already complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in parts.iterdir()} == before


def test_finished_part_is_not_changed(options: list[str], parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in parts.iterdir()}
    pack(*options, "--out", parts, "--part=2/3")
    assert "part 2/3 already complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in parts.iterdir()} == before


def test_more_parts_than_shards_are_merged(binaries: Path, tmp_path: Path) -> None:
    options = ["--source=stl10", f"--data={binaries}", f"--out={tmp_path}", "--splits=train"]
    for number in (1, 2, 3):
        pack(*options, f"--part={number}/3")
    pack("--merge", tmp_path)
    assert ShardSet.open(tmp_path).splits == {"train": COUNTS["train"]}


def test_errors_name_missing_and_damaged_shards_and_their_parts(
    options: list[str], single_pack: Path, parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [shard.url for shard in ShardSet.open(single_pack).shards]
    (parts / names[1]).unlink()
    (parts / names[2]).write_bytes((parts / names[2]).read_bytes()[:-1])
    flipped = bytearray((parts / names[9]).read_bytes())
    flipped[5000] ^= 1
    (parts / names[9]).write_bytes(flipped)
    journal = parts / ".packing-3-of-3.jsonl"
    journal.write_text("\n".join(journal.read_text().splitlines()[:-2]) + '\n{"url": "stl')
    message = merge_error(capsys, parts)
    assert f"5 of 24 shards are missing or damaged ({', '.join([names[1], names[2], names[9], *names[22:]])})" in message
    assert "run --part 1/3, 2/3, 3/3 again" in message
    for number in (1, 2, 3):
        pack(*options, "--out", parts, f"--part={number}/3")
    pack("--merge", parts)
    assert hash_files(parts) == hash_files(single_pack)


def test_error_names_the_missing_part(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (parts / ".packing-2-of-3.jsonl").unlink()
    message = merge_error(capsys, parts)
    assert "8 of 24 shards are missing" in message
    assert "...); run --part 2/3 again" in message


def test_parts_of_other_options_are_rejected(
    options: list[str], single_pack: Path, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    pack(*options, "--out", other, "--part=2/3", "--limit=50")
    shutil.copytree(other, parts, dirs_exist_ok=True)
    assert ".packing-2-of-3.jsonl: is of another source or other options" in merge_error(capsys, parts)
    for changed_options in ([], ["--part=1/3"], ["--part=1/3", "--limit=7"]):
        with pytest.raises(SystemExit):
            pack(*options, "--out", parts, *changed_options)
    (parts / ".packing-2-of-3.jsonl").unlink()  # as the message advises
    for number in (1, 2, 3):
        pack(*options, "--out", parts, f"--part={number}/3")
    pack("--merge", parts)
    assert hash_files(parts) == hash_files(single_pack)


def test_division_into_parts_can_change(options: list[str], single_pack: Path, parts: Path, tmp_path: Path) -> None:
    (parts / ".packing-3-of-3.jsonl").unlink()
    kept = {path: path.stat().st_mtime_ns for path in sorted(parts.glob("*.tar")) if path.name in recorded(parts)}
    assert len(kept) == 16
    other = Path(shutil.copytree(parts, tmp_path / "other"))
    pack(*options, "--out", parts)  # without --part
    pack(*options, "--out", other, "--part=2/2")
    pack("--merge", other)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert hash_files(parts) == hash_files(other) == hash_files(single_pack)


def test_merge_of_an_interrupted_pack_advises_to_continue(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(*options, "--out", tmp_path, "--part=2/2")
    (tmp_path / ".packing-2-of-2.jsonl").rename(tmp_path / ".packing.jsonl")
    message = merge_error(capsys, tmp_path)
    assert "12 of 24 shards are missing" in message
    assert "run --part 1/1 again" in message
