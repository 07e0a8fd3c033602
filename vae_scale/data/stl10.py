"""The official STL-10 binaries, from their folder, their archive, or the network.

https://cs.stanford.edu/~acoates/stl10/: images are uint8, three planes of 96x96 in column-major order; labels are
uint8, 1..10; train and test have labels, unlabeled has none.
"""

import gzip
import hashlib
import tarfile
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from einops import rearrange

from vae_scale.data.images import Images
from vae_scale.data.packing import Source, Split
from vae_scale.errors import UserError, one_line

SIDE = 96
IMAGE_BYTES = 3 * SIDE * SIDE
OFFICIAL = {"train": 5_000, "test": 8_000, "unlabeled": 100_000}
LABELLED = ("train", "test")
SMALL_FILE = 10_000_000  # bytes; labels, class names and folds are far below
MOST_IMAGES = 10_000_000  # of a split
_BROKEN = (tarfile.TarError, EOFError, OSError, zlib.error, ValueError, RecursionError)  # what a damaged archive raises


def planes_to_hwc(raw: bytes | Images) -> Images:
    """Column-major planes, as the binaries hold them, to uint8 [n, 96, 96, 3]."""
    planes = rearrange(np.frombuffer(raw, np.uint8), "(n c w h) -> c n h w", c=3, w=SIDE, h=SIDE)
    images = np.empty((*planes.shape[1:], 3), np.uint8)
    for colour, plane in enumerate(planes):  # one by one, they take a third of the time
        images[..., colour] = plane
    return images


def hwc_to_planes(images: Images) -> bytes:
    """The inverse of `planes_to_hwc`."""
    return np.ascontiguousarray(rearrange(images, "n h w c -> n c w h")).tobytes()


def open_stl10(path: Path, splits: list[str]) -> Source:
    """STL-10 in `path`: the folder of binaries, a folder that holds `stl10_binary`, or `stl10_binary.tar.gz`.

    Raises:
        UserError: a file is missing, truncated or of a wrong size, or a label is out of range.
    """
    unknown = sorted(set(splits) - set(OFFICIAL))
    if unknown:
        raise UserError(f"--splits {','.join(unknown)}: STL-10 has {', '.join(OFFICIAL)}")
    if path.is_file():
        return _source(_Archive(path), splits)
    for folder in (path, path / "stl10_binary"):
        if folder.is_dir() and any(folder.glob("*_X.bin")):
            return _source(_Folder(folder), splits)
    archive = path / "stl10_binary.tar.gz"
    if archive.is_file():
        return _source(_Archive(archive), splits)
    raise UserError(
        f"--data {path}: neither STL-10's binaries (train_X.bin ...) nor stl10_binary.tar.gz are there; "
        "give their folder, or add --download"
    )


def download(folder: Path) -> Path:
    """Fetches `stl10_binary.tar.gz` (2.6 GB) into `folder` unless it is there, and checks its md5.

    Raises:
        UserError: it cannot be fetched, or its md5 is wrong.
    """
    from torchvision.datasets import STL10
    from torchvision.datasets.utils import download_url

    folder.mkdir(parents=True, exist_ok=True)
    try:
        download_url(STL10.url, str(folder), STL10.filename, STL10.tgz_md5)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{folder / STL10.filename}: could not be downloaded from {STL10.url}: {error}") from None
    return folder / STL10.filename


@dataclass
class _Binary:
    """One split: labels in memory, images read on demand and in order."""

    name: str
    labels: list[int]
    files: "_Folder | _Archive"
    shape: tuple[int, int, int] = (SIDE, SIDE, 3)

    def fetch(self, start: int, stop: int) -> bytes | Images:
        name = f"{self.name}_X.bin"
        raw = self.files.read(name, start * IMAGE_BYTES, (stop - start) * IMAGE_BYTES)
        if len(raw) != (stop - start) * IMAGE_BYTES:
            raise UserError(f"{self.files.path / name}: ended early, while images {start} to {stop} were read")
        return raw

    def decode(self, raw: bytes | Images) -> Images:
        return planes_to_hwc(raw)


class _Folder:
    """The binaries as files of a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sizes = {file.name: file.stat().st_size for file in sorted(path.iterdir()) if file.is_file()}

    def small(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def read(self, name: str, offset: int, size: int) -> Images:
        return np.fromfile(self.path / name, np.uint8, size, offset=offset)

    def hashes(self, names: list[str]) -> dict[str, str]:
        return {name: _sha256(self.path / name) for name in names}


class _Unpacked(gzip.GzipFile):
    """A decompressed archive of which nobody takes more than `most` bytes at once: a header can ask for any number."""

    most = SMALL_FILE

    def read(self, size: int | None = -1) -> bytes:
        """See `io.RawIOBase`."""
        if size is None or not 0 <= size <= self.most:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


class _Archive:
    """The binaries inside `stl10_binary.tar.gz`, never unpacked to disk.

    One pass over the archive finds the members and keeps the small ones; a second one reads the images, which are
    asked for in order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sizes: dict[str, int] = {}
        self._small: dict[str, bytes] = {}
        self._members: dict[str, tarfile.TarInfo] = {}
        self._open: IO[bytes] | None = None
        self._name = ""
        self._lock = threading.Lock()
        try:
            unpacked = _Unpacked(path)
            self._tar = tarfile.open(fileobj=unpacked, mode="r:")  # noqa: SIM115 read until the process ends
            for member in self._tar:
                if member.size < 0:
                    raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
                if member.isreg() and not member.issparse():  # whose size is only what it says
                    self._add(member)
            unpacked.most = MOST_IMAGES * IMAGE_BYTES
        except _BROKEN as error:
            raise UserError(f"{path}: not a whole .tar.gz ({one_line(error)}); download it again") from None

    def _add(self, member: tarfile.TarInfo) -> None:
        name = member.name.rpartition("/")[2]
        self.sizes[name] = member.size
        self._members[name] = member
        if member.size < SMALL_FILE and not name.endswith("_X.bin"):
            content = self._tar.extractfile(member)
            self._small[name] = content.read() if content else b""

    def small(self, name: str) -> bytes:
        return self._small[name]

    def read(self, name: str, offset: int, size: int) -> bytes:
        with self._lock:
            try:
                if self._name != name:
                    self._open, self._name = self._tar.extractfile(self._members[name]), name
                assert self._open is not None
                self._open.seek(offset)
                return self._open.read(size)
            except _BROKEN as error:
                raise UserError(f"{self.path}: {name} cannot be read ({one_line(error)}); download it again") from None

    def hashes(self, names: list[str]) -> dict[str, str]:
        return {self.path.name: _sha256(self.path)}

    def order(self, splits: list[str]) -> list[str]:
        """The splits as they lie in the archive, so that it is decompressed only once more."""
        names = list(self._members)
        return sorted(splits, key=lambda split: names.index(f"{split}_X.bin"))


