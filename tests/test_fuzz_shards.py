"""Manifests, shards and other tars that are damaged or malicious: they are read, or one line names the file."""

import contextlib
import gzip
import io
import json
import os
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import discs
from fuzzing import (
    allow_user_error,
    corrupted,
    expect_pack_error,
    expect_user_error,
    fuzz_settings,
    jpeg,
    limit_memory,
    list_files,
    mutated_json,
    pack_index,
    read_all,
    tar_header,
    tar_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from vae_scale.data.shard_file import Layout, iter_members, map_shard
from vae_scale.data.shards import ShardSet
from vae_scale.models.vae import VAE
from vae_scale.pack import main as pack
from vae_scale.runtime import checkpoint
from vae_scale.tracking.tracker import JsonlWriter


@pytest.fixture(scope="module")
def packed(small_binaries: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same five images in three encodings."""
    out = {kind: tmp_path_factory.mktemp(kind) for kind in ("npy", "png", "jpg")}
    for kind, folder in out.items():
        options = [f"--data={small_binaries}", f"--out={folder}", f"--encoding={kind}", "--splits=train,unlabeled"]
        pack(["--source=stl10", *options, "--images-per-shard=2"])
    return out


@settings(fuzz_settings, max_examples=150)
@given(st.data())
def test_mutated_manifests_are_read_or_rejected(packed: dict[str, Path], tmp_path: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(packed)))
    folder = Path(shutil.copytree(packed[kind], tmp_path / kind, dirs_exist_ok=True))
    text = (packed[kind] / "index.json").read_text()
    if data.draw(st.integers(0, 3)):
        (folder / "index.json").write_text(json.dumps(data.draw(mutated_json(json.loads(text)))))
    else:
        (folder / "index.json").write_bytes(data.draw(corrupted(text.encode())))
    before = list_files(tmp_path)
    with allow_user_error(folder):
        assert read_all(folder).shape[1:] == (96, 96, 3)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            pack(["--verify", str(folder)])
    assert list_files(tmp_path) == before


@fuzz_settings
@given(st.data())
def test_corrupted_shards_are_read_or_rejected_and_always_reported_by_verify(
    packed: dict[str, Path], tmp_path: Path, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(sorted(packed)))
    original = packed[kind]
    folder = Path(shutil.copytree(original, tmp_path / kind, dirs_exist_ok=True))
    damaged = folder / "stl10-train-000000.tar"
    content = data.draw(corrupted(damaged.read_bytes()))
    is_unchanged = content == damaged.read_bytes()
    if data.draw(st.booleans()):  # of the expected size, so that its content is read
        content = content[: damaged.stat().st_size].ljust(damaged.stat().st_size, b"\0")
        is_unchanged = content == damaged.read_bytes()
    damaged.write_bytes(content)
    with allow_user_error(damaged):
        images = read_all(folder)
        assert images.shape == (5, 96, 96, 3)
        assert np.array_equal(images[2:], read_all(original)[2:])
    if not is_unchanged:
        with contextlib.redirect_stdout(io.StringIO()) as stdout, pytest.raises(SystemExit):
            pack(["--verify", str(folder)])
        assert str(damaged) in stdout.getvalue()


INVALID_NUMBERS = ["NaN", "1e999", "-Infinity", "1" + "0" * 400, "1" + "0" * 5000, "null", '"7"', "[]", "true"]


@pytest.mark.parametrize("key", ["nsamples", "filesize", "labels", "image_shape"])
@pytest.mark.parametrize("number", INVALID_NUMBERS)
def test_invalid_numbers_in_a_manifest_are_rejected(packed: dict[str, Path], tmp_path: Path, key: str, number: str) -> None:
    text = (packed["npy"] / "index.json").read_text()
    begin = text.index(f'"{key}": ') + len(key) + 4
    begin += text[begin] == "["
    end = min(text.index(sign, begin) for sign in ",]}" if sign in text[begin:])
    (tmp_path / "index.json").write_text(text[:begin] + number + text[end:])
    expect_user_error(lambda: ShardSet.open(tmp_path), tmp_path / "index.json", "damaged")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "", "[]", "7", "\ud800", b"\xff\xfe{", b"\0"])
def test_invalid_json_is_rejected_by_all_readers(
    packed: dict[str, Path], tmp_path: Path, text: str | bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    content = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
    (tmp_path / "index.json").write_bytes(content)
    expect_user_error(lambda: ShardSet.open(tmp_path), tmp_path / "index.json")
    (tmp_path / ".packing-1-of-2.jsonl").write_bytes(content)
    (tmp_path / "index.json").unlink()
    (line,) = expect_pack_error(capsys, "--merge", tmp_path)
    assert "not a journal" in line
    for name in (checkpoint.MANIFEST, checkpoint.STATE):
        folder = checkpoint.checkpoint_folder(tmp_path / name, 12)
        folder.mkdir(parents=True)
        (folder / name).write_bytes(content)
        assert checkpoint.newest_checkpoint(tmp_path / name) is None
    expect_user_error(lambda: checkpoint.load_checkpoint(folder), folder)
    (tmp_path / "config.json").write_bytes(content)
    expect_user_error(lambda: VAE.from_pretrained(tmp_path), tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(content + b'\n{"images": 3}\n')
    JsonlWriter(tmp_path / "metrics.jsonl", 5)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"images": 3}\n'


def test_manifests_of_excessive_size_are_rejected(packed: dict[str, Path], tmp_path: Path) -> None:
    index = json.loads((packed["png"] / "index.json").read_text())
    index["vae_scale"]["image_shape"] = [4096, 4096, 3]
    index["shardlist"][0] |= {"nsamples": 1000, "labels": [0] * 1000}
    (tmp_path / "index.json").write_text(json.dumps(index))
    with limit_memory():
        expect_user_error(lambda: ShardSet.open(tmp_path), tmp_path, "more than 16 GiB")
    os.truncate(tmp_path / "index.json", 2**40)
    with limit_memory():
        expect_user_error(lambda: ShardSet.open(tmp_path), tmp_path / "index.json", "the maximum is")


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: os.mkfifo(path), lambda path: path.symlink_to("/dev/zero")])
def test_shards_that_are_not_files_are_rejected_without_blocking(
    packed: dict[str, Path], tmp_path: Path, make: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(packed["npy"], tmp_path / "copy"))
    damaged = folder / "stl10-train-000000.tar"
    damaged.unlink()
    make(damaged)
    expect_user_error(lambda: read_all(folder), damaged, "not a file")
    expect_user_error(lambda: pack_index(damaged), damaged)


def test_symbolic_links_are_read_but_not_written_through(packed: dict[str, Path], small_binaries: Path, tmp_path: Path) -> None:
    folder, elsewhere = Path(shutil.copytree(packed["npy"], tmp_path / "copy")), tmp_path / "elsewhere.tar"
    damaged = folder / "stl10-train-000000.tar"
    damaged.rename(elsewhere)
    damaged.symlink_to(elsewhere)
    assert np.array_equal(read_all(folder), read_all(packed["npy"]))
    out, target = tmp_path / "out", tmp_path / "target"
    target.write_text("unchanged")
    out.mkdir()
    for name in ("stl10-train-000000.tar", ".stl10-train-000000.tar.tmp", "sizes.json", ".index.json.tmp"):
        (out / name).symlink_to(target)
    pack(["--source=stl10", f"--data={small_binaries}", f"--out={out}", "--splits=train,unlabeled", "--images-per-shard=2"])
    assert target.read_text() == "unchanged"
    assert np.array_equal(read_all(out), read_all(packed["npy"]))


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_links_devices_and_paths_in_a_tar_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    secret, path = tmp_path / "secret.jpg", tmp_path / "in" / "foreign.tar"
    secret.write_bytes(jpeg())
    members = [
        link("a.jpg", str(secret), tarfile.SYMTYPE),
        link("b.jpg", "c.jpg", tarfile.LNKTYPE),
        link("d.jpg", "d.jpg", tarfile.SYMTYPE),  # a loop
        link("e.jpg", "", tarfile.FIFOTYPE),
        link("f.jpg", "", tarfile.CHRTYPE),
        link("g.jpg", "", tarfile.DIRTYPE),
    ]
    names = ["../../up.jpg", f"{tmp_path}/absolute.jpg", "ünïcode/日本.jpg", "c.jpg", "..", "nothing", "x" * 300 + ".jpg"]
    path.write_bytes(tar_of(*((member, b"") for member in members), *((name, jpeg()) for name in names)))
    before = list_files(tmp_path)
    pack_index(path)
    assert list_files(tmp_path) - before == {path.parent / "index.json"}
    assert len(read_all(path.parent)) == 5


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tar_of(("a.jpg", jpeg()), ("a.jpg", jpeg())), "two samples have the same key"),
        (tar_of(("a.jpg", jpeg()), ("a.cls", b"1" + b"0" * 400)), "a.cls cannot be read"),
        (tar_of(("a.jpg", jpeg()), ("a.cls", b"-7")), "label"),
        (tar_of(("a.jpg", jpeg()), ("a.cls", b"\xff\x00")), "a.cls cannot be read"),
        (tar_of(("a.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")), "not one of JPEG, PNG, WEBP"),
        (tar_of(("\x1b[2J.jpg", b"")), r"\x1b[2J.jpg cannot be read"),
        (tar_of(("a.jpg", jpeg((4100, 4)))), "more than 4096 pixels per side"),
        (tar_header("a.jpg", -1024) + jpeg().ljust(4096, b"\0"), "-1,024 bytes"),
        (tar_header("a.jpg", -1024, b"A") + bytes(4096), "-1,024 bytes"),
        (
            b"".join(tar_header("././@LongLink", 1, b"L") + b"x".ljust(512, b"\0") for _ in range(3000)) + bytes(1024),
            "not a complete",
        ),
        (gzip.compress(tar_of(("a.jpg", jpeg()))), "truncated or compressed"),
        (tar_header("a.jpg", 2**33) + bytes(2048), "8,589,934,592 bytes"),
        (bytes(10_240), "no image"),
    ],
)
def test_malicious_tars_are_rejected_with_their_name(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "foreign.tar"
    path.write_bytes(content)
    with limit_memory():
        message = expect_user_error(lambda: pack_index(path), path, reason)
    assert message.isprintable()
    assert list_files(tmp_path) == {path}


def test_sparse_members_are_not_expanded(tmp_path: Path) -> None:
    # A GNU sparse header that declares 2^36 bytes and has none.
    raw = bytearray(tar_header("a.jpg", 0, b"S"))
    raw[386:410] = b"00000000000\0" * 2
    raw[483:495] = b"\x80" + struct.pack(">Q", 2**36).rjust(11, b"\0")
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    path = tmp_path / "foreign.tar"
    path.write_bytes(bytes(raw) + bytes(10_240))
    with limit_memory():
        expect_user_error(lambda: pack_index(path), path, "a.jpg")


@fuzz_settings
@given(st.data())
def test_corrupted_foreign_tars_are_indexed_or_rejected(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "foreign.tar"
    content = tar_of(("a.jpg", jpeg()), ("a.cls", b"3"), ("ü/" + "b" * 120 + ".jpg", jpeg()), ("c.txt", b"x"))
    path.write_bytes(data.draw(corrupted(content)))
    (tmp_path / "index.json").unlink(missing_ok=True)
    with allow_user_error(path, tmp_path), contextlib.redirect_stderr(io.StringIO()):
        pack_index(path, data.draw(st.sampled_from(["resize", ""])))
        read_all(tmp_path)
    assert list_files(tmp_path) <= {path, tmp_path / "index.json"}


def test_mapped_rows_are_the_packed_images(packed: dict[str, Path]) -> None:
    path = packed["npy"] / "stl10-train-000000.tar"
    with path.open("rb") as file:
        assert np.array_equal(map_shard(file, 2, Layout((96, 96, 3))), discs(3, 1)[:2])
        assert len(list(iter_members(file))) == 4
