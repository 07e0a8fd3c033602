"""Medians of alternated runs, and where they were measured."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vae_scale import __version__


@dataclass
class Row:
    """One line of a table.

    Attributes:
        name: What was measured.
        runs: Images per second of each run.
    """

    name: str
    runs: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Images per second."""
        return statistics.median(self.runs)


def alternate(tasks: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, Row]:
    """Runs all tasks one after the other, `repeats` times, so that a busy machine slows all of them alike.

    Args:
        tasks: By name; each returns images per second.
        repeats: Runs of each, after one that does not count.
    """
    rows = {name: Row(name) for name in tasks}
    with tqdm(total=len(tasks) * (repeats + 1), unit=" runs", desc="measuring") as bar:
        for repeat in range(repeats + 1):
            for name, task in tasks.items():
                bar.set_postfix_str(name)
                speed = task()
                if repeat:
                    rows[name].runs.append(speed)
                bar.update()
    return rows


def machine() -> dict[str, str]:
    """What a figure depends on: hardware, versions and the day."""
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vae_scale": __version__,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table: medians, and the range of the runs."""
    lines = [[row.name, f"{row.median:,.0f}", f"{min(row.runs):,.0f} to {max(row.runs):,.0f}"] for row in rows]
    return markdown([["", "images/s", "lowest to highest"], *lines])


def markdown(lines: list[list[str]]) -> str:
    """Lines of cells, the first of which is the heading, as a table: the first column to the left, others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]

    def padded(cells: list[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = "| " + " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]) + " |"
    return "\n".join([padded(lines[0]), rule, *(padded(line) for line in lines[1:])])


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Writes a report, for programs to read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
