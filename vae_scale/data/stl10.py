"""Reading and download of the official STL-10 binaries.

https://cs.stanford.edu/~acoates/stl10/: images are uint8, three planes of 96x96 in column-major order; labels are
uint8, 1..10; train and test have labels, unlabeled has none.
"""

import gzip
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
from vae_scale.files import sha256_of

SIDE = 96
IMAGE_BYTES = 3 * SIDE * SIDE
OFFICIAL_SIZES = {"train": 5_000, "test": 8_000, "unlabeled": 100_000}
LABELED_SPLITS = ("train", "test")
MAX_METADATA_BYTES = 10_000_000  # labels, class names and folds are much smaller
MAX_IMAGES = 10_000_000  # of a split
_ARCHIVE_ERRORS = (tarfile.TarError, EOFError, OSError, zlib.error, ValueError, RecursionError)


def planes_to_hwc(raw: bytes | Images) -> Images:
    """Converts column-major planes, as in the binaries, to uint8 [n, 96, 96, 3]."""
    planes = rearrange(np.frombuffer(raw, np.uint8), "(n c w h) -> c n h w", c=3, w=SIDE, h=SIDE)
    images = np.empty((*planes.shape[1:], 3), np.uint8)
    for channel, plane in enumerate(planes):  # three times as fast as a single assignment
        images[..., channel] = plane
    return images


def hwc_to_planes(images: Images) -> bytes:
    """Inverts `planes_to_hwc`."""
    return np.ascontiguousarray(rearrange(images, "n h w c -> n c w h")).tobytes()


def open_stl10(path: Path, splits: list[str]) -> Source:
    """Opens STL-10: a folder of binaries, a folder that contains `stl10_binary`, or `stl10_binary.tar.gz`.

    Raises:
        UserError: A file is missing, truncated or of a wrong size, or a label is out of range.
    """
    if unknown := sorted(set(splits) - set(OFFICIAL_SIZES)):
        raise UserError(f"--splits {','.join(unknown)}: STL-10 has {', '.join(OFFICIAL_SIZES)}")
    for candidate in (path, path / "stl10_binary", path / "stl10_binary.tar.gz"):
        if candidate.is_file():
            return _make_source(_Archive(candidate), splits)
        if candidate.is_dir() and any(candidate.glob("*_X.bin")):
            return _make_source(_Folder(candidate), splits)
    raise UserError(
        f"--data {path}: contains neither STL-10's binaries (train_X.bin ...) nor stl10_binary.tar.gz; "
        "give the folder that contains them, or add --download"
    )


def download(folder: Path) -> Path:
    """Downloads `stl10_binary.tar.gz` (2.6 GB) to `folder` unless it exists, and checks its md5.

    Raises:
        UserError: The download fails, or the md5 is wrong.
    """
    from torchvision.datasets import STL10
    from torchvision.datasets.utils import download_url

    folder.mkdir(parents=True, exist_ok=True)
    try:
        download_url(STL10.url, str(folder), STL10.filename, STL10.tgz_md5)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{folder / STL10.filename}: could not be downloaded from {STL10.url}: {error}") from None
    return folder / STL10.filename


class _Folder:
    """The binaries in a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sizes = {file.name: file.stat().st_size for file in sorted(path.iterdir()) if file.is_file()}

    def read(self, name: str, offset: int, size: int) -> Images:
        return np.fromfile(self.path / name, np.uint8, size, offset=offset)

    def read_metadata(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def hashes(self, names: list[str]) -> dict[str, str]:
        return {name: sha256_of(self.path / name) for name in names}


class _LimitedGzipFile(gzip.GzipFile):
    """A gzip file that rejects reads of more than `max_read` bytes, because a damaged tar header can request any size."""

    max_read = MAX_METADATA_BYTES

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= self.max_read:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


class _Archive:
    """The binaries in `stl10_binary.tar.gz`, which is not unpacked to disk.

    A first pass lists the members and reads labels, class names and folds. A second pass reads the images in order.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.sizes = path, {}
        self._metadata: dict[str, bytes] = {}
        self._members: dict[str, tarfile.TarInfo] = {}
        self._file: tuple[str, IO[bytes]] | None = None
        self._lock = threading.Lock()
        try:
            unpacked = _LimitedGzipFile(path)
            self._tar = tarfile.open(fileobj=unpacked, mode="r:")  # noqa: SIM115 stays open until the process ends
            for member in self._tar:
                if member.size < 0:
                    raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
                if member.isreg() and not member.issparse():  # the size of a sparse member is not verified by its data
                    name = member.name.rpartition("/")[2]
                    self.sizes[name], self._members[name] = member.size, member
                    if member.size < MAX_METADATA_BYTES and not name.endswith("_X.bin"):
                        content = self._tar.extractfile(member)
                        self._metadata[name] = content.read() if content else b""
            unpacked.max_read = MAX_IMAGES * IMAGE_BYTES
        except _ARCHIVE_ERRORS as error:
            raise UserError(f"{path}: incomplete or damaged .tar.gz ({one_line(error)}); download it again") from None

    def read_metadata(self, name: str) -> bytes:
        return self._metadata[name]

    def read(self, name: str, offset: int, size: int) -> bytes:
        with self._lock:
            try:
                if self._file is None or self._file[0] != name:
                    file = self._tar.extractfile(self._members[name])
                    assert file is not None
                    self._file = name, file
                self._file[1].seek(offset)
                return self._file[1].read(size)
            except _ARCHIVE_ERRORS as error:
                raise UserError(f"{self.path}: {name} cannot be read ({one_line(error)}); download it again") from None

    def hashes(self, names: list[str]) -> dict[str, str]:
        return {self.path.name: sha256_of(self.path)}


