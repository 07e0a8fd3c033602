"""Reading and download of the official STL-10 binaries.

https://cs.stanford.edu/~acoates/stl10/: images are uint8, three planes of 96x96 in column-major order; labels are
uint8, 1..10; train and test have labels, unlabeled has none.
"""

import gzip
import shutil
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from einops import rearrange
from filelock import FileLock
from tqdm import tqdm

from vae_scale.data.images import Images
from vae_scale.data.packing import Source
from vae_scale.errors import UserError, one_line
from vae_scale.files import fsync, sha256_of

SIDE = 96
IMAGE_BYTES = 3 * SIDE * SIDE
OFFICIAL_SIZES = {"train": 5_000, "test": 8_000, "unlabeled": 100_000}
LABELED_SPLITS = ("train", "test")
FOLDER = "stl10_binary"
FILES = (
    *(f"{split}_X.bin" for split in OFFICIAL_SIZES),
    *(f"{split}_y.bin" for split in LABELED_SPLITS),
    "class_names.txt",
    "fold_indices.txt",
)
MAX_FILE_BYTES = 10_000_000 * IMAGE_BYTES
MAX_METADATA_BYTES = 10_000_000  # labels, class names and folds are much smaller


def open_stl10(path: Path, splits: list[str]) -> Source:
    """Opens STL-10: a folder of binaries, a folder that contains `stl10_binary`, or `stl10_binary.tar.gz`.

    An archive is extracted to `stl10_binary` beside it, unless this folder exists.

    Raises:
        UserError: A file is missing, truncated or of a wrong size, or a label is out of range; or the archive is damaged.
    """
    if unknown := sorted(set(splits) - set(OFFICIAL_SIZES)):
        raise UserError(f"--splits {','.join(unknown)}: STL-10 has {', '.join(OFFICIAL_SIZES)}")
    folder = _find_folder(path)
    labels = {split: _read_labels(folder, split) for split in splits}
    used = [f"{split}_X.bin" for split in splits] + [f"{split}_y.bin" for split in splits if split in LABELED_SPLITS]
    return Source(
        splits=[_BinarySplit(split, labels[split], folder / f"{split}_X.bin") for split in splits],
        class_names=_read_metadata(folder / "class_names.txt").decode(errors="replace").split(),
        hashes={name: sha256_of(folder / name) for name in used},
        folds=_read_folds(folder, len(labels.get("train", []))),
    )


def download(folder: Path) -> Path:
    """Downloads `stl10_binary.tar.gz` (2.6 GB) to `folder`, and checks its md5, unless it exists or is extracted there.

    Returns:
        The folder.

    Raises:
        UserError: The download fails, or the md5 is wrong.
    """
    from torchvision.datasets import STL10
    from torchvision.datasets.utils import download_url

    if not _has_binaries(folder / FOLDER):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            download_url(STL10.url, str(folder), STL10.filename, STL10.tgz_md5)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{folder / STL10.filename}: could not be downloaded from {STL10.url}: {error}") from None
    return folder


def _find_folder(path: Path) -> Path:
    archive = path if path.is_file() else path / f"{FOLDER}.tar.gz"
    folder = archive.with_name(FOLDER)
    for candidate in (path, folder):
        if _has_binaries(candidate):
            return candidate
    if not archive.is_file():
        raise UserError(
            f"--data {path}: contains neither STL-10's binaries (train_X.bin ...) nor {FOLDER}.tar.gz; "
            "give the folder that contains them, or add --download"
        )
    with FileLock(archive.with_name(f".{FOLDER}.lock")):  # processes may pack parts at the same time
        if not _has_binaries(folder):
            _extract(archive, folder)
    return folder


def _has_binaries(folder: Path) -> bool:
    return any(folder.glob("*_X.bin"))


