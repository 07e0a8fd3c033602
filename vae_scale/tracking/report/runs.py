"""Reads the folders of runs for a report. A run may still be in progress."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from PIL import Image

from vae_scale.errors import UserError, one_line

IMAGE_KINDS = ("samples", "reconstructions", "interpolations")
MAX_IMAGES = 60  # embedded per kind, and evaluations in the chart of the KL per channel
T = TypeVar("T")


@dataclass
class Run:
    """The content of a run's folder."""

    folder: Path
    name: str  # of the folder; its path if several runs have the same name
    config: dict[str, str] = field(default_factory=dict)  # resolved options by dotted name
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # (images seen, finite value) by metric
    kl_per_channel: list[tuple[int, list[float]]] = field(default_factory=list)  # (images seen, nats)
    images: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)  # (images seen, PNG) by kind
    events: list[dict[str, Any]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)  # state.json of the newest checkpoint
    warnings: list[str] = field(default_factory=list)  # what is missing from the report, and why

    @property
    def images_seen(self) -> int:
        """Progress according to the metrics."""
        return max((curve[-1][0] for curve in self.curves.values()), default=0)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads runs. Files that cannot be read are listed in their `warnings`.

    Raises:
        UserError: a folder is given twice, or is not the folder of a run.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"{', '.join(map(str, folders))}: give each run only once")
    counts = Counter(folder.resolve().name for folder in folders)
    runs = []
    for folder in folders:
        if not (folder / "metrics.jsonl").is_file():
            raise UserError(f"{folder}: not the folder of a run, as it holds no metrics.jsonl")
        name = folder.resolve().name
        run = Run(folder, name if counts[name] == 1 else str(folder))
        _read_metrics(run)
        with _warn_on_error(run, "events.jsonl"):
            run.events = _read_records(folder / "events.jsonl")
        with _warn_on_error(run, "config.yaml"):
            run.config = dict(_flatten(yaml.safe_load((folder / "config.yaml").read_text("utf-8"))))
        for checkpoint in _sort_by_images((folder / "checkpoints").glob("images_*"))[-1:]:
            with _warn_on_error(run, f"checkpoints/{checkpoint.name}/state.json"):
                run.state = dict(json.loads((checkpoint / "state.json").read_text("utf-8")))
        for kind in IMAGE_KINDS:
            _read_images(run, kind)
        runs.append(run)
    return runs


@contextmanager
def _warn_on_error(run: Run, name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        run.warnings.append(f"{name}: missing")
    except (OSError, ValueError, TypeError, AttributeError, SyntaxError, yaml.YAMLError) as error:
        run.warnings.append(f"{name}: {one_line(error):.200}")


def _read_records(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a JSON Lines file, without lines that are truncated because the run was killed."""
    records = []
    for line in path.read_text("utf-8", "replace").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in records if isinstance(record, dict) and "images" in record]


def _read_metrics(run: Run) -> None:
    non_finite: Counter[str] = Counter()
    for record in _read_records(run.folder / "metrics.jsonl"):
        images = record.pop("images")
        for metric, value in record.items():
            if isinstance(value, list):
                run.kl_per_channel.append((images, value))
            elif math.isfinite(value):
                run.curves.setdefault(metric, []).append((images, value))
            else:
                non_finite[metric] += 1
    run.kl_per_channel = evenly_spaced(run.kl_per_channel, MAX_IMAGES)
    run.warnings += [f"metrics.jsonl: {count:,} values of {metric} are not finite" for metric, count in non_finite.items()]


def _flatten(options: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _read_images(run: Run, kind: str) -> None:
    run.images[kind] = []
    for path in evenly_spaced(_sort_by_images((run.folder / "samples").glob(f"{kind}_*.png")), MAX_IMAGES):
        with _warn_on_error(run, f"samples/{path.name}"):
            images_seen, content = int(path.stem.rpartition("_")[2]), path.read_bytes()
            Image.open(BytesIO(content)).verify()
            run.images[kind].append((images_seen, content))


def _sort_by_images(paths: Iterable[Path]) -> list[Path]:
    """Returns paths that end in zero-padded numbers of images, in order."""
    return sorted(paths, key=lambda path: (len(path.name), path.name))


def evenly_spaced(items: Sequence[T], max_items: int) -> list[T]:
    """Returns at most `max_items` items, evenly spaced, with the first and the last."""
    indices = np.linspace(0, len(items) - 1, min(len(items), max_items)).round().astype(int)
    return [items[index] for index in indices]