@dataclass
class _BinarySplit:
    """One split as a `packing.Split`; images are read on demand."""

    name: str
    labels: list[int]
    files: _Folder | _Archive
    shape: tuple[int, int, int] = (SIDE, SIDE, 3)

    def fetch(self, start: int, stop: int) -> bytes | Images:
        name = f"{self.name}_X.bin"
        raw = self.files.read(name, start * IMAGE_BYTES, (stop - start) * IMAGE_BYTES)
        if len(raw) != (stop - start) * IMAGE_BYTES:
            raise UserError(f"{self.files.path / name}: ends before image {stop}")
        return raw

    def decode(self, raw: bytes | Images) -> Images:
        return planes_to_hwc(raw)


def _make_source(files: _Folder | _Archive, names: list[str]) -> Source:
    for name in ("class_names.txt", "fold_indices.txt", *(f"{split}_y.bin" for split in LABELED_SPLITS)):
        if (size := files.sizes.get(name, 0)) >= MAX_METADATA_BYTES:
            raise UserError(
                f"{files.path / name}: {size:,} bytes, the maximum is {MAX_METADATA_BYTES:,}; it is not from STL-10"
            )
    if missing := [name for name in names if f"{name}_X.bin" not in files.sizes]:
        raise UserError(f"{files.path}: {missing[0]}_X.bin is missing; add it, or exclude the split with --splits")
    splits: list[Split] = [_BinarySplit(name, _read_labels(files, name), files) for name in names]
    if isinstance(files, _Archive):  # one pass in the order of the archive decompresses all images
        order = list(files.sizes)
        splits.sort(key=lambda split: order.index(f"{split.name}_X.bin"))
    used = [f"{name}_X.bin" for name in names] + [f"{name}_y.bin" for name in names if name in LABELED_SPLITS]
    try:
        classes = files.read_metadata("class_names.txt").decode().split() if "class_names.txt" in files.sizes else []
    except UnicodeDecodeError as error:
        raise UserError(f"{files.path / 'class_names.txt'}: not UTF-8 ({error.reason}, byte {error.start})") from None
    return Source(splits, classes, lambda: files.hashes(used), _read_folds(files, splits))


def _read_labels(files: _Folder | _Archive, split: str) -> list[int]:
    path, labels_path = files.path / f"{split}_X.bin", files.path / f"{split}_y.bin"
    size = files.sizes[path.name]
    count, rest = divmod(size, IMAGE_BYTES)
    if rest or not count:
        raise UserError(f"{path}: {size} bytes are not a multiple of {IMAGE_BYTES} (3x96x96); it is truncated or not STL-10")
    if count > MAX_IMAGES:
        raise UserError(f"{path}: {count:,} images, the maximum is {MAX_IMAGES:,}; it is not from STL-10")
    if count != OFFICIAL_SIZES[split]:
        print(f"note: {path} contains {count:,} images; the official STL-10 has {OFFICIAL_SIZES[split]:,}")
    if split not in LABELED_SPLITS:
        return [-1] * count
    if labels_path.name not in files.sizes:
        raise UserError(f"{labels_path}: missing; it contains the labels of {path.name}")
    if (num_labels := files.sizes[labels_path.name]) != count:  # a label is one byte
        raise UserError(f"{labels_path}: {num_labels} labels for {count} images of {path.name}; one of them is truncated")
    labels = np.frombuffer(files.read_metadata(labels_path.name), np.uint8)
    if labels.min() < 1 or labels.max() > 10:
        raise UserError(f"{labels_path}: label {labels[(labels < 1) | (labels > 10)][0]}; labels must be 1 to 10")
    return [int(label) - 1 for label in labels]


def _read_folds(files: _Folder | _Archive, splits: list[Split]) -> list[list[int]] | None:
    train = next((len(split.labels) for split in splits if split.name == "train"), 0)
    if "fold_indices.txt" not in files.sizes or not train:
        return None
    path = files.path / "fold_indices.txt"
    try:
        folds = [[int(row) for row in line.split()] for line in files.read_metadata(path.name).decode().splitlines()]
    except ValueError:
        raise UserError(f"{path}: contains a value that is not a row number") from None
    if any(not 0 <= row < train for fold in folds for row in fold):
        raise UserError(f"{path}: contains rows that train_X.bin does not have")
    return folds


def write_binaries(folder: Path, splits: dict[str, Iterator[tuple[Images, list[int]]]], class_names: list[str]) -> None:
    """Writes images in the format of STL-10's binaries.

    Args:
        folder: Created if missing; existing files are replaced.
        splits: Chunks of each split: images uint8 [n, 96, 96, 3] and labels 0..9 (ignored for unlabeled).
        class_names: Names of labels 0, 1, ...
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "class_names.txt").write_text("\n".join(class_names) + "\n")
    for name, chunks in splits.items():
        labels: list[int] = []
        with (folder / f"{name}_X.bin").open("wb") as file:
            for images, chunk_labels in chunks:
                file.write(hwc_to_planes(images))
                labels += chunk_labels
        if name in LABELED_SPLITS:
            (folder / f"{name}_y.bin").write_bytes(bytes(label + 1 for label in labels))