def _source(files: _Folder | _Archive, wanted: list[str]) -> Source:
    for name in ("class_names.txt", "fold_indices.txt", *(f"{split}_y.bin" for split in LABELLED)):
        if files.sizes.get(name, 0) >= SMALL_FILE:
            raise UserError(
                f"{files.path / name}: {files.sizes[name]:,} bytes, fewer than {SMALL_FILE:,} are read; not STL-10's"
            )
    found = [split for split in wanted if f"{split}_X.bin" in files.sizes]
    if len(found) < len(wanted):
        missing = next(split for split in wanted if split not in found)
        raise UserError(f"{files.path}: {missing}_X.bin is missing; leave the split out with --splits, or complete it")
    splits: list[Split] = [_Binary(split, _labels(files, split), files) for split in found]
    if isinstance(files, _Archive):
        order = files.order(found)
        splits.sort(key=lambda split: order.index(split.name))
    used = [f"{split}_X.bin" for split in found] + [f"{split}_y.bin" for split in found if split in LABELLED]
    return Source(splits, _class_names(files), lambda: files.hashes(used), _folds(files, splits))


def _class_names(files: _Folder | _Archive) -> list[str]:
    name = "class_names.txt"
    try:
        return files.small(name).decode().split() if name in files.sizes else []
    except UnicodeDecodeError as error:
        raise UserError(f"{files.path / name}: not UTF-8 ({error.reason}, byte {error.start})") from None


def _labels(files: _Folder | _Archive, split: str) -> list[int]:
    size = files.sizes[f"{split}_X.bin"]
    count, rest = divmod(size, IMAGE_BYTES)
    path = files.path / f"{split}_X.bin"
    if rest or not count:
        raise UserError(f"{path}: {size} bytes are not a multiple of {IMAGE_BYTES} (3x96x96); it is truncated or not STL-10")
    if count > MOST_IMAGES:
        raise UserError(f"{path}: {count:,} images, at most {MOST_IMAGES:,} are packed; it is not STL-10")
    if count != OFFICIAL[split]:
        print(f"note: {path} holds {count:,} images; the official STL-10 has {OFFICIAL[split]:,}")
    if split not in LABELLED:
        return [-1] * count
    name = f"{split}_y.bin"
    if name not in files.sizes:
        raise UserError(f"{files.path / name}: missing; it holds the labels of {path.name}")
    found = files.sizes[name]  # a label is a byte
    if found != count:
        raise UserError(f"{files.path / name}: {found} labels for {count} images of {path.name}; one is truncated")
    labels = np.frombuffer(files.small(name), np.uint8)
    if labels.min() < 1 or labels.max() > 10:
        raise UserError(f"{files.path / name}: label {labels[(labels < 1) | (labels > 10)][0]}; they must be 1 to 10")
    return [int(label) - 1 for label in labels]


def _folds(files: _Folder | _Archive, splits: list[Split]) -> list[list[int]] | None:
    train = next((len(split.labels) for split in splits if split.name == "train"), 0)
    if "fold_indices.txt" not in files.sizes or not train:
        return None
    path = files.path / "fold_indices.txt"
    try:
        folds = [[int(row) for row in line.split()] for line in files.small("fold_indices.txt").decode().splitlines()]
    except ValueError:
        raise UserError(f"{path}: holds something else than row numbers") from None
    if any(not 0 <= row < train for fold in folds for row in fold):
        raise UserError(f"{path}: names rows that train_X.bin does not have")
    return folds


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_binaries(folder: Path, splits: dict[str, Iterator[tuple[Images, list[int]]]], class_names: list[str]) -> None:
    """Writes images as STL-10's binaries.

    Args:
        folder: Made if it is missing; files in it are replaced.
        splits: For each split, chunks of images uint8 [n, 96, 96, 3] with labels 0..9 (ignored for unlabeled).
        class_names: Of labels 0, 1, ...
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "class_names.txt").write_text("\n".join(class_names) + "\n")
    for name, chunks in splits.items():
        with (folder / f"{name}_X.bin").open("wb") as images_file:
            labels: list[int] = []
            for images, chunk_labels in chunks:
                images_file.write(hwc_to_planes(images))
                labels += chunk_labels
        if name in LABELLED:
            (folder / f"{name}_y.bin").write_bytes(bytes(label + 1 for label in labels))
