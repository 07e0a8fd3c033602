"""STL-10 files and images that are damaged or malicious: they are read, or one line names the file."""

import contextlib
import gzip
import io
import os
import shutil
import struct
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import discs
from fuzzing import (
    MIB,
    allow_user_error,
    corrupted,
    expect_pack_error,
    expect_user_error,
    fuzz_settings,
    limit_memory,
    pack_index,
    tar_header,
    tar_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vae_scale.data.images import center_crop_resize, decode_image
from vae_scale.data.packing import Source
from vae_scale.data.stl10 import open_stl10
from vae_scale.pack import main as pack


def decode_all(source: Source) -> list[np.ndarray]:
    return [split.decode(split.fetch(0, len(split.labels))) for split in source.splits]


def make_archive(folder: Path) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        tar.add(folder, "stl10_binary")
    return content.getvalue()


@fuzz_settings
@given(st.data())
def test_corrupted_binaries_are_read_or_rejected(small_binaries: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = Path(shutil.copytree(small_binaries, tmp_path / "copy", dirs_exist_ok=True))
    victim = folder / data.draw(st.sampled_from(sorted(path.name for path in small_binaries.iterdir())))
    victim.write_bytes(data.draw(corrupted(victim.read_bytes())))
    with allow_user_error(folder):
        assert all(len(images) for images in decode_all(open_stl10(folder, ["train", "unlabeled"])))


@fuzz_settings
@given(st.data())
def test_corrupted_archives_are_extracted_or_rejected(small_binaries: Path, tmp_path: Path, data: st.DataObject) -> None:
    path, content = tmp_path / "stl10_binary.tar.gz", make_archive(small_binaries)
    shutil.rmtree(tmp_path / "stl10_binary", ignore_errors=True)
    if data.draw(st.booleans()):  # the tar inside the gzip file
        path.write_bytes(gzip.compress(data.draw(corrupted(content)), 1))
    else:
        path.write_bytes(data.draw(corrupted(gzip.compress(content, 1))))
    with allow_user_error(path, tmp_path):
        decode_all(open_stl10(path, ["train", "unlabeled"]))
    names = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")}
    known = {f"stl10_binary/{file.name}" for file in small_binaries.iterdir()}
    assert names <= {path.name, ".stl10_binary.lock", "stl10_binary"} | known


def test_malicious_archives_are_rejected(small_binaries: Path, tmp_path: Path) -> None:
    path = tmp_path / "stl10_binary.tar.gz"
    link = tarfile.TarInfo("train_X.bin")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    for content in (
        tar_header("train_X.bin", 512, b"S") + bytes(512),  # sparse
        tar_header("train_X.bin", -512) + bytes(2048),
        tar_header("train_X.bin", 2**40),
        tar_header("class_names.txt", 2**30),
        tar_of((link, b"")),
        tar_of(("unknown.bin", b"x")),
    ):
        path.write_bytes(gzip.compress(content))
        with limit_memory():
            expect_user_error(lambda: open_stl10(path, ["train"]), path, "cannot be extracted")
        assert {file.name for file in tmp_path.iterdir()} <= {path.name, ".stl10_binary.lock"}


def test_paths_in_an_archive_are_ignored(small_binaries: Path, tmp_path: Path) -> None:
    path = tmp_path / "data" / "stl10_binary.tar.gz"
    path.parent.mkdir()
    members = [(f"../../{name}", (small_binaries / name).read_bytes()) for name in ("train_X.bin", "train_y.bin")]
    path.write_bytes(gzip.compress(tar_of(*members, ("/etc/other", b"x"), ("other.bin", b"x"))))
    assert len(open_stl10(path, ["train"]).splits[0].labels) == 3
    assert {file.name for file in tmp_path.iterdir()} == {"data"}
    assert {file.name for file in (path.parent / "stl10_binary").iterdir()} == {"train_X.bin", "train_y.bin"}


def test_binaries_of_excessive_size_are_rejected(small_binaries: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_binaries, tmp_path / "copy"))
    with limit_memory(200 * MIB):
        for name, size in (("unlabeled_X.bin", 27_648 * 2**25), ("class_names.txt", 2**40), ("train_y.bin", 2**40)):
            os.truncate(folder / name, size)  # sparse files
            expect_user_error(lambda: open_stl10(folder, ["train", "unlabeled"]), folder / name)
            shutil.copy(small_binaries / name, folder / name)


def png_of(width: int, height: int) -> bytes:
    """Returns a PNG with a header and little data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    sizes = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", sizes) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def encode(kind: str) -> bytes:
    content = io.BytesIO()
    Image.fromarray(discs(1, 3)[0]).save(content, kind)
    return content.getvalue()


@settings(fuzz_settings, max_examples=200)
@given(st.data())
def test_corrupted_images_are_decoded_or_rejected(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"]))
    content = data.draw(corrupted(encode(kind)))
    out = np.empty((96, 96, 3), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(ValueError):
            decode_image(content, out)
        with contextlib.suppress(ValueError):
            assert center_crop_resize(io.BytesIO(content), 24).shape == (24, 24, 3)


@pytest.mark.parametrize("size", [(10_000, 10_000), (100_000, 100_000), (2**31 - 1, 2**31 - 1)])
def test_images_that_would_fill_the_memory_are_rejected(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "source").mkdir()
    for name in ("a.png", "b.jpg"):
        (tmp_path / "source" / name).write_bytes(png_of(*size))
    options = ["--source=folder", f"--data={tmp_path / 'source'}", f"--out={tmp_path / 'out'}", "--splits=train"]
    with limit_memory(), pytest.raises(SystemExit):
        pack(options)
    path = tmp_path / "foreign.tar"
    path.write_bytes(tar_of(("a.png", png_of(*size))))
    reason = "pixels" if size[0] < 2**30 else ""
    for option in ("", "resize"):
        with limit_memory():
            expect_user_error(lambda option=option: pack_index(path, option), path, "a.png cannot be read", reason)
    with limit_memory(), pytest.raises(ValueError):  # noqa: PT011 messages differ between decoders
        decode_image(png_of(*size), np.empty((96, 96, 3), np.uint8))


def test_a_program_named_like_an_image_is_not_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "source").mkdir()
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\n(owned) (w) file closefile\n"
    (tmp_path / "source" / "a.jpg").write_bytes(program)
    options = ["--source=folder", f"--data={tmp_path / 'source'}", f"--out={tmp_path / 'out'}", "--splits=train"]
    (line,) = expect_pack_error(capsys, *options)
    assert "a.jpg: cannot be read as an image (it is not one of" in line
