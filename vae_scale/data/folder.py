"""A source that reads any folder of images."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vae_scale.data.images import PHOTO_FORMATS, Images, center_crop_resize
from vae_scale.data.packing import Source
from vae_scale.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
TEST_FRACTION = 10  # one image in this many is assigned to the test split


def open_folder(root: Path, splits: list[str], resolution: int) -> Source:
    """Opens the images below `root`, cropped to squares of `resolution` pixels.

    If `root` has a subfolder for each split, these are the splits. Otherwise one image in ten, chosen by the hash of its name,
    is assigned to the test split and the rest to the first other split. The first subfolder of a split is the class.

    Raises:
        UserError: A split has no images.
    """
    if not root.is_dir():
        raise UserError(f"--data {root}: not a folder")
    has_split_folders = all((root / split).is_dir() for split in splits)
    files = {split: _list_images(root / split) for split in splits} if has_split_folders else _assign_splits(root, splits)
    if empty := [split for split in splits if not files[split]]:
        raise UserError(f"--data {root}: no images ({', '.join(sorted(SUFFIXES))}) for split {', '.join(empty)}")
    level = int(has_split_folders)
    parts = {split: [path.relative_to(root).parts[level:] for path in paths] for split, paths in files.items()}
    classes = {split: [names[0] if len(names) > 1 else "" for names in parts[split]] for split in splits}
    class_names = sorted({name for names in classes.values() for name in names if name})
    numbers = {name: number for number, name in enumerate(class_names)}
    return Source(
        splits=[
            _FolderSplit(split, [numbers.get(name, -1) for name in classes[split]], files[split], resolution)
            for split in splits
        ],
        class_names=class_names,
        hashes={root.name: _digest(root, files, resolution)},
    )


def _list_images(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _assign_splits(root: Path, splits: list[str]) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {split: [] for split in splits}
    first = next((split for split in splits if split != "test"), "test")
    for path in _list_images(root):
        digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
        is_test = "test" in splits and digest[0] % TEST_FRACTION == 0
        files["test" if is_test else first].append(path)
    return files


def _digest(root: Path, files: dict[str, list[Path]], resolution: int) -> str:
    # Only names and sizes are hashed: hashing the content would read every file twice.
    lines = [
        f"{split} {path.relative_to(root).as_posix()} {path.stat().st_size}" for split, paths in files.items() for path in paths
    ]
    return hashlib.sha256("\n".join([str(resolution), *lines]).encode()).hexdigest()


@dataclass
class _FolderSplit:
    """One split of the folder as a `packing.Split`."""

    name: str
    labels: list[int]
    paths: list[Path]
    resolution: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.resolution, self.resolution, 3)

    def fetch(self, start: int, stop: int) -> list[Path]:
        return self.paths[start:stop]

    def decode(self, raw: Sequence[Path]) -> Images:
        images = np.empty((len(raw), *self.shape), np.uint8)
        for path, image in zip(raw, images, strict=True):
            try:
                image[:] = center_crop_resize(path, self.resolution, PHOTO_FORMATS)
            except ValueError as error:
                raise UserError(f"{path}: cannot be read as an image ({error}); repair or remove it") from None
        return images
