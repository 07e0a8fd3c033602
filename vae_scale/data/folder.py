"""Any tree of images: your own photographs."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vae_scale.data.images import PHOTOGRAPHS, Images, square
from vae_scale.data.packing import Source, Split
from vae_scale.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
HELD_OUT = 10  # one image in this many goes to the test split where the tree has none


def open_folder(root: Path, splits: list[str], resolution: int) -> Source:
    """The images below `root`, resized and cropped to squares of `resolution` pixels.

    Where `root` has folders named like the splits, those are the splits. Else one image in ten, chosen by its name, is
    the test split, and the others are the first of the other splits. Below a split, the first folder is the class.

    Raises:
        UserError: there is no image.
    """
    if not root.is_dir():
        raise UserError(f"--data {root}: not a folder")
    if all((root / split).is_dir() for split in splits):
        found = {split: _images(root / split) for split in splits}
        bases = {split: root / split for split in splits}
    else:
        found = _hold_out(root, splits)
        bases = dict.fromkeys(splits, root)
    empty = [split for split in splits if not found[split]]
    if empty:
        raise UserError(f"--data {root}: no image ({', '.join(sorted(SUFFIXES))}) for split {', '.join(empty)}")
    folders = {split: [_class(path, bases[split]) for path in paths] for split, paths in found.items()}
    names = sorted({name for classes in folders.values() for name in classes if name})
    parts: list[Split] = [
        _Tree(split, [names.index(name) if name else -1 for name in folders[split]], found[split], resolution)
        for split in splits
    ]
    return Source(parts, names, lambda: {root.name: _digest(root, found)})


def _images(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _hold_out(root: Path, splits: list[str]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {split: [] for split in splits}
    first = next((split for split in splits if split != "test"), "test")
    for path in _images(root):
        digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
        held_out = "test" in splits and digest[0] % HELD_OUT == 0
        found["test" if held_out else first].append(path)
    return found


def _class(path: Path, base: Path) -> str:
    parts = path.relative_to(base).parts
    return parts[0] if len(parts) > 1 else ""


def _digest(root: Path, found: dict[str, list[Path]]) -> str:
    """Identifies the tree by names and sizes; reading every photograph twice would take too long."""
    lines = [
        f"{split} {path.relative_to(root).as_posix()} {path.stat().st_size}" for split, paths in found.items() for path in paths
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass
class _Tree:
    """One split of the tree."""

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
        return np.stack([self._square(path) for path in raw])

    def _square(self, path: Path) -> Images:
        try:
            return square(path, self.resolution, PHOTOGRAPHS)
        except ValueError as error:
            raise UserError(f"{path}: cannot be read as an image ({error}); mend it or take it out") from None