def _extract(archive: Path, folder: Path) -> None:
    """Extracts the known files of an archive. `folder` exists once it is complete."""
    print(f"note: extracting {archive} to {folder}")
    temporary = folder.with_name(f".{FOLDER}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of an interrupted call
    try:
        temporary.mkdir()
        with (
            archive.open("rb") as file,
            tqdm.wrapattr(file, "read", archive.stat().st_size, desc=f"extracting {archive.name}") as measured_file,
            gzip.open(measured_file) as content,  # type: ignore[call-overload]
            tarfile.open(fileobj=content, mode="r|") as tar,
        ):
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # absent in the first releases of Python 3.11
            for member in tar:
                member.name = Path(member.name).name
                if member.name in FILES:
                    if not member.isreg() or member.issparse() or not 0 < member.size <= MAX_FILE_BYTES:
                        raise tarfile.ReadError(f"{member.name} is not a file of at most {MAX_FILE_BYTES:,} bytes")
                    tar.extract(member, temporary, set_attrs=False)
                    fsync(temporary / member.name)
            while content.read(2**20):  # checks the CRC at the end
                pass
        if not _has_binaries(temporary):
            raise tarfile.ReadError("contains no train_X.bin, test_X.bin or unlabeled_X.bin")
        temporary.replace(folder)
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError, RecursionError) as error:
        has_errno = isinstance(error, OSError) and error.errno is not None
        advice = "free some space or choose another folder" if has_errno else "it is incomplete or damaged; download it again"
        raise UserError(f"{archive}: cannot be extracted ({one_line(error)}); {advice}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_metadata(path: Path) -> bytes:
    """Returns the content of a small file; empty if it is missing."""
    if not path.exists():
        return b""
    if (size := path.stat().st_size) > MAX_METADATA_BYTES:
        raise UserError(f"{path}: {size:,} bytes, the maximum is {MAX_METADATA_BYTES:,}; it is not from STL-10")
    return path.read_bytes()


def _read_labels(folder: Path, split: str) -> list[int]:
    path, labels_path = folder / f"{split}_X.bin", folder / f"{split}_y.bin"
    if not path.is_file():
        raise UserError(f"{path}: missing; add it, or exclude the split with --splits")
    size = path.stat().st_size
    count, rest = divmod(size, IMAGE_BYTES)
    if rest or not 0 < size <= MAX_FILE_BYTES:
        raise UserError(f"{path}: {size:,} bytes, expected {IMAGE_BYTES} (3x96x96) per image; it is truncated or not STL-10")
    if count != OFFICIAL_SIZES[split]:
        print(f"note: {path} contains {count:,} images; the official STL-10 has {OFFICIAL_SIZES[split]:,}")
    if split not in LABELED_SPLITS:
        return [-1] * count
    labels = np.frombuffer(_read_metadata(labels_path), np.uint8)
    if len(labels) != count:
        raise UserError(f"{labels_path}: {len(labels):,} labels for {count:,} images; one of the files is missing or truncated")
    if labels.min() < 1 or labels.max() > 10:
        raise UserError(f"{labels_path}: label {labels[(labels < 1) | (labels > 10)][0]}; labels must be 1 to 10")
    return [int(label) - 1 for label in labels]


def _read_folds(folder: Path, images: int) -> list[list[int]] | None:
    path = folder / "fold_indices.txt"
    if not images or not path.exists():
        return None
    try:
        folds = [[int(row) for row in line.split()] for line in _read_metadata(path).decode().splitlines()]
        if any(not 0 <= row < images for fold in folds for row in fold):
            raise ValueError
    except ValueError:
        raise UserError(f"{path}: must contain rows of train_X.bin, from 0 to {images - 1:,}") from None
    return folds


@dataclass
class _BinarySplit:
    """One split as a `packing.Split`."""

    name: str
    labels: list[int]
    path: Path
    shape: tuple[int, int, int] = (SIDE, SIDE, 3)

    def fetch(self, start: int, stop: int) -> Images:
        raw = np.fromfile(self.path, np.uint8, (stop - start) * IMAGE_BYTES, offset=start * IMAGE_BYTES)
        if len(raw) != (stop - start) * IMAGE_BYTES:
            raise UserError(f"{self.path}: ends before image {stop}")
        return raw

    def decode(self, raw: Images) -> Images:
        planes = rearrange(raw, "(n c w h) -> c n h w", c=3, w=SIDE, h=SIDE)
        images = np.empty((*planes.shape[1:], 3), np.uint8)
        for channel, plane in enumerate(planes):  # three times as fast as a single assignment
            images[..., channel] = plane
        return images
