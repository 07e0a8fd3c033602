"""A shard is an array: plain WebDataset tars whose samples all have one size, and the manifest beside them."""

import contextlib
import hashlib
import io
import json
import mmap
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
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


@dataclass(frozen=True)
class Shard:
    """One shard's entry in the manifest."""

    path: Path
    split: str
    samples: int
    filesize: int
    sha256: str
    pixels_sha256: str
    labels: tuple[int, ...]


@dataclass(frozen=True)
class ShardSet:
    """Shards of one or more splits, and what their manifest says about them.

    Attributes:
        folder: Where `index.json` is.
        encoding: One of `ENCODINGS`.
        image_shape: (H, W, 3) of every image.
        class_names: Of labels 0, 1, ...; may be empty.
        shards: In the order of the manifest.
        fingerprint: Identifies source and packing options.
    """

    folder: Path
    encoding: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    shards: tuple[Shard, ...]
    fingerprint: str

    @staticmethod
    def open(folder: str | Path) -> "ShardSet":
        """Reads the manifest of `folder`. No shard is touched.

        Raises:
            UserError: there is no manifest, it is damaged, or of an unknown version.
        """
        folder = Path(folder)
        index = folder / "index.json"
        if not index.is_file():
            raise UserError(f"data.shards {folder}: no index.json there; write shards with python -m vae_scale.pack")
        try:
            return _from_manifest(folder, json.loads(index.read_text()))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{index}: damaged ({error!r}); pack again") from None

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """Number of the first sample of each shard, and the number of all samples at the end: int64 [shards + 1]."""
        return np.concatenate([[0], np.cumsum([shard.samples for shard in self.shards])]).astype(np.int64)

    @cached_property
    def labels(self) -> npt.NDArray[np.int64]:
        """Label of each sample; -1 for none: int64 [samples]."""
        return np.concatenate([np.asarray(shard.labels, np.int64) for shard in self.shards])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def splits(self) -> dict[str, int]:
        """Images of each split."""
        counts: dict[str, int] = {}
        for shard in self.shards:
            counts[shard.split] = counts.get(shard.split, 0) + shard.samples
        return counts

    def select(self, *splits: str) -> "ShardSet":
        """The shards of some splits; those that the set lacks are left out.

        Raises:
            UserError: it lacks all of them.
        """
        shards = tuple(shard for shard in self.shards if shard.split in splits)
        if not shards:
            raise UserError(f"{self.folder}: has no split {' or '.join(splits)}; it has {', '.join(self.splits)}")
        return ShardSet(self.folder, self.encoding, self.image_shape, self.class_names, shards, self.fingerprint)

    def read(self, number: int) -> Images:
        """Images of shard `number`: uint8 [n, H, W, 3]. Mapped, not read, where the encoding is npy; else decoded.

        Raises:
            UserError: the file is missing, damaged or not what the manifest says.
        """
        shard = self.shards[number]
        try:
            size = shard.path.stat().st_size
            if size != shard.filesize:
                raise UserError(f"{shard.path}: {size} bytes, the manifest says {shard.filesize}; copy or pack it again")
            return self._map(shard) if self.encoding == "npy" else self._decode(shard)
        except FileNotFoundError:
            raise UserError(f"{shard.path}: missing, though the manifest names it; copy or pack it again") from None

    def _map(self, shard: Shard) -> Images:
        layout = Layout("npy", self.image_shape)
        header, offset, stride = layout.npy_header, layout.offset, layout.stride
        assert offset is not None
        assert stride is not None
        with shard.path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for row in (0, shard.samples - 1):
            begin = row * stride + offset
            if content[begin - len(header) : begin] != header:
                raise UserError(f"{shard.path}: sample {row} is not where it should be; the file is damaged, pack it again")
        width, channels = self.image_shape[1:]
        strides = (stride, width * channels, channels, 1)
        images: Images = np.ndarray((shard.samples, *self.image_shape), np.uint8, content, offset, strides)
        return images

    def _decode(self, shard: Shard) -> Images:
        with tarfile.open(shard.path, "r:") as tar:
            members = [(member.name, tar.extractfile(member)) for member in tar if member.isfile()]
            encoded = [(name, file.read()) for name, file in members if file and name.endswith(f".{self.encoding}")]
        if len(encoded) != shard.samples:
            raise UserError(f"{shard.path}: {len(encoded)} images, the manifest says {shard.samples}; pack it again")
        images = np.empty((shard.samples, *self.image_shape), np.uint8)

        def decode(row: int) -> None:
            name, content = encoded[row]
            try:
                image = Image.open(io.BytesIO(content), formats=[str(SAVE_OPTIONS[self.encoding]["format"])])
                if (image.height, image.width) != self.image_shape[:2]:
                    raise UserError(f"{shard.path}: {name} is {image.width}x{image.height}, not as the manifest says")
                images[row] = np.asarray(image.convert("RGB"))
            except (OSError, ValueError) as error:
                raise UserError(f"{shard.path}: {name} cannot be decoded ({error})") from None

        # Pillow decodes outside the interpreter lock, so threads are enough.
        with ThreadPoolExecutor() as pool:
            list(pool.map(decode, range(shard.samples), chunksize=32))
        return images

    def verify(self, number: int) -> None:
        """Reads shard `number` as a whole and compares it with its hashes.

        Raises:
            UserError: it is not what was packed.
        """
        shard = self.shards[number]
        images = self.read(number)
        with shard.path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                raise UserError(f"{shard.path}: its sha256 is not the manifest's; the file is damaged, pack it again")
        lossless = self.encoding in ("npy", "png")
        if lossless and hashlib.sha256(images.tobytes()).hexdigest() != shard.pixels_sha256:
            raise UserError(f"{shard.path}: its pixels are not the manifest's; pack it again")


def _from_manifest(folder: Path, content: Any) -> ShardSet:
    ours = content["vae_scale"]
    if ours["version"] != FORMAT_VERSION:
        raise UserError(
            f"{folder / 'index.json'}: format version {ours['version']}, this vae_scale reads {FORMAT_VERSION}; "
            "pack again, or use the vae_scale that wrote it"
        )
    if ours["encoding"] not in ENCODINGS:
        raise ValueError(f"unknown encoding {ours['encoding']}")
    height, width, channels = (int(side) for side in ours["image_shape"])
    if not (0 < height <= 4096 and 0 < width <= 4096 and channels == 3):
        raise ValueError(f"image shape {ours['image_shape']}")
    shards = []
    for entry in content["shardlist"]:
        name, labels = str(entry["url"]), tuple(int(label) for label in entry["labels"])
        # A manifest is not trusted with paths: shards lie beside it.
        if Path(name).name != name or name.startswith("."):
            raise ValueError(f"shard {name!r} is not a file name")
        samples, size = int(entry["nsamples"]), int(entry["filesize"])
        stride = Layout(ours["encoding"], (height, width, channels)).stride
        if samples <= 0 or len(labels) != samples or (stride and samples * stride > size):
            raise ValueError(f"shard {name}: {samples} samples, {len(labels)} labels, {size} bytes")
        shards.append(Shard(folder / name, str(entry["split"]), samples, size, entry["sha256"], entry["pixels_sha256"], labels))
    if not shards:
        raise ValueError("no shards")
    names = tuple(str(name) for name in ours["class_names"])
    return ShardSet(folder, ours["encoding"], (height, width, channels), names, tuple(shards), str(ours["fingerprint"]))
