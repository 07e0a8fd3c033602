"""Packing in parts on several machines, and merging them."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import COUNTS

from vae_scale.data.shards import ShardSet
from vae_scale.pack import main

PARTS = 3


def pack(*options: object) -> None:
    main([str(option) for option in options])


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


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


def merge_problems(capsys: pytest.CaptureFixture[str], folder: Path) -> list[str]:
    """Runs --merge, which must fail and change nothing, and returns the printed problems."""
    before = contents(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        pack("--merge", folder)
    assert caught.value.code == 2
    assert contents(folder) == before
    output = capsys.readouterr()
    assert sum(line.startswith("error: ") for line in output.err.splitlines()) == 1
    return output.out.splitlines() or [line for line in output.err.splitlines() if line.startswith("error: ")]


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
    assert contents(merged) == contents(single_pack)


def test_parts_packed_concurrently_merge_to_the_same_files(options: list[str], single_pack: Path, tmp_path: Path) -> None:
    processes = [start_pack(*options, f"--out={tmp_path}", f"--part={number}/2") for number in (1, 2)]
    assert [part.wait() for part in processes] == [0, 0]
    pack("--merge", tmp_path)
    assert contents(tmp_path) == contents(single_pack)


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
    assert contents(out) == contents(tmp_path / "single")


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
    problems = merge_problems(capsys, parts)
    assert len(problems) == 4
    assert "part 3/3 is missing 2 of its 8 shards" in problems[0]
    assert "--part 3/3" in problems[0]
    for line, name, part in zip(problems[1:], (names[1], names[2], names[9]), ("1/3", "1/3", "2/3"), strict=True):
        assert name in line
        assert f"--part {part} again" in line
    for number in (1, 2, 3):
        pack(*options, "--out", parts, f"--part={number}/3")
    pack("--merge", parts)
    assert contents(parts) == contents(single_pack)


def test_error_names_the_missing_part(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (parts / ".packing-2-of-3.jsonl").unlink()
    (problem,) = merge_problems(capsys, parts)
    assert "part 2/3 is missing" in problem
    assert ".packing-2-of-3.jsonl" in problem


def test_parts_of_other_options_are_rejected(
    options: list[str], single_pack: Path, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    pack(*options, "--out", other, "--part=2/3", "--limit=50")
    shutil.copytree(other, parts, dirs_exist_ok=True)
    problem = merge_problems(capsys, parts)[0]  # the others concern overwritten shards
    assert "part 2/3" in problem
    assert "another source or other options" in problem
    (parts / ".packing-2-of-3.jsonl").unlink()  # as the message advises
    for number in (1, 2, 3):
        pack(*options, "--out", parts, f"--part={number}/3")
    pack("--merge", parts)
    assert contents(parts) == contents(single_pack)


def test_parts_of_different_divisions_are_rejected(
    options: list[str], parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    pack(*options, "--out", other, "--part=2/2")
    shutil.copytree(other, parts, dirs_exist_ok=True)
    (problem,) = merge_problems(capsys, parts)
    assert "different divisions" in problem
    for options_of_other_set in ([], ["--part=1/4"], ["--part=1/3", "--limit=7"]):
        with pytest.raises(SystemExit):
            pack(*options, "--out", parts, *options_of_other_set)


def test_interrupted_pack_is_not_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".packing.jsonl").write_text(json.dumps({"vae_scale": {}}))
    (problem,) = merge_problems(capsys, tmp_path)
    assert "run the same command again" in problem
