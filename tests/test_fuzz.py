"""Damaged and hostile files: what is read is right, or one line names the file; nothing else happens."""

import contextlib
import gzip
import io
import json
import os
import shutil
import struct
import tarfile
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES, discs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from vae_scale.config import Config, VAEConfig, parse
from vae_scale.data.images import decode, square
from vae_scale.data.packing import Source
from vae_scale.data.shard_file import map_shard, members
from vae_scale.data.shards import ShardSet
from vae_scale.data.stl10 import open_stl10, write_binaries
from vae_scale.errors import UserError
from vae_scale.models.networks import build
from vae_scale.models.vae import VAE
from vae_scale.pack import main as pack
from vae_scale.training import checkpoint
from vae_scale.training.tracking import _Lines

MIB = 2**20
fuzzed = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

# What breaks the readers of numbers, names and structures.
ODD_VALUES = st.one_of(
    st.sampled_from(
        [None, True, -1, 0, 2**31, 2**63, 10**400, 1.5, float("nan"), float("inf"), "", "../x", "/etc/passwd", "a\0b", "\ud800"]
    ),
    st.sampled_from(["\x1b[2J", "ü" * 300, [], {}, [[]], {"a": []}, [None], "e" * 5000, "pipe:id", "file:///etc/passwd"]),
    st.integers(),
    st.text(max_size=9),
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Some bytes with a few bits flipped, cut off, taken out, doubled or overwritten; often near the beginning."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = st.one_of(st.integers(0, max(len(found) - 1, 0)), st.integers(0, min(700, max(len(found) - 1, 0))))
        begin, size = draw(place), draw(st.integers(1, 600))
        kind = draw(st.sampled_from(["flip", "flip", "cut", "out", "double", "fill", "nines"]))
        if kind == "flip" and found:
            found[begin] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del found[begin:]
        elif kind == "out":
            del found[begin : begin + size]
        elif kind == "double":
            found[begin:begin] = found[begin : begin + size]
        elif kind == "fill":
            found[begin : begin + size] = bytes([draw(st.integers(0, 255))]) * len(found[begin : begin + size])
        elif kind == "nines":
            found[begin : begin + 11] = b"9" * 11
    return bytes(found)


@st.composite
def changed(draw: st.DrawFn, content: Any) -> Any:
    """A JSON value with one part replaced, doubled or left out."""
    found = json.loads(json.dumps(content))
    where = found
    while True:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        if not keys:
            return found
        key = draw(st.sampled_from(keys))
        if isinstance(where[key], (dict, list)) and draw(st.integers(0, 3)):
            where = where[key]
            continue
        if draw(st.integers(0, 4)) == 0:
            del where[key]
        else:
            where[key] = draw(ODD_VALUES)
        return found


@contextlib.contextmanager
def refusal(*names: object) -> Iterator[list[str]]:
    """What is done inside must succeed, or end in one line that names one of `names`, which is put into the list."""
    told: list[str] = []
    try:
        yield told
    except UserError as error:
        told.append(str(error))
        assert any(str(name) in told[0] for name in names), told
        assert len(told[0]) < 2000


def refused(call: Callable[[], object], *parts: object) -> str:
    """The line with which `call` must end; it holds all `parts`."""
    with pytest.raises(UserError) as caught:
        call()
    told = str(caught.value)
    assert all(str(part) in told for part in parts), told
    return told


def ended(capsys: pytest.CaptureFixture[str], *options: object) -> list[str]:
    """The last line with which a command must end with exit code 2; nothing that a terminal would obey is printed."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        pack([str(option) for option in options])
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert "\x1b[2J" not in said.out + said.err
    return [line for line in said.err.splitlines() if line.startswith("error: ")]


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@contextlib.contextmanager
def little_memory(most: int = 64 * MIB) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def everything(source: Source) -> list[np.ndarray]:
    """All images of a source."""
    return [split.decode(split.fetch(0, len(split.labels))) for split in source.splits]


# STL-10's binaries


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three labelled and two other images in STL-10's layout."""
    folder = tmp_path_factory.mktemp("small") / "stl10_binary"
    write_binaries(folder, {"train": iter([(discs(3, 1), [0, 4, 9])]), "unlabeled": iter([(discs(2, 2), [-1, -1])])}, CLASSES)
    (folder / "fold_indices.txt").write_text("0 1\n2\n")
    return folder


def archived(folder: Path) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        tar.add(folder, "stl10_binary")
    return content.getvalue()


@fuzzed
@given(st.data())
def test_damaged_binaries_are_read_as_they_are_or_refused(small: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = Path(shutil.copytree(small, tmp_path / "copy", dirs_exist_ok=True))
    victim = folder / data.draw(st.sampled_from(sorted(path.name for path in small.iterdir())))
    victim.write_bytes(data.draw(damaged(victim.read_bytes())))
    with refusal(folder):
        assert all(len(images) for images in everything(open_stl10(folder, ["train", "unlabeled"])))


@fuzzed
@given(st.data())
def test_a_damaged_archive_is_read_as_it_is_or_refused(small: Path, tmp_path: Path, data: st.DataObject) -> None:
    path, content = tmp_path / "stl10_binary.tar.gz", archived(small)
    if data.draw(st.booleans()):  # inside, and packed again
        path.write_bytes(gzip.compress(data.draw(damaged(content)), 1))
    else:
        path.write_bytes(data.draw(damaged(gzip.compress(content, 1))))
    with refusal(path, tmp_path):
        everything(open_stl10(path, ["train", "unlabeled"]))


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    """The header of a tar member, whatever size it claims."""
    member = tarfile.TarInfo(name)
    member.type = kind
    member.size = max(size, 0)
    raw = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    if size < 0:
        raw[124:136] = b"\xff" * 4 + struct.pack(">q", size)
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def test_an_archive_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stl10_binary.tar.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(header("././@LongLink", 400 * MIB, b"L"))  # a name of 400 MiB, in 2 MB
        for _ in range(400):
            file.write(bytes(MIB))
    with little_memory():
        refused(lambda: open_stl10(path, ["train"]), path, "a header of 419430400 bytes")
    sparse = b"".join([header("train_X.bin", 512, b"S"), bytes(512)])
    for content in (sparse, header("train_X.bin", -512) + bytes(2048), header("train_X.bin", 2**40)):
        path.write_bytes(gzip.compress(content))
        with little_memory():
            refused(lambda: open_stl10(path, ["train"]), path)


def test_binaries_of_absurd_sizes_are_refused(small: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small, tmp_path / "copy"))
    with little_memory(200 * MIB):
        for name, size in (("unlabeled_X.bin", 27_648 * 2**25), ("class_names.txt", 2**40), ("train_y.bin", 2**40)):
            os.truncate(folder / name, size)  # of holes
            refused(lambda: open_stl10(folder, ["train", "unlabeled"]), folder / name)
            shutil.copy(small / name, folder / name)
    (folder / "class_names.txt").write_bytes(b"caf\xe9")
    refused(lambda: open_stl10(folder, ["train"]), folder / "class_names.txt", "not UTF-8")


# Manifests and shards


@pytest.fixture(scope="module")
def packed(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same five images in three encodings."""
    out = {kind: tmp_path_factory.mktemp(kind) for kind in ("npy", "png", "jpg")}
    for kind, folder in out.items():
        options = [f"--data={small}", f"--out={folder}", f"--encoding={kind}", "--splits=train,unlabeled"]
        pack(["--source=stl10", *options, "--images-per-shard=2"])
    return out


def read_all(folder: Path) -> np.ndarray:
    shards = ShardSet.open(folder)
    assert len(shards.labels) == len(shards)
    return np.concatenate([shards.read(number) for number in range(len(shards.shards))])


@settings(fuzzed, max_examples=150)
@given(st.data())
def test_a_changed_manifest_is_believed_or_refused(packed: dict[str, Path], tmp_path: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(packed)))
    folder = Path(shutil.copytree(packed[kind], tmp_path / kind, dirs_exist_ok=True))
    text = (packed[kind] / "index.json").read_text()
    if data.draw(st.integers(0, 3)):
        (folder / "index.json").write_text(json.dumps(data.draw(changed(json.loads(text)))))
    else:
        (folder / "index.json").write_bytes(data.draw(damaged(text.encode())))
    before = tree(tmp_path)
    with refusal(folder):
        assert read_all(folder).shape[1:] == (96, 96, 3)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            pack(["--verify", str(folder)])
    assert tree(tmp_path) == before


@fuzzed
@given(st.data())
def test_a_damaged_shard_gives_its_images_or_is_refused_and_is_always_found_by_verify(
    packed: dict[str, Path], tmp_path: Path, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(sorted(packed)))
    whole = packed[kind]
    folder = Path(shutil.copytree(whole, tmp_path / kind, dirs_exist_ok=True))
    victim = folder / "stl10-train-000000.tar"
    content = data.draw(damaged(victim.read_bytes()))
    same = content == victim.read_bytes()
    if data.draw(st.booleans()):  # of the right size, so that it is looked into
        content = content[: victim.stat().st_size].ljust(victim.stat().st_size, b"\0")
        same = content == victim.read_bytes()
    victim.write_bytes(content)
    with refusal(victim):
        images = read_all(folder)
        assert images.shape == (5, 96, 96, 3)
        assert np.array_equal(images[2:], read_all(whole)[2:])
    if not same:
        with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit):
            pack(["--verify", str(folder)])
        assert str(victim) in said.getvalue()


NUMBERS = ["NaN", "1e999", "-Infinity", "1" + "0" * 400, "1" + "0" * 5000, "null", '"7"', "[]", "true"]
DEEP = "[" * 100_000


@pytest.mark.parametrize("key", ["nsamples", "filesize", "labels", "image_shape"])
@pytest.mark.parametrize("number", NUMBERS)
def test_no_number_of_a_manifest_is_trusted(packed: dict[str, Path], tmp_path: Path, key: str, number: str) -> None:
    text = (packed["npy"] / "index.json").read_text()
    begin = text.index(f'"{key}": ') + len(key) + 4
    begin += text[begin] == "["
    end = min(text.index(sign, begin) for sign in ",]}" if sign in text[begin:])
    (tmp_path / "index.json").write_text(text[:begin] + number + text[end:])
    refused(lambda: ShardSet.open(tmp_path), tmp_path / "index.json", "damaged")


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 100_000, "", "[]", "7", "\ud800", b"\xff\xfe{", b"\0"])
def test_json_that_is_no_manifest_is_refused_wherever_json_is_read(
    packed: dict[str, Path], tmp_path: Path, text: str | bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    content = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
    (tmp_path / "index.json").write_bytes(content)
    refused(lambda: ShardSet.open(tmp_path), tmp_path / "index.json")
    copy = Path(shutil.copytree(packed["npy"], tmp_path / "copy"))
    (copy / "sizes.json").write_bytes(content)
    ended(capsys, "--verify", copy)
    (tmp_path / ".packing-1-of-2.jsonl").write_bytes(content)
    (tmp_path / "index.json").unlink()
    (line,) = ended(capsys, "--merge", tmp_path)
    assert "not a journal" in line
    for name in (checkpoint.MANIFEST, checkpoint.STATE):
        folder = checkpoint.folder_of(tmp_path / name, 12)
        folder.mkdir(parents=True)
        (folder / name).write_bytes(content)
        assert checkpoint.newest(tmp_path / name) is None
    refused(lambda: checkpoint.load(folder), folder)
    (tmp_path / "config.json").write_bytes(content)
    refused(lambda: VAE.from_pretrained(tmp_path), tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(content + b'\n{"images": 3}\n')
    _Lines(tmp_path / "metrics.jsonl", 5)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"images": 3}\n'


def test_a_manifest_cannot_claim_more_memory_than_there_is(packed: dict[str, Path], tmp_path: Path) -> None:
    index = json.loads((packed["png"] / "index.json").read_text())
    index["vae_scale"]["image_shape"] = [4096, 4096, 3]
    index["shardlist"][0] |= {"nsamples": 1000, "labels": [0] * 1000}
    (tmp_path / "index.json").write_text(json.dumps(index))
    with little_memory():
        refused(lambda: ShardSet.open(tmp_path), tmp_path, "more than 16 GiB")
    os.truncate(tmp_path / "index.json", 2**40)
    with little_memory():
        refused(lambda: ShardSet.open(tmp_path), tmp_path / "index.json", "at most")


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: os.mkfifo(path), lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_no_shard_and_nobody_waits_for_it(
    packed: dict[str, Path], tmp_path: Path, make: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(packed["npy"], tmp_path / "copy"))
    victim = folder / "stl10-train-000000.tar"
    victim.unlink()
    make(victim)
    refused(lambda: read_all(folder), victim, "not a file")
    refused(lambda: pack_index(victim), victim)


def test_a_shard_may_be_a_link_and_nothing_is_written_through_one(packed: dict[str, Path], small: Path, tmp_path: Path) -> None:
    folder, elsewhere = Path(shutil.copytree(packed["npy"], tmp_path / "copy")), tmp_path / "elsewhere.tar"
    victim = folder / "stl10-train-000000.tar"
    victim.rename(elsewhere)
    victim.symlink_to(elsewhere)
    assert np.array_equal(read_all(folder), read_all(packed["npy"]))
    out, precious = tmp_path / "out", tmp_path / "precious"
    precious.write_text("as it was")
    out.mkdir()
    for name in ("stl10-train-000000.tar", ".stl10-train-000000.tar.tmp", "sizes.json", ".index.json.tmp"):
        (out / name).symlink_to(precious)
    pack(["--source=stl10", f"--data={small}", f"--out={out}", "--splits=train,unlabeled", "--images-per-shard=2"])
    assert precious.read_text() == "as it was"
    assert np.array_equal(read_all(out), read_all(packed["npy"]))


# Tars of others


def jpeg(size: tuple[int, int] = (32, 32)) -> bytes:
    content = io.BytesIO()
    Image.fromarray(discs(1, 3)[0]).resize(size).save(content, "JPEG")
    return content.getvalue()


def tar_of(*entries: tuple[str | tarfile.TarInfo, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for entry, part in entries:
            member = tarfile.TarInfo(entry) if isinstance(entry, str) else entry
            if member.isreg():
                member.size = len(part)
            tar.addfile(member, io.BytesIO(part))
    return content.getvalue()


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def pack_index(path: Path, *options: str) -> None:
    from vae_scale.data.indexing import index

    index([str(path)], None, 16 if "fit" in options else None, 1)


def test_links_devices_and_paths_in_a_tar_are_neither_followed_nor_made(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    secret, path = tmp_path / "secret.jpg", tmp_path / "in" / "theirs.tar"
    secret.write_bytes(jpeg())
    odd = [
        link("a.jpg", str(secret), tarfile.SYMTYPE),
        link("b.jpg", "c.jpg", tarfile.LNKTYPE),
        link("d.jpg", "d.jpg", tarfile.SYMTYPE),  # to itself
        link("e.jpg", "", tarfile.FIFOTYPE),
        link("f.jpg", "", tarfile.CHRTYPE),
        link("g.jpg", "", tarfile.DIRTYPE),
    ]
    names = ["../../up.jpg", f"{tmp_path}/absolute.jpg", "ünïcode/日本.jpg", "c.jpg", "..", "nothing", "x" * 300 + ".jpg"]
    path.write_bytes(tar_of(*((member, b"") for member in odd), *((name, jpeg()) for name in names)))
    before = tree(tmp_path)
    pack_index(path)
    assert tree(tmp_path) - before == {path.parent / "index.json"}
    assert len(read_all(path.parent)) == 5


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tar_of(("a.jpg", jpeg()), ("a.jpg", jpeg())), "two samples have one name"),
        (tar_of(("a.jpg", jpeg()), ("a.cls", b"1" + b"0" * 400)), "a.cls cannot be read"),
        (tar_of(("a.jpg", jpeg()), ("a.cls", b"-7")), "label"),
        (tar_of(("a.jpg", jpeg()), ("a.cls", b"\xff\x00")), "a.cls cannot be read"),
        (tar_of(("a.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")), "not one of JPEG, PNG, WEBP"),
        (tar_of(("\x1b[2J.jpg", b"")), r"\x1b[2J.jpg cannot be read"),
        (tar_of(("a.jpg", jpeg((4100, 4)))), "more than 4096 a side"),
        (header("a.jpg", -1024) + jpeg().ljust(4096, b"\0"), "-1,024 bytes"),
        (header("a.jpg", -1024, b"A") + bytes(4096), "-1,024 bytes"),
        (b"".join(header("././@LongLink", 1, b"L") + b"x".ljust(512, b"\0") for _ in range(3000)) + bytes(1024), "not a whole"),
        (gzip.compress(tar_of(("a.jpg", jpeg()))), "cut off, or compressed"),
        (header("a.jpg", 2**33) + bytes(2048), "8,589,934,592 bytes"),
        (bytes(10_240), "holds no image"),
    ],
)
def test_a_hostile_tar_is_refused_with_its_name(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "theirs.tar"
    path.write_bytes(content)
    with little_memory():
        told = refused(lambda: pack_index(path), path, reason)
    assert told.isprintable()
    assert tree(tmp_path) == {path}


def test_a_sparse_member_is_not_blown_up(tmp_path: Path) -> None:
    # A GNU sparse header: nothing in the tar, 2^36 bytes by its own account.
    raw = bytearray(header("a.jpg", 0, b"S"))
    raw[386:410] = b"00000000000\0" * 2
    raw[483:495] = b"\x80" + struct.pack(">Q", 2**36).rjust(11, b"\0")
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    path = tmp_path / "theirs.tar"
    path.write_bytes(bytes(raw) + bytes(10_240))
    with little_memory():
        refused(lambda: pack_index(path), path, "a.jpg")


@fuzzed
@given(st.data())
def test_a_damaged_tar_of_others_is_indexed_as_it_is_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "theirs.tar"
    whole = tar_of(("a.jpg", jpeg()), ("a.cls", b"3"), ("ü/" + "b" * 120 + ".jpg", jpeg()), ("c.txt", b"x"))
    path.write_bytes(data.draw(damaged(whole)))
    (tmp_path / "index.json").unlink(missing_ok=True)
    with refusal(path, tmp_path), contextlib.redirect_stderr(io.StringIO()):
        pack_index(path, data.draw(st.sampled_from(["fit", ""])))
        read_all(tmp_path)
    assert tree(tmp_path) <= {path, tmp_path / "index.json"}


# Images


def png_of(width: int, height: int) -> bytes:
    """A PNG of no more than its header and a little data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    sizes = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", sizes) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def encoded(kind: str) -> bytes:
    content = io.BytesIO()
    Image.fromarray(discs(1, 3)[0]).save(content, kind)
    return content.getvalue()


@settings(fuzzed, max_examples=200)
@given(st.data())
def test_a_damaged_image_is_decoded_or_refused(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"]))
    content = data.draw(damaged(encoded(kind)))
    out = np.empty((96, 96, 3), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(ValueError):
            decode(content, out)
        with contextlib.suppress(ValueError):
            assert square(io.BytesIO(content), 24).shape == (24, 24, 3)


@pytest.mark.parametrize("size", [(10_000, 10_000), (100_000, 100_000), (2**31 - 1, 2**31 - 1)])
def test_an_image_that_would_fill_the_memory_is_refused_with_its_size(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("a.png", "b.jpg"):
        (tmp_path / "mine" / name).write_bytes(png_of(*size))
    options = ["--source=folder", f"--data={tmp_path / 'mine'}", f"--out={tmp_path / 'out'}", "--splits=train"]
    with little_memory(), pytest.raises(SystemExit):
        pack(options)
    path = tmp_path / "theirs.tar"
    path.write_bytes(tar_of(("a.png", png_of(*size))))
    for how in ("", "fit"):
        with little_memory():
            refused(lambda how=how: pack_index(path, how), path, "a.png cannot be read", "pixels" if size[0] < 2**30 else "")
    with little_memory(), pytest.raises(ValueError):  # noqa: PT011 each decoder has its own words
        decode(png_of(*size), np.empty((96, 96, 3), np.uint8))


def test_a_photograph_that_is_a_program_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\n(owned) (w) file closefile\n"
    (tmp_path / "mine" / "a.jpg").write_bytes(program)
    options = ["--source=folder", f"--data={tmp_path / 'mine'}", f"--out={tmp_path / 'out'}", "--splits=train"]
    (line,) = ended(capsys, *options)
    assert "a.jpg: cannot be read as an image (it is not one of" in line


# Checkpoints and models


@pytest.fixture(scope="module")
def model() -> VAE:
    torch.manual_seed(1)
    return build(VAEConfig(preset="tiny", width=16, latent_channels=2), 32)


@pytest.fixture(scope="module")
def run(model: VAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    writer = checkpoint.Writer(folder, 3)
    for images in (12, 24):
        state = {"images_seen": images, "config": {"model": {}, "data": {}}}
        writer.save(images, {"model": model.state_dict(), "ema": model.state_dict(), "optimizer": {}}, state, model.describe())
    writer.wait()
    return folder


def rehash(folder: Path) -> None:
    """Makes a checkpoint whole again by its own account."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": checkpoint._sha256(path)}
        for path in folder.iterdir()
        if path.name != checkpoint.MANIFEST
    }
    (folder / checkpoint.MANIFEST).write_text(json.dumps({"version": 1, "files": files}))


@fuzzed
@given(st.data())
def test_a_damaged_checkpoint_is_passed_over_and_one_with_right_hashes_is_read_or_refused(
    run: Path, tmp_path: Path, data: st.DataObject
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy", dirs_exist_ok=True))
    folder = checkpoint.folder_of(copy, 24)
    victim = folder / data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    content = data.draw(damaged(victim.read_bytes()))
    same = content == victim.read_bytes()
    victim.write_bytes(content)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        found = checkpoint.newest(copy)
    if victim.name != checkpoint.MANIFEST and not same:
        assert found == checkpoint.folder_of(copy, 12)
        assert f"{folder} is skipped" in said.getvalue()
    rehash(folder)
    with refusal(folder):
        checkpoint.load(folder, "model", "ema")
    with refusal(folder):
        assert VAE.from_pretrained(folder, "ema.safetensors").sample(1).shape[1] == 3


@settings(fuzzed, max_examples=150)
@given(st.data())
def test_a_changed_description_of_a_model_is_refused_unless_it_is_that_of_the_weights(
    model: VAE, tmp_path: Path, data: st.DataObject
) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(data.draw(changed(model.describe()))))
    with refusal(tmp_path):
        VAE.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"width": 2**16},
        {"width": 10**12},
        {"width": 10**400},
        {"blocks": 10**9},
        {"multipliers": [1] * 10**5},
        {"multipliers": [10**18]},
        {"latent_channels": 2**62},
        {"network": "ladder"},
        {"scale": float("nan")},
        {"preset": {"__class__": "os.system"}},
    ],
)
def test_a_description_of_absurd_size_takes_no_memory(model: VAE, tmp_path: Path, change: dict[str, Any]) -> None:
    model.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    for values in (described | {"model": described["model"] | change}, described | {"resolution": 10**9}):
        (tmp_path / "config.json").write_text(json.dumps(values))
        told = refused(lambda: VAE.from_pretrained(tmp_path), tmp_path)
        assert len(told) < 1000
    flow = {"flow": {"width": 2**16, "depth": 9, "patch": 1}, "classes": []}
    (tmp_path / "config.json").write_text(json.dumps(model.describe() | flow))
    refused(lambda: VAE.from_pretrained(tmp_path), tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 2**62),
        struct.pack("<Q", 99_000_000) + b"{",
        struct.pack("<Q", 2) + b"{}",
        *(
            struct.pack("<Q", len(text)) + text + bytes(64)
            for text in (
                b'{"w":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,64]}}',
                b'{"w":{"dtype":"F32","shape":[16],"data_offsets":[0,1099511627776]}}',
                b'{"w":{"dtype":"X9","shape":[16],"data_offsets":[0,64]}}',
                b'{"../../w":{"dtype":"F32","shape":[16],"data_offsets":[0,64]}}',
                b'{"a":' * 20_000,
            )
        ),
    ],
)
def test_weights_that_are_none_are_refused(run: Path, model: VAE, tmp_path: Path, content: bytes) -> None:
    folder = checkpoint.folder_of(Path(shutil.copytree(run, tmp_path / "run")), 24)
    for name in ("model", "ema"):
        (folder / f"{name}.safetensors").write_bytes(content)
    rehash(folder)
    before = tree(tmp_path)
    with little_memory(), refusal(folder):
        checkpoint.load(folder, "model")
    refused(lambda: VAE.from_pretrained(folder), folder)
    model.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "mixture.safetensors").write_bytes(content)
    refused(lambda: VAE.from_pretrained(tmp_path / "other"), tmp_path / "other")
    assert {path for path in tree(tmp_path) - before if "other" not in path.parts} == set()


def test_a_mixture_of_other_latents_is_refused(model: VAE, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    good = {"weights": torch.ones(2) / 2, "means": torch.zeros(2, 32), "factors": torch.eye(32).repeat(2, 1, 1)}
    for change in (
        {"means": torch.zeros(2, 7)},
        {"factors": torch.ones(2, 32)},
        {"weights": torch.ones(2, dtype=torch.int64)},
    ):
        save_file(good | change, tmp_path / "mixture.safetensors")
        refused(lambda: VAE.from_pretrained(tmp_path), tmp_path, f"the mixture's {next(iter(change))}")
    save_file(good, tmp_path / "mixture.safetensors")
    assert VAE.from_pretrained(tmp_path).mixture is not None


@pytest.mark.parametrize("name", ["../state.json", "/etc/passwd", "..", "", "a\0b", "a/b", "\x1b[2J"])
def test_a_checkpoint_names_no_paths(run: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint.folder_of(Path(shutil.copytree(run, tmp_path / "run")), 24)
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest["files"][name] = {"size": 1, "sha256": "0" * 64}
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    assert checkpoint.newest(tmp_path / "run") == checkpoint.folder_of(tmp_path / "run", 12)
    assert "\x1b" not in capsys.readouterr().out


def test_a_state_without_what_is_needed_is_refused_with_the_key(run: Path, tmp_path: Path) -> None:
    folder = checkpoint.folder_of(Path(shutil.copytree(run, tmp_path / "run")), 24)
    refused(lambda: checkpoint.load(folder)[0]["config"]["data"]["shards"], folder / checkpoint.STATE, "lacks shards")
    for state in ({"config": []}, {"config": {"data": 7}}, []):
        (folder / checkpoint.STATE).write_text(json.dumps(state))
        refused(lambda: checkpoint.load(folder), folder, checkpoint.STATE)


# Configurations

YAML = (
    "seed: 3\nmodel: {preset: tiny, multipliers: [1, 2]}\ndata:\n  shards: data/x\n  crop: 0.1\ntrain: {images: 10, ema: 0.9}\n"
)


@settings(fuzzed, max_examples=150)
@given(st.one_of(damaged(YAML.encode()), st.text(max_size=60).map(lambda text: text.encode(errors="surrogatepass"))))
def test_a_damaged_configuration_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with refusal(path, *(f"{part}." for part in ("model", "data", "train", "optimizer")), "seed"):
        assert isinstance(parse(["--config", str(path)])[0], Config)


LAUGHS = (
    "data: {train: [&a [x,x], "
    + ", ".join(f"&{b} [*{a},*{a}]" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True))
    + "]}"
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (LAUGHS, "aliases"),
        ("data: &a {shards: *a}", "aliases"),
        ("data: " + "{a: " * 3000 + "1" + "}" * 3000, "deep"),
        ("a: " + "[" * 100_000, "deep"),
        (b"seed: \xff", "utf-8"),
        ("seed: \0", "not allowed"),
        ('run: "a\\0b"', "NUL"),
        ("seed: 1" + "0" * 5000, "digits"),
        ("seed: 1" + "0" * 400, "2^63"),
        ("optimizer: {lr: .inf}", "optimizer.lr"),
        ("optimizer: {lr: .nan}", "optimizer.lr"),
        ("train: {images: 1e999}", "train.images"),
        ("model: {multipliers: [" + "1," * 999 + "1]}", "multipliers has 1,000 values"),
        ("data: null", "data"),
        ("seed: ~", "seed is null"),
        ("train: {images: null}", "train.images is null"),
        ("model: {multipliers: [1, null]}", "multipliers"),
        ("data: {shards: ~}", "data.shards is null"),
        ("model: /etc/passwd", "section"),
        ("config: /etc/passwd", "command line"),
        ("run: !!python/name:os.system", "python/name"),
        ("run: !!python/object/new:os.system ['touch owned']", "python/object"),
        ("run: !!python/module:os", "python/module"),
        ("", "holds no options"),
        ("- a", "holds no options"),
        ("x: 1\n" * 300_000, "1,048,576 bytes"),
    ],
)
def test_a_hostile_configuration_is_refused(
    tmp_path: Path, content: str | bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "theirs.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with little_memory():
        told = refused(lambda: parse(["--config", str(path)]), reason)
    assert "root:" not in told
    assert tree(tmp_path) == {path}
    refused(lambda: parse(["--config", str(tmp_path)]), tmp_path, "Is a directory")


def test_rows_of_a_shard_lie_where_the_manifest_says(packed: dict[str, Path]) -> None:
    """The promise behind all of the above: what passes is the images."""
    path = packed["npy"] / "stl10-train-000000.tar"
    with path.open("rb") as file:
        assert np.array_equal(map_shard(file, 2, (96, 96, 3)), discs(3, 1)[:2])
        assert len(list(members(file))) == 4
