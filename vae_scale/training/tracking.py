"""What is told about a run: always in its folder and on the terminal, and to a service where that is wanted."""

import errno
import json
import math
import os
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vae_scale.config import Config
from vae_scale.training.services import Values, service
from vae_scale.training.terminal import Terminal

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"


class Tracker:
    """What rank 0 writes down, counted in images seen.

    Args:
        config: The run's configuration.
        images_seen: Where the run begins; what `metrics.jsonl` holds beyond it is dropped, for it will come again.
        run_id: What the service called the run before, if it goes on.
        about: Facts for the service to record beside the configuration.
        terminal: Where it is printed, too.
    """

    def __init__(self, config: Config, images_seen: int, run_id: str | None, about: dict[str, Any], terminal: Terminal) -> None:
        self._metrics = _Lines(config.folder / METRICS, images_seen)
        self._events = _Lines(config.folder / EVENTS)
        self._terminal = terminal
        self._service = service(config, images_seen, run_id, about)

    @property
    def run_id(self) -> str | None:
        """What the service calls the run."""
        return self._service.run_id if self._service else None

    def log(self, images_seen: int, values: Values) -> None:
        """Writes scalars, and lists of which the distribution counts. Their names are grouped: train/, eval/, speed/, data/."""
        line = {"images": images_seen, **values}
        self._metrics.append(json.dumps(line))
        self._terminal.record(line)
        if self._service:
            self._service.log(images_seen, values)

    def event(self, images_seen: int, kind: str, text: str) -> None:
        """Writes down that something happened to the run. Any thread may call it.

        Args:
            images_seen: When.
            kind: started, resumed, left_out, straggler, missing_images, not_saved, stopped, failed or finished.
            text: In one line.
        """
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "images": images_seen, "event": kind, "text": text}
        self._events.append(json.dumps(line))
        # What ends a run is said on standard error, whoever finds it.
        self._terminal.record(line, "" if kind == "failed" else f"{images_seen:,} images: {text}")
        if self._service:
            self._service.event(images_seen, kind, text)

    def picture(self, images_seen: int, name: str, path: Path) -> None:
        """Hands on a picture that lies in the run's folder."""
        if self._service:
            self._service.picture(images_seen, name, path)

    def checkpoint(self, folder: Path) -> None:
        """Hands on a checkpoint that was written. Any thread may call it."""
        if self._service:
            self._service.checkpoint(folder)

    def close(self, failed: bool = False) -> None:
        """Sends what is left to the service."""
        if self._service:
            self._service.close(failed)


class _Lines:
    """The lines of a file, of which each is written whole. Those that find the disk full, or gone, are written later.

    Args:
        path: The file. What is no JSON object is taken out of it: a line that was being written when a run was stopped.
        up_to: Images; so are lines that tell of more.
    """

    def __init__(self, path: Path, up_to: float = math.inf) -> None:
        self._path = path
        self._waiting: list[str] = []
        self._told = False
        self._one = threading.Lock()
        kept = []
        if path.exists():
            for line in path.read_text("utf-8", "replace").splitlines():
                try:
                    if json.loads(line)["images"] <= up_to:
                        kept.append(line)
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(path)

    def append(self, line: str) -> None:
        """Adds a line. Any thread may call it."""
        with self._one:
            self._waiting.append(line)
            self._write("".join(f"{line}\n" for line in self._waiting).encode())

    def _write(self, content: bytes) -> None:
        try:
            with self._path.open("ab", buffering=0) as file:
                end = file.tell()
                if file.write(content) < len(content):
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._told:
                tqdm.write(f"warning: {self._path}: {error.strerror}; its lines are kept until they can be written", sys.stderr)
            self._told = True
            return
        self._waiting, self._told = [], False
