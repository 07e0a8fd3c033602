"""What a person, or a program, reads while a run goes on."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from tqdm import tqdm

PAUSE = 10.0  # seconds between two lines that stand for the bar, at least


class Terminal:
    """Where a run prints: lines on standard output and a progress bar on standard error; or, for programs, JSON.

    With `log` json, standard output has one JSON object a line and nothing else, and there is no bar. Where standard error is a
    file, the bar becomes a line now and then.

    Args:
        log: bar or json.
        shown: Whether this process prints at all; errors are not its business.
    """

    def __init__(self, log: Literal["bar", "json"], shown: bool) -> None:
        self._json, self._shown = log == "json", shown
        self._drawn = shown and not self._json and sys.stderr.isatty()
        self._bar = self._new_bar("", 0, 0)
        self._last = -PAUSE

    def _new_bar(self, name: str, total: int, initial: int) -> "tqdm[Any]":
        return tqdm(
            total=total,
            initial=initial,
            unit=" images",
            unit_scale=True,
            desc=name,
            disable=not self._drawn,
            bar_format="{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
            dynamic_ncols=True,
        )

    @contextlib.contextmanager
    def progress(self, name: str, total: int, initial: int) -> Iterator[None]:
        """Within it the bar is drawn: of so many images in all, of which `initial` were seen before."""
        self._name, self._total, self._seen = name, total, initial
        self._bar = self._new_bar(name, total, initial)
        try:
            yield
        finally:
            self._bar.close()

    def advance(self, images: int) -> None:
        """So many images more."""
        self._seen += images
        self._bar.update(images)

    def status(self, text: str, speed: float = 0.0) -> None:
        """Shows `text` beside the bar. In its place, `speed` in images per second tells what time is left."""
        if self._drawn:
            self._bar.set_postfix_str(text)
        elif not self._json and self._shown and time.monotonic() - self._last > PAUSE:
            self._last = time.monotonic()
            left = f", {tqdm.format_interval((self._total - self._seen) / speed)} left" if speed else ""
            tqdm.write(f"{self._name} {self._seen:,} of {self._total:,} images, {text}{left}", file=sys.stderr)

    def say(self, text: str) -> None:
        """Prints a line above the bar; as JSON, {"note": text}."""
        self.record({"note": text}, text)

    def record(self, values: Mapping[str, Any], text: str = "") -> None:
        """Prints `values` as JSON, or `text`, if there is any, as a line above the bar."""
        if not self._shown:
            return
        if self._json:
            print(json.dumps(values), flush=True)
        elif text:
            tqdm.write(text)
            sys.stdout.flush()
