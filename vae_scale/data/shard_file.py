"""One shard: a WebDataset tar. In encoding npy all samples have the same size, so that it can be read as an array."""

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

from vae_scale.data.images import Images, center_crop_resize, decode_image
from vae_scale.errors import UserError, one_line
from vae_scale.files import atomic_path

FORMAT_VERSION = 1
ENCODINGS = ("npy", "png", "jpg", "webp")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # of members that hold an encoded image
BLOCK = 512  # bytes of a tar header; members are padded to a multiple of it
MODE = 0o444  # of each member
MAX_IMAGE_SIDE = 4096  # pixels
MAX_MEMBER_BYTES = 2**30  # members are read completely into memory
# Encoder settings. Errors of the lossy encodings are smaller than reconstruction errors of a VAE.
SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG"},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "quality": 95},
}


class ShardReadError(UserError):
    """A shard is missing, damaged or cannot be downloaded. Other shards may be readable."""


@dataclass(frozen=True)
class Shard:
    """One shard's entry in the manifest.

    Attributes:
        url: File name in the folder of the manifest, or a complete URL.
        split: Name of its split.
        samples: Number of images.
        filesize: Size of the file in bytes.
        md5: MD5 of the file.
        sha256: SHA-256 of the file.
        pixels_sha256: SHA-256 of the images before encoding, uint8 [n, H, W, 3]; None if unknown.
        labels: Label of each image; -1 for none.
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
    """Memory layout of a shard of encoding npy.

    Each sample is a label member (header and one block) followed by an npy member.

    Attributes:
        shape: Shape of a sample: (H, W, 3) for images.
        dtype: NumPy type string of a sample, as in npy headers.
    """

    shape: tuple[int, ...]
    dtype: str = "|u1"

    @property
    def npy_header(self) -> bytes:
        """Header of each npy member."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": self.dtype, "fortran_order": False, "shape": tuple(self.shape)})
        return header.getvalue()

    @property
    def offset(self) -> int:
        """Bytes before the first pixel."""
        return 3 * BLOCK + len(self.npy_header)

    @property
    def stride(self) -> int:
        """Bytes from one sample to the next."""
        size = len(self.npy_header) + math.prod(self.shape) * np.dtype(self.dtype).itemsize
        return 3 * BLOCK + -(-size // BLOCK) * BLOCK


def shard_name(name: str, split: str, number: int) -> str:
    """Returns the file name of a shard."""
    return f"{name}-{split}-{number:06d}.tar"


def write_shard(
    path: Path, keys: Sequence[str], labels: Sequence[int], images: npt.NDArray[Any], encoding: str
) -> dict[str, Any]:
    """Writes one shard atomically.

    Args:
        path: File to write.
        keys: One key per sample: ASCII, at most 96 characters.
        labels: One label per sample; -1 for none.
        images: Contiguous uint8 [n, H, W, 3]; for npy any dtype and shape [n, ...].
        encoding: One of `ENCODINGS`.

    Returns:
        The shard's entry in the manifest, without split and labels.

    Raises:
        OSError: The disk is full, or the folder is not writable. No partial file is left.
    """
    content = _array_tar(keys, labels, images) if encoding == "npy" else _encoded_tar(keys, labels, images, encoding)
    try:
        with atomic_path(path) as temporary:
            _write_direct(temporary, content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return {
        "url": path.name,
        "nsamples": len(images),
        "filesize": len(content),
        "md5sum": hashlib.md5(content, usedforsecurity=False).hexdigest(),
        "sha256": hashlib.sha256(content).hexdigest(),
        "pixels_sha256": hashlib.sha256(images.data).hexdigest(),
    }


def _write_direct(path: Path, content: memoryview, flags: int = getattr(os, "O_DIRECT", 0)) -> None:
    """Writes a file with O_DIRECT if possible, because copying to the page cache may take longer than hashing."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags, 0o666)
        try:
            written = 0
            while written < len(content):
                written += os.write(file, content[written:])
        finally:
            os.close(file)
    except OSError as error:
        if error.errno != errno.EINVAL or not flags:
            raise
        _write_direct(path, content, 0)  # not supported by the file system or for unaligned memory


def _array_tar(keys: Sequence[str], labels: Sequence[int], images: npt.NDArray[Any]) -> memoryview:
    """Returns the same bytes as `webdataset.TarWriter`, assembled as one array in 2% of the time."""
    samples, size = len(images), images[0].nbytes
    layout = Layout(images.shape[1:], images.dtype.str)
    header, offset, stride = layout.npy_header, layout.offset, layout.stride
    end = samples * stride
    content = _thread_buffer(end + 2 * BLOCK + -(end + 2 * BLOCK) % tarfile.RECORDSIZE)
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


def _thread_buffer(size: int) -> Images:
    """Returns a buffer that each thread reuses: uint8 [size], page-aligned as O_DIRECT requires."""
    if size > len(getattr(_thread, "buffer", b"")):
        _thread.buffer = mmap.mmap(-1, size)
    return np.frombuffer(_thread.buffer, np.uint8, size)


def _tar_headers(names: Sequence[str], sizes: Sequence[int]) -> Images:
    """Returns headers of tar members, which differ only in name, size and checksum: uint8 [n, 512]."""
    member = tarfile.TarInfo()
    member.mode = MODE
    headers = np.tile(np.frombuffer(member.tobuf(tarfile.USTAR_FORMAT), np.uint8), (len(names), 1))
    headers[:, :100] = _fields([name.encode("ascii") for name in names], 100)
    headers[:, 124:136] = _fields([b"%011o" % size for size in sizes], 12)
    headers[:, 148:156] = ord(" ")  # a checksum is computed with blanks in its place
    headers[:, 148:156] = _fields([b"%06o\0 " % total for total in headers.sum(axis=1).tolist()], 8)
    return headers


def _fields(texts: Sequence[bytes], width: int) -> Images:
    """Returns texts padded with zeros: uint8 [n, width]."""
    return np.array(texts, f"S{width}").view(np.uint8).reshape(-1, width)


def _encoded_tar(keys: Sequence[str], labels: Sequence[int], images: Images, encoding: str) -> memoryview:
    import webdataset

    content = io.BytesIO()
    writer = webdataset.TarWriter(content, user="", group="", mode=MODE, mtime=0, encoder=False)
    for key, label, image in zip(keys, labels, images, strict=True):
        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, **SAVE_OPTIONS[encoding])
        writer.write({"__key__": key, "cls": str(label).encode(), encoding: encoded.getvalue()})
    writer.close()
    return content.getbuffer()


def map_shard(file: BufferedReader, samples: int, layout: Layout) -> npt.NDArray[Any]:
    """Memory-maps the samples of a shard of encoding npy: [samples, *layout.shape].

    Raises:
        ValueError: The file does not have this layout or number of samples.
    """
    header, offset, stride = layout.npy_header, layout.offset, layout.stride
    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for row in (0, samples - 1):
        begin = row * stride + offset
        if content[begin - len(header) : begin] != header:
            raise ValueError(f"sample {row} is not at its position")
    strides = (stride, *np.empty(layout.shape, layout.dtype).strides)
    return np.ndarray((samples, *layout.shape), layout.dtype, content, offset, strides)


# More decoding threads than cores would compete for the interpreter lock.
_decode_slots = threading.BoundedSemaphore(os.cpu_count() or 1)


def decode_shard(file: BufferedReader, samples: int, shape: tuple[int, int, int], resize: bool) -> Images:
    """Decodes the images of a shard of a compact encoding: uint8 [samples, H, W, 3].

    Args:
        file: The shard.
        samples: Number of images.
        shape: (H, W, 3) of the result.
        resize: Whether to crop and resize images to `shape`, which must be square.

    Raises:
        ValueError: The shard is damaged, or differs from the manifest.
    """
    with _decode_slots:
        # Anonymous mappings are returned to the system when they are freed, and their addresses are close to mapped files.
        images = np.ndarray((samples, *shape), np.uint8, mmap.mmap(-1, samples * math.prod(shape)))
        count = 0
        for name, content in iter_members(file):
            if f".{member_type(name)}" not in SUFFIXES:
                continue
            if count < samples:
                try:
                    if resize:
                        images[count] = center_crop_resize(io.BytesIO(content), shape[0])
                    else:
                        decode_image(content, images[count])
                except ValueError as error:
                    raise ValueError(f"{name} cannot be decoded ({error})") from None
            count += 1
        if count != samples:
            raise ValueError(f"{count} images, expected {samples}")
        return images


def member_type(name: str) -> str:
    """Returns the part of a member's name after its first dot, as WebDataset does."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def iter_members(file: BufferedReader) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of each file in a tar; links and devices are skipped. Names are never used as paths.

    Raises:
        ValueError: The tar is incomplete, or a file in it is too large.
    """
    position = 0
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        # Plain members are parsed here: tarfile holds the interpreter lock for half the time that decoding a small image takes.
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
                _check_size(entry.name, entry.size)  # a negative size would make an endless loop
                if entry.issparse():
                    raise ValueError(f"{entry.name} is a sparse file of unverified size; make the tar without --sparse")
                source = tar.extractfile(entry) if entry.isreg() else None
                if source is not None:
                    yield entry.name, source.read()
    except (tarfile.TarError, OSError, RecursionError) as error:
        raise ValueError(f"not a complete tar ({one_line(error)})") from None


def _check_size(name: str, size: int) -> None:
    if not 0 <= size <= MAX_MEMBER_BYTES:
        raise ValueError(f"{name} has {size:,} bytes; the limit is {MAX_MEMBER_BYTES:,}")


def _plain_member(content: mmap.mmap, position: int) -> tuple[str, int, int] | None:
    """Returns name, position and size of the member at `position` if it is a complete regular file with a short name."""
    header = content[position : position + BLOCK]
    if len(header) < BLOCK or header[156:157] not in (b"0", b"\0") or header[345] or header[124] & 0x80:
        return None
    try:
        fields = [field.strip(b" \0") for field in (header[124:136], header[148:156])]
        if not all(field.isdigit() for field in fields):  # int() accepts signs, too
            return None
        size, checksum = (int(field, 8) for field in fields)
        name = header[:100].rstrip(b"\0").decode("ascii")
    except ValueError:
        return None
    is_valid = sum(header) - sum(header[148:156]) + 8 * ord(" ") == checksum and position + BLOCK + size <= len(content)
    return (name, position + BLOCK, size) if is_valid else None
