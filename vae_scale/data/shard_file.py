"""One shard: a plain WebDataset tar whose samples all have one size, and so an array."""

import contextlib
import errno
import hashlib
import io
import math
import mmap
import os
import tarfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vae_scale.data.images import Images, decode, square
from vae_scale.errors import one_line

FORMAT_VERSION = 1
ENCODINGS = ("npy", "png", "jpg", "webp")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # of members that hold an encoded image
BLOCK = 512  # bytes of a tar header, and what members are padded to
MODE = 0o444  # of every member
MOST_SIDE = 4096  # pixels of an image
MOST_BYTES = 2**30  # of a member that is read, as a whole, into memory
# Encoder settings of the compact encodings. Lossy ones are set so that the loss is below what a VAE resolves.
SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG"},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "quality": 95},
}


@dataclass(frozen=True)
class Shard:
    """One shard's entry in the manifest.

    Attributes:
        url: File name beside the manifest, or a whole URL.
        split: The split it belongs to.
        samples: Images in it.
        filesize: Bytes of the file.
        md5: Of the file.
        sha256: Of the file.
        pixels_sha256: Of its images before they were encoded, uint8 [n, H, W, 3]; None where nobody knows.
        labels: One per image; -1 for none.
    """

    url: str
    split: str
    samples: int
    filesize: int
    md5: str
    sha256: str
    pixels_sha256: str | None
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Where pixels, or other numbers, lie in a shard of encoding npy.

    Every sample is a label member (header and one block) followed by a npy member, so samples are `stride` bytes apart
    and pixels of the first begin at `offset`. Other encodings have no layout: both are None.

    Attributes:
        encoding: One of `ENCODINGS`.
        shape: Of a sample: (H, W, 3) of an image.
        dtype: Of its numbers, as npy headers write it.
    """

    encoding: str
    shape: tuple[int, ...]
    dtype: str = "|u1"

    @property
    def npy_header(self) -> bytes:
        """What precedes the pixels in each npy member."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": self.dtype, "fortran_order": False, "shape": tuple(self.shape)})
        return header.getvalue()

    @property
    def offset(self) -> int | None:
        """Bytes before the first pixel."""
        return 3 * BLOCK + len(self.npy_header) if self.encoding == "npy" else None

    @property
    def stride(self) -> int | None:
        """Bytes from one sample to the next."""
        if self.encoding != "npy":
            return None
        content = len(self.npy_header) + math.prod(self.shape) * np.dtype(self.dtype).itemsize
        return 3 * BLOCK + -(-content // BLOCK) * BLOCK


def shard_name(name: str, split: str, number: int) -> str:
    """File name of a shard."""
    return f"{name}-{split}-{number:06d}.tar"


def write_shard(
    path: Path, keys: Sequence[str], labels: Sequence[int], images: npt.NDArray[Any], encoding: str
) -> dict[str, Any]:
    """Writes one shard. `path` exists only once the shard is complete and on the disk.

    Args:
        path: The shard's final name.
        keys: One key per sample: ASCII, at most 96 characters.
        labels: One label per sample; -1 for none.
        images: uint8 [n, H, W, 3], contiguous; with npy any numbers of any shape [n, ...].
        encoding: One of `ENCODINGS`.

    Returns:
        The shard's entry in the manifest, without split and labels.

    Raises:
        OSError: the disk is full, or the folder cannot be written. Nothing is left behind.
    """
    content = _array_tar(keys, labels, images) if encoding == "npy" else _encoded_tar(keys, labels, images, encoding)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # it may be a link to somewhere else
        _write_through(temporary, content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    return {
        "url": path.name,
        "nsamples": len(images),
        "filesize": len(content),
        "md5sum": hashlib.md5(content, usedforsecurity=False).hexdigest(),
        "sha256": hashlib.sha256(content).hexdigest(),
        "pixels_sha256": hashlib.sha256(images.data).hexdigest(),
    }


def _write_through(path: Path, content: memoryview) -> None:
    """Writes a file to the disk, past the system's cache where that can be: copying into it may take longer than a hash.

    Raises:
        OSError: as `write_shard`.
    """
    try:
        _write(path, content, getattr(os, "O_DIRECT", 0))
    except OSError as error:
        if error.errno != errno.EINVAL:  # this file system cannot, or not from this memory
            raise
        _write(path, content, 0)


def _write(path: Path, content: memoryview, flag: int) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flag, 0o666)
    try:
        written = 0
        while written < len(content):
            written += os.write(file, content[written:])
        os.fsync(file)
    finally:
        os.close(file)


def _array_tar(keys: Sequence[str], labels: Sequence[int], images: npt.NDArray[Any]) -> memoryview:
    """The bytes that `webdataset.TarWriter` makes of these samples, put together as one array: it takes 2% of the time."""
    samples, size = len(images), images[0].nbytes
    layout = Layout("npy", images.shape[1:], images.dtype.str)
    header, offset, stride = layout.npy_header, layout.offset, layout.stride
    assert offset is not None
    assert stride is not None
    end = samples * stride
    content = _memory(end + 2 * BLOCK + -(end + 2 * BLOCK) % tarfile.RECORDSIZE)
    rows = content[:end].reshape(samples, stride)
    texts = [str(label).encode() for label in labels]
    rows[:, :BLOCK] = _tar_headers([f"{key}.cls" for key in keys], [len(text) for text in texts])
    rows[:, BLOCK : 2 * BLOCK] = _fields(texts, BLOCK)
    rows[:, 2 * BLOCK : 3 * BLOCK] = _tar_headers([f"{key}.npy" for key in keys], [len(header) + size] * samples)
    rows[:, 3 * BLOCK : offset] = np.frombuffer(header, np.uint8)
    rows[:, offset : offset + size] = images.reshape(samples, -1).view(np.uint8)
    rows[:, offset + size :] = 0
    content[end:] = 0
    return content.data


_thread = threading.local()


def _memory(size: int) -> Images:
    """Memory of this thread, the same in each call: uint8 [size]. It is aligned as unbuffered writing demands."""
    if size > len(getattr(_thread, "memory", b"")):
        _thread.memory = mmap.mmap(-1, size)
    return np.frombuffer(_thread.memory, np.uint8, size)


def _tar_headers(names: Sequence[str], sizes: Sequence[int]) -> Images:
    """Headers of tar members: uint8 [n, 512]. All but name, size and checksum is the same in each."""
    member = tarfile.TarInfo()
    member.mode = MODE
    headers = np.tile(np.frombuffer(member.tobuf(tarfile.USTAR_FORMAT), np.uint8), (len(names), 1))
    headers[:, :100] = _fields([name.encode("ascii") for name in names], 100)
    headers[:, 124:136] = _fields([b"%011o" % size for size in sizes], 12)
    headers[:, 148:156] = ord(" ")  # a checksum counts itself as blanks
    headers[:, 148:156] = _fields([b"%06o\0 " % total for total in headers.sum(axis=1).tolist()], 8)
    return headers


def _fields(texts: Sequence[bytes], width: int) -> Images:
    """Texts padded with zeros: uint8 [n, width]."""
    return np.array(texts, f"S{width}").view(np.uint8).reshape(-1, width)


def _encoded_tar(keys: Sequence[str], labels: Sequence[int], images: Images, encoding: str) -> memoryview:
    """Samples of a compact encoding as a tar."""
    import webdataset

    content = io.BytesIO()
    writer = webdataset.TarWriter(content, user="", group="", mode=MODE, mtime=0, encoder=False)
    for key, label, image in zip(keys, labels, images, strict=True):
        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, **SAVE_OPTIONS[encoding])
        writer.write({"__key__": key, "cls": str(label).encode(), encoding: encoded.getvalue()})
    writer.close()
    return content.getbuffer()


