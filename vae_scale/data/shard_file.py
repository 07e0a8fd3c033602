"""One shard: a plain WebDataset tar whose samples all have one size, and so an array."""

import contextlib
import functools
import hashlib
import io
import mmap
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from vae_scale.errors import UserError

Images = npt.NDArray[np.uint8]

FORMAT_VERSION = 1
ENCODINGS = ("npy", "png", "jpg", "webp")
BLOCK = 512  # bytes of a tar header, and what members are padded to
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

    @property
    def name(self) -> str:
        """File name."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Layout:
    """Where pixels lie in a shard of encoding npy.

    Every sample is a label member (header and one block) followed by a npy member, so samples are `stride` bytes apart
    and pixels of the first begin at `offset`. Other encodings have no layout: both are None.
    """

    encoding: str
    shape: tuple[int, int, int]

    @property
    def npy_header(self) -> bytes:
        """What precedes the pixels in each npy member."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": tuple(self.shape)})
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
        content = len(self.npy_header) + int(np.prod(self.shape))
        return 3 * BLOCK + -(-content // BLOCK) * BLOCK


def shard_name(name: str, split: str, number: int) -> str:
    """File name of a shard."""
    return f"{name}-{split}-{number:06d}.tar"


class _Hashing:
    """A file for writing that knows the hashes of what went through it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = 0
        self.md5 = hashlib.md5(usedforsecurity=False)
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self.md5.update(data)
        self.sha256.update(data)
        return self.file.write(data)


def write_shard(path: Path, keys: Sequence[str], labels: Sequence[int], images: Images, encoding: str) -> dict[str, Any]:
    """Writes one shard. `path` exists only once the shard is complete and on the disk.

    Args:
        path: The shard's final name.
        keys: One key per sample, all of one length.
        labels: One label per sample; -1 for none.
        images: uint8 [n, H, W, 3].
        encoding: One of `ENCODINGS`.

    Returns:
        The shard's entry in the manifest, without split and labels.

    Raises:
        OSError: the disk is full, or the folder cannot be written. Nothing is left behind.
    """
    import webdataset

    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb", buffering=1 << 20) as file:
            hashing = _Hashing(file)
            writer = webdataset.TarWriter(hashing, user="", group="", mode=0o444, mtime=0, encoder=False)
            for key, label, image in zip(keys, labels, images, strict=True):
                writer.write({"__key__": key, "cls": str(label).encode(), encoding: _encode(image, encoding)})
            writer.close()
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    return {
        "url": path.name,
        "nsamples": len(images),
        "filesize": hashing.size,
        "md5sum": hashing.md5.hexdigest(),
        "sha256": hashing.sha256.hexdigest(),
        "pixels_sha256": hashlib.sha256(images.tobytes()).hexdigest(),
    }


def _encode(image: Images, encoding: str) -> bytes:
    content = io.BytesIO()
    if encoding == "npy":
        np.save(content, image, allow_pickle=False)
    else:
        Image.fromarray(image).save(content, **SAVE_OPTIONS[encoding])
    return content.getvalue()


def map_shard(file: io.BufferedReader, samples: int, shape: tuple[int, int, int]) -> Images:
    """The images of a shard of encoding npy, mapped and not read: uint8 [samples, H, W, 3].

    Raises:
        UserError: it is not laid out as a shard of `samples` images of this shape.
    """
    layout = Layout("npy", shape)
    header, offset, stride = layout.npy_header, layout.offset, layout.stride
    assert offset is not None
    assert stride is not None
    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for row in (0, samples - 1):
        begin = row * stride + offset
        if content[begin - len(header) : begin] != header:
            raise UserError(f"{file.name}: sample {row} is not where it should be; the file is damaged, pack it again")
    strides = (stride, shape[1] * shape[2], shape[2], 1)
    images: Images = np.ndarray((samples, *shape), np.uint8, content, offset, strides)
    return images


def decode_shard(file: io.BufferedReader, samples: int, shape: tuple[int, int, int], encoding: str) -> Images:
    """The images of a shard of a compact encoding, decoded in threads: uint8 [samples, H, W, 3].

    Raises:
        UserError: it is damaged, or holds other images than the manifest says.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = [(member.name, tar.extractfile(member)) for member in tar if member.isfile()]
            encoded = [(name, content.read()) for name, content in members if content and name.endswith(f".{encoding}")]
    except tarfile.TarError as error:
        raise UserError(f"{file.name}: not a whole tar ({error}); pack it again") from None
    if len(encoded) != samples:
        raise UserError(f"{file.name}: {len(encoded)} images, the manifest says {samples}; pack it again")
    images = np.empty((samples, *shape), np.uint8)

    def decode(row: int) -> None:
        name, content = encoded[row]
        try:
            image = Image.open(io.BytesIO(content), formats=[str(SAVE_OPTIONS[encoding]["format"])])
            if (image.height, image.width) != shape[:2]:
                raise UserError(f"{file.name}: {name} is {image.width}x{image.height}, not as the manifest says")
            images[row] = np.asarray(image.convert("RGB"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file.name}: {name} cannot be decoded ({error})") from None

    list(_decoders().map(decode, range(samples), chunksize=32))
    return images


@functools.cache
def _decoders() -> ThreadPoolExecutor:
    """Threads that decode; Pillow does so outside the interpreter lock."""
    return ThreadPoolExecutor(thread_name_prefix="decode")
