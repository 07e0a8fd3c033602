"""Summary of a set of shards: tables and a contact sheet."""

from pathlib import Path

import numpy as np

from vae_scale.data.shards import ShardSet
from vae_scale.files import atomic_path

ROWS, COLUMNS = 8, 8  # of the contact sheet; each row is read from one shard, to download and decode few shards
MAX_SHEET_SIDE = 2048  # pixels
MAX_CLASSES = 40  # rows of the table


def describe(shards: ShardSet) -> str:
    """Returns tables of a set's splits and classes."""
    height, width, _ = shards.image_shape
    size = sum(shard.filesize for shard in shards.shards) / 2**20
    lines = [
        f"{shards.location}: {len(shards):,} images of {height}x{width} in {len(shards.shards):,} shards",
        f"encoding {shards.encoding}, {size:,.1f} MiB, fingerprint {shards.fingerprint[:12]}",
        "",
    ]
    subsets = {split: shards.select(split) for split in shards.splits}
    rows = [["split", "shards", "images", "MiB", "labeled"]]
    for split, subset in subsets.items():
        size = sum(shard.filesize for shard in subset.shards) / 2**20
        num_labeled = int((subset.labels >= 0).sum())
        rows.append([split, f"{len(subset.shards):,}", f"{len(subset):,}", f"{size:,.1f}", f"{num_labeled:,}"])
    lines += _format_table(rows)
    if (num_classes := int(shards.labels.max()) + 1) > 0:
        names = [*shards.class_names, *map(str, range(len(shards.class_names), num_classes))]
        counts = [np.bincount(subset.labels[subset.labels >= 0], minlength=len(names)) for subset in subsets.values()]
        rows = [["class", *subsets]]
        rows += [[name, *(f"{count[label]:,}" for count in counts)] for label, name in enumerate(names)]
        lines += ["", *_format_table(rows[: MAX_CLASSES + 1])]
        if len(names) > MAX_CLASSES:
            lines.append(f"and {len(names) - MAX_CLASSES:,} more classes")
    return "\n".join(lines)


def _format_table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def write_contact_sheet(shards: ShardSet, path: Path) -> None:
    """Writes a PNG with eight rows of random images of all splits. The images of a row are of one shard.

    Raises:
        UserError: A shard is missing or damaged.
    """
    import torch
    from PIL import Image
    from torchvision.utils import make_grid

    rng = np.random.default_rng(0)  # random positions, because the order of the images may be periodic
    rows = []
    subsets = [shards.select(split) for split in shards.splits]
    for number, subset in enumerate(subsets):
        count = max(1, len(range(number, ROWS, len(subsets))))
        for index in np.sort(rng.choice(len(subset.shards), count, replace=count > len(subset.shards))):
            size = subset.shards[index].samples
            samples = subset.starts[index] + np.sort(rng.choice(size, min(size, COLUMNS), replace=False))
            rows.append(np.full((COLUMNS, *shards.image_shape), 255, np.uint8))
            rows[-1][: len(samples)] = subset.load_images(samples)
    grid = make_grid(torch.from_numpy(np.concatenate(rows)).permute(0, 3, 1, 2), COLUMNS, padding=2, pad_value=255)
    sheet = Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy())
    sheet.thumbnail((MAX_SHEET_SIDE, MAX_SHEET_SIDE))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        sheet.save(temporary, "PNG")