def map_shard(file: BufferedReader, samples: int, shape: tuple[int, int, int]) -> Images:
    """The images of a shard of encoding npy, mapped and not read: uint8 [samples, H, W, 3].

    Raises:
        ValueError: it is not laid out as a shard of `samples` images of this shape.
    """
    layout = Layout("npy", shape)
    header, offset, stride = layout.npy_header, layout.offset, layout.stride
    assert offset is not None
    assert stride is not None
    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for row in (0, samples - 1):
        begin = row * stride + offset
        if content[begin - len(header) : begin] != header:
            raise ValueError(f"sample {row} is not where it should be")
    strides = (stride, shape[1] * shape[2], shape[2], 1)
    images: Images = np.ndarray((samples, *shape), np.uint8, content, offset, strides)
    return images


def decode_shard(file: BufferedReader, samples: int, shape: tuple[int, int, int], fit: bool) -> Images:
    """The images of a shard of a compact encoding, decoded: uint8 [samples, H, W, 3].

    Args:
        file: The shard.
        samples: Images in it.
        shape: (H, W, 3) of all of them.
        fit: Whether they are of other sizes, and are cut and resized to `shape`, a square.

    Raises:
        ValueError: it is damaged, or holds other images than the manifest says.
    """
    with _decoding:
        return _decoded(file, samples, shape, fit)


