"""Measures how long this rank computes, without the time it waits for other ranks, and detects stragglers."""

import contextlib
import statistics
import time
from collections.abc import Iterator

import torch

STRAGGLER_FACTOR = 1.5  # a rank that takes longer than this multiple of the median is a straggler


class StepTimer:
    """Accumulates the time of the recorded blocks, on a GPU with CUDA events and without synchronization."""

    def __init__(self, device: torch.device) -> None:
        self._uses_cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0
        self._previous: list[int | None] = [None, None]

    @contextlib.contextmanager
    def record(self, enabled: bool = True) -> Iterator[None]:
        """Times the block if `enabled`."""
        if not enabled:
            yield
        elif self._uses_cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            start_time = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start_time

    def pop_seconds(self) -> float:
        """Returns the seconds accumulated since the last call. On a GPU, all recorded work must have finished."""
        seconds = self._seconds + sum(start.elapsed_time(end) / 1000 for start, end in self._events)
        self._seconds = 0.0
        self._events.clear()
        return seconds

    def detect_straggler(self, seconds: list[float]) -> str | None:
        """Returns a message, once, if a rank is the straggler in two consecutive calls. `seconds` has one entry per rank."""
        slowest, median = max(seconds), statistics.median_low(seconds)
        rank = seconds.index(slowest) if slowest > STRAGGLER_FACTOR * median else None
        second_last, last = self._previous
        self._previous = [last, rank]
        if rank is None or rank != last or rank == second_last:
            return None
        return f"rank {rank} takes {slowest / median:.1f} times the median step time"
