"""Alternating measurements, the speed of matrix products, and reports."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vae_scale.files import write_json
from vae_scale.runtime.versions import get_versions

PRODUCTS = 20  # of matrices, of which the fastest counts
SIDES = {"cpu": 2048, "cuda": 8192}  # of square matrices

Speeds = dict[str, list[float]]


@dataclass
class Report:
    """Results of a benchmark.

    Attributes:
        details: What was measured, and results that are not speeds.
        speeds: Images per second of each run, by task.
        ratios: Ratios of median speeds, and fractions.
    """

    details: dict[str, str | float]
    speeds: Speeds
    ratios: dict[str, float]


def alternate(tasks: Mapping[str, Callable[[], float]], repeats: int) -> Speeds:
    """Runs all tasks in alternation, so that other load on the machine affects them equally.

    Args:
        tasks: Functions by name. Each returns images per second.
        repeats: Number of runs of each task, after a warm-up run.
    """
    speeds: Speeds = {name: [] for name in tasks}
    with tqdm(total=len(tasks) * (repeats + 1), unit=" runs", desc="measuring") as bar:
        for repeat in range(repeats + 1):
            for name, task in tasks.items():
                bar.set_postfix_str(name)
                speed = task()
                if repeat:
                    speeds[name].append(speed)
                bar.update()
    return speeds


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOP per second of the fastest of several products of large square matrices of `dtype`."""
    side = SIDES[device.type]
    square = torch.randn(side, side, device=device, dtype=dtype)
    product = torch.empty_like(square)
    return 2 * side**3 / min(time_call(lambda: torch.mm(square, square, out=product), device) for _ in range(PRODUCTS))


def time_call(work: Callable[[], object], device: torch.device) -> float:
    """Returns the duration of a call in seconds, including the work that it queues on a GPU."""
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin


def synchronize(device: torch.device) -> None:
    """Waits for all work queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine() -> dict[str, str]:
    """Returns the date, the hardware and the versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"date": time.strftime("%Y-%m-%d"), "cpu": cpu, "cores": str(os.cpu_count())} | gpu | get_versions()


def print_report(report: Report, path: Path | None, **more: Any) -> None:
    """Prints a report and, unless `path` is None, writes it as JSON with the values in `more`."""
    host = machine()
    print(", ".join(f"{name} {value}" for name, value in host.items()), end="\n\n")
    lines = [["", "images/s", "lowest to highest"]]
    for name, runs in report.speeds.items():
        lines.append([name, f"{statistics.median(runs):,.0f}", f"{min(runs):,.0f} to {max(runs):,.0f}"])
    print(markdown(lines), end="\n\n")
    values = [["", ""]]
    for name, value in (report.details | report.ratios).items():
        values.append([name, f"{value:,.4g}" if isinstance(value, float) else str(value)])
    print(markdown(values))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"machine": host, **report.details, "speeds": report.speeds, "ratios": report.ratios, **more})


def markdown(lines: list[list[str]]) -> str:
    """Formats rows of cells as a Markdown table. The first row is the heading."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]

    def padded(cells: list[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = "| " + " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]) + " |"
    return "\n".join([padded(lines[0]), rule, *(padded(line) for line in lines[1:])])
