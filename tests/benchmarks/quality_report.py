"""The tables and the figure of `quality.py`."""

import statistics
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from quality_measuring import FLOOR_ROW, NUM_PICTURED, SMALL_SIDE, Result
from quality_methods import DEVICE, PEERS

from vae_scale.benchmark.measuring import machine, markdown
from vae_scale.data.images import Images
from vae_scale.files import write_json

# Columns of a table: key of a result: (title, format).
COLUMNS = {
    "images": ("images", "{:,.0f}"),
    "minutes": ("GPU-min" if DEVICE == "cuda" else "CPU-min", "{:.2f}"),
    "psnr": ("PSNR (dB)", "{:.2f}"),
    "rfd": ("rFD", "{:.2f}"),
    "gfd": ("gFD", "{:.2f}"),
    "above_floor": ("above floor", "{:.3f}"),
    "kid": ("KID x1000", "{:.2f}"),
    "kid_error": ("its error", "{:.2f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "density": ("density", "{:.3f}"),
    "coverage": ("coverage", "{:.3f}"),
    "nearer": ("nearer", "{:.3f}"),
}


def write_report(out: Path, results: list[Result], pictures: list[tuple[str, Images]], settings: dict[str, Any]) -> None:
    """Writes the results to `out` and prints them."""
    host, parts, ratios = machine(), [], {}
    for side in dict.fromkeys(result["side"] for result in results):
        group = [result for result in results if result["side"] == side]
        add_above_floor(group)
        ratios[side] = compare_with_peers(group)
        parts += [f"At {side} pixels:", format_table(group), "\n".join(f"- {line}" for line in ratios[side])]
    parts.append(", ".join(f"{name} {value}" for name, value in (host | settings).items()))
    text = "\n\n".join(parts)
    write_json(out / "quality.json", {"machine": host, "settings": settings, "results": results, "ratios": ratios})
    (out / "quality.md").write_text(f"{text}\n")
    draw_samples(pictures, out / "quality.png")
    print(f"\n{text}\n\n{out}: quality.md, quality.json, quality.png")


def add_above_floor(results: list[Result]) -> None:
    """Adds (gFD - floor) / (mean gFD of the notebook - floor) to the results of one resolution."""
    floor, notebook = floor_distance(results), mean_of(results, "gfd", method="notebook")
    for result in results:
        if notebook is not None and notebook > floor:
            result["above_floor"] = (result["gfd"] - floor) / (notebook - floor)


def floor_distance(results: list[Result]) -> float:
    """Returns the Frechet distance of the training images."""
    return next(result["gfd"] for result in results if result["name"] == FLOOR_ROW)


def mean_of(results: list[Result], key: str, **conditions: Any) -> float | None:
    """Returns the mean of a metric over the results that meet the conditions, or None if there are none."""
    values = [result[key] for result in results if conditions.items() <= result.items()]
    return statistics.fmean(values) if values else None


def compare_with_peers(results: list[Result]) -> list[str]:
    """Returns lines with the Frechet distance above the floor of the best row, relative to that of each peer."""
    floor = floor_distance(results)
    names = {result["name"] for result in results if result["method"] not in (None, *PEERS)}
    means = {name: mean for name in sorted(names) if (mean := mean_of(results, "gfd", name=name)) is not None}
    best, lines = min(means, key=means.__getitem__, default=None), []
    for peer in PEERS:
        distance = mean_of(results, "gfd", method=peer)
        if best is None or distance is None or distance <= floor:
            lines.append(f"best of ours / {peer}: not measured")
        else:
            lines.append(f"best of ours / {peer}: {(means[best] - floor) / (distance - floor):.3f} above the floor ({best})")
    return lines


def format_table(results: list[Result]) -> str:
    """Formats the results of one resolution as a Markdown table: means over seeds, and standard deviations of several seeds."""
    lines = [["", *(title for title, _ in COLUMNS.values())]]
    for name in dict.fromkeys(result["name"] for result in results):
        rows = [result for result in results if result["name"] == name]
        cells = [format_cell([row[key] for row in rows if key in row], form) for key, (_, form) in COLUMNS.items()]
        lines.append([name, *cells])
    return markdown(lines)


def format_cell(values: list[float], form: str) -> str:
    """Formats the mean, and the standard deviation if there are several values; "-" if there is none."""
    if not values:
        return "-"
    mean = form.format(statistics.fmean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean


def draw_samples(pictures: list[tuple[str, Images]], path: Path) -> None:
    """Saves a figure with one row of images per name. Small images are enlarged by an integer factor."""
    scale = max(1, SMALL_SIDE // pictures[0][1].shape[1])
    side, font = scale * pictures[0][1].shape[1], ImageFont.load_default(12)
    margin, step = 12 + int(max(font.getlength(name) for name, _ in pictures)), side + 2
    canvas = Image.new("RGB", (margin + NUM_PICTURED * step, len(pictures) * step), "white")
    pen = ImageDraw.Draw(canvas)
    for number, (name, images) in enumerate(pictures):
        pen.text((6, number * step + side // 2), name, "black", font, anchor="lm")
        for column, image in enumerate(images):
            enlarged = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (margin + column * step, number * step))
    canvas.save(path)
