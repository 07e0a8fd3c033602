"""Alternating measurements, the limits of the device, and reports."""

import dataclasses
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vae_scale import __version__
from vae_scale.files import write_json

CEILING_SECONDS = 0.3  # duration of a run
SIZES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384)}  # of square matrices
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
MATRIX, COPY = "matrix product", "memory copy"


@dataclass
class Row:
    """The measurements of a task.

    Attributes:
        name: Name of the task.
        runs: Speed of each run, in images per second; the units of limits are those of `ceilings`.
    """

    name: str
    runs: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median speed."""
        return statistics.median(self.runs)


def alternate(tasks: Mapping[str, Callable[[], float]], repeats: int, description: str) -> dict[str, Row]:
    """Runs all tasks in alternation, so that other load on the machine affects them equally.

    Args:
        tasks: Functions by name. Each returns a speed.
        repeats: Number of runs of each task, after a warm-up run.
        description: Text of the progress bar.
    """
    rows = {name: Row(name) for name in tasks}
    with tqdm(total=len(tasks) * (repeats + 1), unit=" runs", desc=description, disable=not tasks) as bar:
        for repeat in range(repeats + 1):
            for name, task in tasks.items():
                bar.set_postfix_str(name)
                speed = task()
                if repeat:
                    rows[name].runs.append(speed)
                bar.update()
    return rows


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], float]]:
    """Returns tasks that measure the limits of the device.

    Returns:
        The fastest of several matrix products of `dtype`, in FLOP per second, and a copy within memory, in bytes read and
        written per second.
    """
    squares = [torch.randn(side, side, device=device, dtype=dtype) for side in SIZES[device.type]]
    results = [torch.empty_like(square) for square in squares]
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def matrix_product() -> float:
        return max(
            2 * len(square) ** 3 / fastest(partial(torch.mm, square, square, out=result), device)
            for square, result in zip(squares, results, strict=True)
        )

    def memory_copy() -> float:
        return 2 * len(source) / fastest(partial(target.copy_, source), device)

    return {MATRIX: matrix_product, COPY: memory_copy}


def fastest(work: Callable[[], object], device: torch.device) -> float:
    """Returns the shortest duration of `work` on `device`, over repeated calls during `CEILING_SECONDS`."""
    best, spent = math.inf, 0.0
    while spent < CEILING_SECONDS:
        synchronize(device)
        begin = time.perf_counter()
        work()
        synchronize(device)
        seconds = time.perf_counter() - begin
        best, spent = min(best, seconds), spent + seconds
    return best


def synchronize(device: torch.device) -> None:
    """Waits for all work queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine() -> dict[str, str]:
    """Returns the date, the hardware and the versions."""
    info = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vae_scale": __version__,
    }
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    return info


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(rows: list[Row]) -> str:
    """Formats medians and ranges as a Markdown table."""
    lines = [[row.name, f"{row.median:,.0f}", f"{min(row.runs):,.0f} to {max(row.runs):,.0f}"] for row in rows]
    return markdown([["", "images/s", "lowest to highest"], *lines])


def markdown(lines: list[list[str]]) -> str:
    """Formats rows of cells as a Markdown table. The first row is the heading."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]

    def padded(cells: list[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = "| " + " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]) + " |"
    return "\n".join([padded(lines[0]), rule, *(padded(line) for line in lines[1:])])


def write_report(path: Path | None, report: Any) -> None:
    """Writes a dataclass and a description of the machine as JSON, unless `path` is None."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"machine": machine(), **dataclasses.asdict(report)})
