"""Writes all results to `results.json` and `RESULTS.md` after every new result."""

import json
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from processes import Entry, write_atomically

STAGES = ("environment", "correctness", "speed", "quality")
BASE = "step, stl10, 256 images"

# Columns of the speed table: value: (title, format). All values are in results.json.
COLUMNS = {
    "images_per_second": ("images/s", "{:,.0f}"),
    "mfu": ("MFU", "{:.3f}"),
    "peak_gpu_memory_gib": ("memory (GiB)", "{:.1f}"),
    "layout_kernels_per_step": ("layout kernels per step", "{:.1f}"),
}
# Title, measurement, value, comparison, and bound.
TARGETS = [
    ("trainer / bare step", "trainer, stl10, 256 images", "train_over_step", ">=", 0.98),
    ("MFU, stl10", BASE, "mfu", ">=", 0.40),
    ("MFU, stl10_large", "step, stl10_large, 256 images", "mfu", ">=", 0.45),
    ("images/s, stl10", BASE, "images_per_second", ">=", 5000),
    ("over diffusers' AutoencoderKL loop", "loops of others, kl, 64 images", "over_diffusers", ">=", 2.0),
    ("over the same network in a compiled plain loop", "loops of others, stl10, 256 images", "over_torch", ">=", 1.3),
    ("samples/s, 12 steps", "sampling", "images_per_second", ">=", 2000),
    ("host synchronizations between log lines", "no host synchronization between log lines", "synchronizations", "<=", 0),
    ("evaluation, share of a run", "evaluation", "share_1_gpu", "<=", 0.02),
]


class Results:
    """All results so far.

    Args:
        out: Folder of the files.
        command: Command line, for the report.
        notes: Options of the run.
    """

    def __init__(self, out: Path, command: str, notes: dict[str, Any]) -> None:
        self.out, self.about = out, {"date": time.strftime("%Y-%m-%d %H:%M"), "command": command, **notes}
        self.entries: dict[str, list[Entry]] = {stage: [] for stage in STAGES}
        self._lock, self._begin = threading.Lock(), time.monotonic()
        self.write()

    def add(self, stage: str, entry: Entry) -> None:
        """Adds a result, rewrites the files and prints one line. Thread-safe."""
        with self._lock:
            self.entries[stage].append(entry)
            self.write()
        elapsed = time.monotonic() - self._begin
        detail = f": {entry.detail}" if entry.detail else ""
        print(f"{elapsed:5.0f} s  {stage}  {entry.name}: {entry.status}{detail}", flush=True)

    @property
    def has_failures(self) -> bool:
        """Whether anything failed."""
        return any(entry.status == "failed" for entries in self.entries.values() for entry in entries)

    def write(self) -> None:
        """Rewrites both files."""
        self.about["seconds"] = round(time.monotonic() - self._begin, 1)
        stages = {stage: [asdict(entry) for entry in entries] for stage, entries in self.entries.items()}
        write_atomically(self.out / "results.json", json.dumps({"run": self.about, **stages}, indent=1) + "\n")
        write_atomically(self.out / "RESULTS.md", self._markdown())

    def value(self, name: str, key: str) -> float | None:
        """Returns a value of the entry `name`, or None."""
        values = [entry.values.get(key) for entries in self.entries.values() for entry in entries if entry.name == name]
        return values[0] if values and isinstance(values[0], (int, float)) else None

    def _markdown(self) -> str:
        environment = [f"- {entry.name}: {entry.detail or entry.status}" for entry in self.entries["environment"]]
        about = [f"- {name}: {f'`{value}`' if name == 'command' else value}" for name, value in self.about.items()]
        checks = [[entry.name, entry.status, entry.detail, f"{entry.seconds:.0f}"] for entry in self.entries["correctness"]]
        quality = [[entry.name, entry.status, entry.detail, f"{entry.seconds:.0f}"] for entry in self.entries["quality"]]
        heads = ["", "status", "detail", "s"]
        tables = [
            ("Targets", ["", "measured", "target", "reached"], [] if self.about["rehearsal"] else self._targets()),
            ("Correctness", heads, checks),
            ("Speed", ["", *(head for head, _ in COLUMNS.values()), "detail"], self._speed()),
            ("Speed: each choice on and off", ["", "images/s on", "images/s off", "on / off"], self._choices()),
            ("Quality", heads, quality),
        ]
        parts = ["# Results", "\n".join(about + environment)]
        for title, columns, rows in tables:
            parts += [f"## {title}", table(columns, rows)] if rows else []
        for stage, entries in self.entries.items():
            for entry in entries:
                if entry.output:
                    parts.append(f"### Failed: {stage}, {entry.name}\n\n```\n" + "\n".join(entry.output) + "\n```")
        return "\n\n".join(parts) + "\n"

    def _speed(self) -> list[list[str]]:
        rows = []
        for entry in self.entries["speed"]:
            cells = [form.format(entry.values[key]) if key in entry.values else "" for key, (_, form) in COLUMNS.items()]
            status = [] if entry.status == "measured" else [entry.status]
            rows.append([entry.name, *cells, ": ".join([*status, *filter(None, [entry.detail])])])
        return rows

    def _choices(self) -> list[list[str]]:
        """Returns rows of pairs of measurements that differ in one choice."""
        rows = []
        for entry in self.entries["speed"]:
            choice, on = entry.values.get("choice"), entry.values.get("images_per_second")
            off = self.value(entry.values.get("compared_with", ""), "images_per_second")
            if choice and on and off:
                speeds = (on, off) if entry.values["is_on"] else (off, on)
                rows.append([choice, *(f"{speed:,.0f}" for speed in speeds), f"{speeds[0] / speeds[1]:.3f}"])
        return rows

    def _targets(self) -> list[list[str]]:
        rows = []
        for title, name, key, sign, bound in TARGETS:
            value = self.value(name, key)
            if value is not None:
                reached = value >= bound if sign == ">=" else value <= bound
                rows.append([title, f"{value:,.4g}", f"{sign} {bound:,g}", "yes" if reached else "no"])
        return rows


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines)