# More threads than cores would take the interpreter lock from each other.
_decoding = threading.BoundedSemaphore(os.cpu_count() or 1)


def _decoded(file: BufferedReader, samples: int, shape: tuple[int, int, int], fit: bool) -> Images:
    # Mapped memory goes back to the system when it is let go, and lies near that of mapped files.
    images = np.ndarray((samples, *shape), np.uint8, mmap.mmap(-1, samples * math.prod(shape)))
    found = 0
    for name, content in members(file):
        if f".{kind_of(name)}" not in SUFFIXES:
            continue
        if found < samples:
            try:
                if fit:
                    images[found] = square(io.BytesIO(content), shape[0])
                else:
                    decode(content, images[found])
            except ValueError as error:
                raise ValueError(f"{name} cannot be decoded ({error})") from None
        found += 1
    if found != samples:
        raise ValueError(f"{found} images, the manifest says {samples}")
    return images


def kind_of(name: str) -> str:
    """What comes after the first dot of a member's name, as WebDataset has it: what the member is."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def members(file: BufferedReader) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file in a tar. Names never become paths; links and devices are passed over, as in webdataset.

    Raises:
        ValueError: it is not a whole tar, or a file in it is too large to be a sample.
    """
    position = 0
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        # tarfile takes half as long for a small image as decoding it, and holds the interpreter lock. So plain members are
        # read here.
        while member := _plain_member(content, position):
            name, begin, size = member
            _check_size(name, size)
            yield name, content[begin : begin + size]
            position = begin + size + -size % BLOCK
        if content[position : position + 2 * BLOCK] == bytes(2 * BLOCK):
            return
    try:
        file.seek(position)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for entry in tar:
                _check_size(entry.name, entry.size)  # of all: a negative one would lead back to where we were
                if entry.issparse():
                    raise ValueError(
                        f"{entry.name} is a sparse file, whose size is what it says; make the tar without --sparse"
                    )
                content_of = tar.extractfile(entry) if entry.isreg() else None
                if content_of is not None:
                    yield entry.name, content_of.read()
    except (tarfile.TarError, OSError, RecursionError) as error:
        raise ValueError(f"not a whole tar ({one_line(error)})") from None


def _check_size(name: str, size: int) -> None:
    if not 0 <= size <= MOST_BYTES:
        raise ValueError(f"{name} has {size:,} bytes; 0 to {MOST_BYTES:,} are read")


def _plain_member(content: mmap.mmap, position: int) -> tuple[str, int, int] | None:
    """Name, place and size of the member at `position` if it is a whole file with a short name; None for all else."""
    header = content[position : position + BLOCK]
    if len(header) < BLOCK or header[156:157] not in (b"0", b"\0") or header[345] or header[124] & 0x80:
        return None
    try:
        fields = [field.strip(b" \0") for field in (header[124:136], header[148:156])]
        if not all(field.isdigit() for field in fields):  # int() takes signs, too
            return None
        size, checksum = (int(field, 8) for field in fields)
        name = header[:100].rstrip(b"\0").decode("ascii")
    except ValueError:
        return None
    whole = sum(header) - sum(header[148:156]) + 8 * ord(" ") == checksum and position + BLOCK + size <= len(content)
    return (name, position + BLOCK, size) if whole else None
