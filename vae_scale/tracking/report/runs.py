"""Reads the folders of runs for a report. A run may still be in progress."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from vae_scale.errors import UserError, one_line

IMAGE_KINDS = ("samples", "reconstructions")
MAX_IMAGES = 60  # embedded per kind
T = TypeVar("T")


@dataclass
class Run:
    """The content of a run's folder."""

    name: str  # of the folder; its path if several runs have the same name
    config: dict[str, str]  # resolved options by dotted name
    events: list[dict[str, Any]]
    images: dict[str, list[tuple[int, bytes]]]  # (images seen, PNG) by kind
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # (images seen, finite value) by metric
    lists: dict[str, list[float]] = field(default_factory=dict)  # newest value of the metrics that are lists

    @property
    def images_seen(self) -> int:
        """Progress according to the metrics."""
        return max((curve[-1][0] for curve in self.curves.values()), default=0)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads runs.

    Raises:
        UserError: a folder is given twice, is not the folder of a run, or holds a damaged file.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"{', '.join(map(str, folders))}: give each run only once")
    names = [folder.resolve().name for folder in folders]
    counts = Counter(names)
    runs = []
    for folder, name in zip(folders, names, strict=True):
        try:
            runs.append(_read_run(folder, name if counts[name] == 1 else str(folder)))
        except FileNotFoundError as error:
            raise UserError(f"{folder}: not the folder of a run, as it holds no {Path(error.filename).name}") from None
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError, yaml.YAMLError) as error:
            raise UserError(f"{folder}: a file is damaged ({one_line(error):.200})") from None
    return runs


def _read_run(folder: Path, name: str) -> Run:
    records, events = _read_records(folder / "metrics.jsonl"), _read_records(folder / "events.jsonl")
    config = dict(_flatten(yaml.safe_load((folder / "config.yaml").read_text("utf-8"))))
    run = Run(name, config, events, {kind: _read_images(folder, kind) for kind in IMAGE_KINDS})
    for record in records:
        images_seen = record.pop("images")
        for metric, value in record.items():
            if isinstance(value, list):
                run.lists[metric] = value
            elif math.isfinite(value):
                run.curves.setdefault(metric, []).append((images_seen, value))
    return run


def _read_records(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a JSON Lines file, without lines that are truncated because the run was killed."""
    records = []
    for line in path.read_text("utf-8", "replace").splitlines():
        try:
            records.append(dict(json.loads(line)))
        except ValueError:
            continue
    return records


def _flatten(options: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _read_images(folder: Path, kind: str) -> list[tuple[int, bytes]]:
    paths = sorted((folder / "samples").glob(f"{kind}_*.png"), key=lambda path: (len(path.name), path.name))
    return [(int(path.stem.rpartition("_")[2]), path.read_bytes()) for path in evenly_spaced(paths, MAX_IMAGES)]


def evenly_spaced(items: Sequence[T], max_items: int) -> list[T]:
    """Returns at most `max_items` items, evenly spaced, with the first and the last."""
    if len(items) <= max_items:
        return list(items)
    return [items[round(index * (len(items) - 1) / (max_items - 1))] for index in range(max_items)]
