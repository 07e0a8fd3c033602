"""The terminal output of a training run."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from tqdm import tqdm

STATUS_INTERVAL = 10.0  # minimum seconds between two status lines


class Terminal:
    """Prints the progress of a run.

    With `log="bar"`, messages go to standard output and a progress bar to standard error; if standard error is not a
    terminal, occasional status lines replace the bar. With `log="json"`, standard output has one JSON object per line,
    and there is no bar.

    Args:
        log: "bar" or "json".
        enabled: Whether to print at all.
    """

    def __init__(self, log: Literal["bar", "json"], enabled: bool) -> None:
        self._json, self._enabled = log == "json", enabled
        self._has_bar = enabled and not self._json and sys.stderr.isatty()
        self._bar: tqdm[Any] = tqdm(disable=True)
        self._last_status = -STATUS_INTERVAL

    @contextlib.contextmanager
    def progress_bar(self, name: str, total: int, initial: int) -> Iterator[None]:
        """Shows a progress bar of `total` images, of which `initial` are done."""
        self._name, self._total, self._images_seen = name, total, initial
        self._bar = tqdm(
            total=total,
            initial=initial,
            unit_scale=True,
            desc=name,
            disable=not self._has_bar,
            bar_format="{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
            dynamic_ncols=True,
        )
        with self._bar:
            yield

    def update(self, images: int) -> None:
        """Advances the progress bar."""
        self._images_seen += images
        self._bar.update(images)

    def set_status(self, text: str, images_per_second: float = 0.0) -> None:
        """Shows `text` beside the bar, or in a status line, with the remaining time if `images_per_second` is given."""
        if self._has_bar:
            self._bar.set_postfix_str(text)
        elif not self._json and self._enabled and time.monotonic() - self._last_status > STATUS_INTERVAL:
            self._last_status = time.monotonic()
            if images_per_second:
                text += f", {tqdm.format_interval((self._total - self._images_seen) / images_per_second)} left"
            tqdm.write(f"{self._name} {self._images_seen:,} of {self._total:,} images, {text}", file=sys.stderr)

    def print_message(self, text: str) -> None:
        """Prints a line above the bar; as JSON, {"message": text}."""
        self.print_record({"message": text}, text)

    def print_record(self, record: Mapping[str, Any], text: str = "") -> None:
        """Prints `record` as JSON, or `text`, if not empty, above the bar."""
        if not self._enabled:
            return
        if self._json:
            print(json.dumps(record), flush=True)
        elif text:
            tqdm.write(text)
            sys.stdout.flush()
