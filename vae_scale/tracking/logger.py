"""The interface of the experiment loggers."""

from collections.abc import Mapping
from pathlib import Path

Metrics = Mapping[str, float | list[float]]


class Logger:
    """Base class of the experiment loggers. Its methods do nothing.

    Attributes:
        run_id: Identifier with which a resumed run continues the same curves, or None.
    """

    run_id: str | None = None

    def log_metrics(self, images_seen: int, metrics: Metrics) -> None:
        """Logs scalars, and lists as histograms."""

    def log_image(self, images_seen: int, name: str, path: Path) -> None:
        """Logs a PNG file."""

    def log_event(self, images_seen: int, kind: str, text: str) -> None:
        """Logs an event. Thread-safe."""

    def log_checkpoint(self, folder: Path) -> None:
        """Logs a checkpoint. Thread-safe."""

    def close(self, failed: bool = False) -> None:
        """Flushes and closes the logger."""
