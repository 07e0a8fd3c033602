"""Writes images in the format of STL-10's binaries."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vae_scale.data.images import Images


def write_binaries(folder: Path, splits: dict[str, tuple[Images, Sequence[int]]], class_names: Sequence[str] = ()) -> Path:
    """Writes splits, images uint8 [n, 96, 96, 3] and labels 0..9 (not used for unlabeled), to `folder`, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "class_names.txt").write_text("\n".join(class_names) + "\n")
    for name, (images, labels) in splits.items():
        np.ascontiguousarray(images.transpose(0, 3, 2, 1)).tofile(folder / f"{name}_X.bin")
        if name != "unlabeled":
            (folder / f"{name}_y.bin").write_bytes(bytes(label + 1 for label in labels))
    return folder
