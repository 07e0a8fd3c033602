"""Records the metrics, events and images of a run in its folder, on the terminal and with an experiment logger."""

import errno
import json
import math
import os
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from vae_scale.config.options import Config
from vae_scale.errors import one_line
from vae_scale.files import atomic_write
from vae_scale.tracking.logger import Logger, Metrics
from vae_scale.tracking.terminal import Terminal

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"


class Tracker:
    """Records the metrics, events and images of a run. Created on rank 0 only.

    Args:
        config: Configuration of the run.
        images_seen: Start of this segment; later lines of `metrics.jsonl`, written before the run was resumed, are removed.
        run_id: Identifier of the logger's run to resume; None for a new one.
        metadata: Values for the logger to record beside the configuration.
        terminal: Prints metrics and events.

    Attributes:
        logger: The experiment logger.
    """

    def __init__(
        self, config: Config, images_seen: int, run_id: str | None, metadata: dict[str, Any], terminal: Terminal
    ) -> None:
        self._metrics = JsonlWriter(config.run_dir / METRICS, max_images=images_seen)
        self._events = JsonlWriter(config.run_dir / EVENTS)
        self._samples_dir, self._terminal = config.run_dir / "samples", terminal
        self.logger = _create_logger(config, images_seen, run_id, metadata)

    def log_metrics(self, images_seen: int, metrics: Metrics) -> None:
        """Records scalars and lists, named by group: train/, eval/, perf/, data/. Loggers show a list as a histogram."""
        record = {"images": images_seen, **metrics}
        self._metrics.write(record)
        self._terminal.print_record(record)
        self.logger.log_metrics(images_seen, metrics)

    def log_event(self, images_seen: int, kind: str, text: str) -> None:
        """Records an event. Thread-safe.

        Args:
            images_seen: Images seen at the time of the event.
            kind: started, resumed, skipped_steps, straggler, replaced_images, checkpoint_failed, stopped, failed or finished.
            text: One line.
        """
        record = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "images": images_seen, "event": kind, "text": text}
        self._events.write(record)
        # The error of a failed run is printed on standard error by the process that raised it.
        self._terminal.print_record(record, "" if kind == "failed" else f"{images_seen:,} images: {text}")
        self.logger.log_event(images_seen, kind, text)

    def log_images(self, images_seen: int, images: Mapping[str, Image.Image]) -> None:
        """Writes images, by name, as `samples/NAME_000012345.png`."""
        for name, image in images.items():
            path = self._samples_dir / f"{name}_{images_seen:09d}.png"
            try:
                path.parent.mkdir(exist_ok=True)
                image.save(path)
            except OSError as error:
                text = f"{path}: cannot be written ({one_line(error)}); training continues"
                self.log_event(images_seen, "checkpoint_failed", text)
            else:
                self.logger.log_image(images_seen, f"samples/{name}", path)


def _create_logger(config: Config, images_seen: int, run_id: str | None, metadata: dict[str, Any]) -> Logger:
    if config.track.tracker == "wandb":
        from vae_scale.tracking.wandb import WandbLogger

        return WandbLogger(config, run_id, metadata)
    if config.track.tracker == "tensorboard":
        from vae_scale.tracking.tensorboard import TensorBoardLogger

        return TensorBoardLogger(config, images_seen)
    return Logger()


class JsonlWriter:
    """Appends records to a JSON Lines file. Records that cannot be written (disk full) are written with the next one.

    Args:
        path: The file. Lines that are not valid records are removed, such as one truncated when the run was killed.
        max_images: Records of more images are removed.
    """

    def __init__(self, path: Path, max_images: float = math.inf) -> None:
        self._path = path
        self._pending: list[str] = []
        self._lock = threading.Lock()
        lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
        atomic_write(path, "".join(f"{line}\n" for line in lines if _images_of(line) <= max_images))

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record. Thread-safe."""
        with self._lock:
            is_retry = bool(self._pending)
            self._pending.append(f"{json.dumps(record)}\n")
            content = "".join(self._pending).encode()
            try:
                with self._path.open("ab", buffering=0) as file:
                    end = file.tell()
                    if file.write(content) < len(content):
                        file.truncate(end)
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                if not is_retry:
                    tqdm.write(f"warning: {self._path}: {error.strerror}; lines are written later", sys.stderr)
            else:
                self._pending.clear()


def _images_of(line: str) -> float:
    """Returns the images seen of a record; NaN if the line is not a valid record."""
    try:
        return float(json.loads(line)["images"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.nan
