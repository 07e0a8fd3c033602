"""What a set of shards holds: tables, and a sheet of its images."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

from vae_scale.data.shards import ShardSet

ROWS, COLUMNS = 8, 8  # of the sheet; a row is of one shard, so that few have to be fetched or decoded
CELL, GAP, MARGIN = 128, 6, 24  # pixels
HEADING, CAPTION = 40, 22  # height in pixels of a split's name, and of a class's name below an image
PAPER, INK, PALE = (255, 255, 255), (30, 30, 30), (115, 115, 115)
MOST_CLASSES = 40  # rows of the table


def describe(shards: ShardSet) -> str:
    """Tables of a set's splits and classes."""
    height, width, _ = shards.image_shape
    size = sum(shard.filesize for shard in shards.shards)
    lines = [
        f"{shards.location}: {len(shards):,} images of {height}x{width} in {len(shards.shards):,} shards",
        f"encoding {shards.encoding}, {size / 2**20:,.1f} MiB, fingerprint {shards.fingerprint[:12]}",
        "",
    ]
    parts = {split: shards.select(split) for split in shards.splits}
    rows = [["split", "shards", "images", "MiB", "labelled"]]
    for split, part in parts.items():
        split_size = sum(shard.filesize for shard in part.shards) / 2**20
        labelled = int((part.labels >= 0).sum())
        rows.append([split, f"{len(part.shards):,}", f"{len(part):,}", f"{split_size:,.1f}", f"{labelled:,}"])
    lines += _table(rows)
    if int(shards.labels.max()) >= 0:
        names = _class_names(shards)
        counts = {split: np.bincount(part.labels[part.labels >= 0], minlength=len(names)) for split, part in parts.items()}
        rows = [["class", *counts]]
        rows += [[name, *(f"{count[label]:,}" for count in counts.values())] for label, name in enumerate(names)]
        lines += ["", *_table(rows[: MOST_CLASSES + 1])]
        if len(names) > MOST_CLASSES:
            lines.append(f"and {len(names) - MOST_CLASSES:,} classes more")
    return "\n".join(lines)


def _class_names(shards: ShardSet) -> list[str]:
    """Names of all labels; where the manifest has none, their numbers."""
    names = list(shards.class_names)
    return names + [str(label) for label in range(len(names), int(shards.labels.max()) + 1)]


def _table(rows: list[list[str]]) -> list[str]:
    """Columns as wide as they need to be, the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def write_contact_sheet(shards: ShardSet, path: Path) -> None:
    """Writes a PNG of 64 images or fewer, spread evenly over the shards of each split, with the names of their classes.

    Raises:
        UserError: a shard that it shows is missing or damaged.
    """
    parts = [shards.select(split) for split in shards.splits]
    # Eight rows are shared out; of more splits than that, each still has one.
    counts = [max(1, len(range(number, ROWS, len(parts)))) for number in range(len(parts))]
    rows = [_rows(part, count) for part, count in zip(parts, counts, strict=True)]
    steps = [CELL + (CAPTION if int(part.labels.max()) >= 0 else GAP) for part in parts]
    height = 2 * MARGIN + sum(HEADING + len(numbers) * step for numbers, step in zip(rows, steps, strict=True))
    sheet = Image.new("RGB", (2 * MARGIN + COLUMNS * (CELL + GAP) - GAP, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    names, top = _class_names(shards), MARGIN
    for part, numbers, step in zip(parts, rows, steps, strict=True):
        middle, right = top + HEADING // 2, sheet.width - MARGIN
        draw.text((MARGIN, middle), part.shards[0].split, INK, ImageFont.load_default(22), anchor="lm")
        draw.text((right, middle), f"{len(part):,} images", PALE, ImageFont.load_default(16), anchor="rm")
        top += HEADING
        for row in numbers:
            for column, (image, label) in enumerate(zip(part.images(row), part.labels[row].tolist(), strict=True)):
                left = MARGIN + column * (CELL + GAP)
                cell = ImageOps.pad(Image.fromarray(image), (CELL, CELL), Image.Resampling.BICUBIC, PAPER)
                sheet.paste(cell, (left, top))
                if label >= 0:
                    _caption(draw, names[label], left + CELL // 2, top + CELL + CAPTION // 2)
            top += step
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    sheet.save(temporary, "PNG")
    temporary.replace(path)


def _rows(part: ShardSet, count: int) -> list[npt.NDArray[np.int64]]:
    """Numbers of the samples in each row. A row is of one shard; shards, and samples within them, are spread evenly."""
    draw = np.random.default_rng(0)  # where sources repeat in some rhythm, the sheet must not keep time with it
    rows = []
    for shard, repeats in zip(*np.unique(_spread(len(part.shards), count, draw), return_counts=True), strict=True):
        samples = part.starts[shard] + _spread(part.shards[shard].samples, repeats * COLUMNS, draw)
        rows += [samples[begin : begin + COLUMNS] for begin in range(0, len(samples), COLUMNS)]
    return rows


def _spread(length: int, count: int, draw: np.random.Generator) -> npt.NDArray[np.int64]:
    """At most `count` of the numbers below `length`: one at random out of each of as many equal stretches."""
    edges = np.linspace(0, length, count + 1)
    return np.unique((edges[:-1] + draw.random(count) * np.diff(edges)).astype(np.int64))


def _caption(draw: ImageDraw.ImageDraw, text: str, x: int, y: int) -> None:
    font = ImageFont.load_default(13)
    while draw.textlength(text, font) > CELL and len(text) > 2:
        text = text[:-2] + "…"
    draw.text((x, y), text, PALE, font, anchor="mm")
