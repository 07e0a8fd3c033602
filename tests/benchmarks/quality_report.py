"""The table and the figure of `quality.py`."""

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from quality_methods import DEVICE, METHODS, PEERS
from quality_metrics import NUM_PICTURED, Rows, min_distance

from vae_scale.benchmark.measuring import machine, markdown
from vae_scale.data.images import Images
from vae_scale.files import write_json

# Columns of the table: key of a row: (title, format).
COLUMNS = {
    "name": ("", "{}"),
    "minutes": ("GPU-min" if DEVICE == "cuda" else "CPU-min", "{:.1f}"),
    "images": ("images", "{:,}"),
    "psnr": ("PSNR (dB)", "{:.2f}"),
    "bits_per_dim": ("bits/dim", "{:.3f}"),
    "distance": ("Frechet distance", "{:.2f}"),
    "distance_of_reconstructions": ("of reconstructions", "{:.2f}"),
    "over_notebook": ("ratio to the notebook's", "{:.2f}"),
}


def write_report(out: Path, rows: Rows, pictures: list[tuple[str, Images]], settings: dict[str, Any]) -> None:
    """Writes the results to `out` and prints them."""
    host, lines = machine(), ratios(rows)
    cells = [[format_cell(row.get(key), form) for key, (_, form) in COLUMNS.items()] for row in rows]
    parts = [markdown([[title for title, _ in COLUMNS.values()], *cells]), "\n".join(lines)]
    parts.append(", ".join(f"{name} {value}" for name, value in host.items()))
    text = "\n\n".join(parts)
    write_json(out / "quality.json", {"machine": host, **settings, "rows": rows, "ratios": lines})
    (out / "quality.md").write_text(f"{text}\n")
    draw(pictures, out / "quality.png")
    print(f"\n{text}\n\n{out}: quality.md, quality.json, quality.png")


def format_cell(value: Any, form: str) -> str:
    """Formats a value of the table; "-" if it was not measured."""
    return "-" if value is None else form.format(value)


def ratios(rows: Rows) -> list[str]:
    """Returns lines with the best distance of vae_scale relative to each peer."""
    best, lines = min_distance(rows, *(set(METHODS) - set(PEERS))), []
    for peer in PEERS:
        distance = min_distance(rows, peer)
        ratio = "not measured" if best is None or distance is None else f"{best / distance:.2f}"
        lines.append(f"best of vae_scale / {peer}: {ratio}")
    return lines


def draw(pictures: list[tuple[str, Images]], path: Path) -> None:
    """Saves a figure with one row of images per name."""
    side, margin = pictures[0][1].shape[1], 190
    step = side + 2
    canvas = Image.new("RGB", (margin + NUM_PICTURED * step, len(pictures) * step), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for number, (name, images) in enumerate(pictures):
        pen.text((6, number * step + side // 2), name, "black", font, anchor="lm")
        for column, image in enumerate(images):
            canvas.paste(Image.fromarray(image), (margin + column * step, number * step))
    canvas.save(path)
