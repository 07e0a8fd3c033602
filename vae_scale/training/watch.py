"""Processes that wait for each other: which one is slow, and which one the others wait for in vain."""

import contextlib
import itertools
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from datetime import timedelta

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

HEARTBEATS, LONGEST = 20, 10.0  # within the timeout, and seconds between two of them at most
GRACE = 2  # heartbeats in which a process that is not stopped gives one
SLOW = 1.5  # times the median


@dataclass(frozen=True)
class Heartbeat:
    """What a process tells the others.

    Attributes:
        number: Counts heartbeats.
        marks: Counts the marks that it has passed. All processes pass the same ones, so who passed fewest is behind.
        place: Where it is.
        process: Its name on its machine.
        compiled: Counts heartbeats in which it was compiling, each of which counts as progress.
    """

    number: int
    marks: int
    place: str
    process: str
    compiled: int = 0

    def is_ahead_of(self, before: "Heartbeat") -> bool:
        """Whether the process made progress since."""
        return self.marks > before.marks or self.compiled > before.compiled


class Watch(contextlib.AbstractContextManager["Watch"]):
    """Ends this process once it got no further for a while, and names the process that it waits for.

    A process that is stopped, or whose machine is gone, cannot speak for itself, and those that wait for it are deep in the
    exchange of gradients. So in each of them a thread tells the others now and then, through the launcher's store, how far
    its process came, and looks whether it still gets further. Within `with`, and among several processes, that is.

    Args:
        rank: This process.
        ranks: All processes.
        timeout: Seconds from one mark to the next that are too long.
        tell: Told the reason before the process ends.
    """

    def __init__(self, rank: int, ranks: int, timeout: float, tell: Callable[[str], None] = lambda reason: None) -> None:
        self._rank, self._ranks, self._timeout, self._tell_why = rank, ranks, timeout, tell
        self._pause = min(timeout / HEARTBEATS, LONGEST)
        self._last = Heartbeat(0, 0, "the start", f"process {os.getpid()} on {socket.gethostname()}")
        self._compiling = False
        self._closed = threading.Event()
        self._telling: TCPStore | None = None
        self._asking: TCPStore | None = None

    def mark(self, place: str) -> None:
        """Tells that this process gets further: it is at `place` now."""
        self._last = replace(self._last, marks=self._last.marks + 1, place=place)

    def compiling(self, under_way: bool) -> None:
        """Told when torch.compile begins and ends, which may take longer than the timeout."""
        self._compiling = under_way

    def __enter__(self) -> "Watch":
        if self._ranks > 1:
            # Connections of its own, one for each: who waits for an answer holds the connection.
            self._telling, self._asking = self._connected(), self._connected()
            self._tell(0)
            threading.Thread(target=self._watch, name="watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def _connected(self) -> TCPStore:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        wait = timedelta(seconds=self._timeout)
        return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=wait)

    def _watch(self) -> None:
        # Heartbeats are counted instead of seconds, so that time in which this process itself was stopped does not count.
        idle, marks = 0, -1
        patience = round(self._timeout / self._pause)
        before: dict[int, Heartbeat] = {}
        for number in itertools.count(1):
            if self._closed.wait(self._pause):
                return
            if self._compiling:
                self._last = replace(self._last, compiled=self._last.compiled + 1)
            self._tell(number)
            idle = 0 if self._compiling or self._last.marks != marks else idle + 1
            marks = self._last.marks
            if idle == patience:
                before = self._ask()
            elif idle == patience + GRACE:
                now = self._ask()
                if any(now[rank].is_ahead_of(beat) for rank, beat in before.items() if rank in now):
                    idle = 0  # someone was only slow, or compiles
                else:
                    self._end(before, now)

    def _end(self, before: dict[int, Heartbeat], now: dict[int, Heartbeat]) -> None:
        alive = [rank for rank, beat in now.items() if rank in before and before[rank].number < beat.number]
        if self._rank > min(alive, default=self._rank):
            time.sleep(GRACE * self._pause)  # one says it for all
        else:
            found = verdict(before, now, self._ranks)
            reason = f"no process got any further for {self._timeout:g} s (train.timeout): {found}"
            again = "run the same command again to go on from the last checkpoint"
            print(f"\nerror: {reason}; {again}", file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):  # whatever it meets, the process ends
                self._tell_why(reason)
        os._exit(1)  # the main thread cannot be reached where it waits

    def _tell(self, number: int) -> None:
        if self._telling is None:
            return
        try:
            self._telling.set(f"watch/{self._rank}", json.dumps(astuple(replace(self._last, number=number))))
        except RuntimeError:  # the launcher is gone; training goes on without
            self._telling = None

    def _ask(self) -> dict[int, Heartbeat]:
        """The last heartbeat of each process; none where the store does not answer."""
        found: dict[int, Heartbeat] = {}
        store = self._asking
        if store is None or self._telling is None:
            return found

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                for rank in range(self._ranks):
                    if store.check([f"watch/{rank}"]):
                        found[rank] = Heartbeat(*json.loads(store.get(f"watch/{rank}")))

        # The store can be with a process that is stopped, or beyond a cut link, and would be waited for, whatever its timeout.
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(self._pause)
        return dict(found)


def verdict(before: dict[int, Heartbeat], now: dict[int, Heartbeat], ranks: int) -> str:
    """Whom the others wait for, from what each process told, twice."""
    if not now:
        return "the launcher's store does not answer, so nobody knows for whom"
    silent = [rank for rank in range(ranks) if rank not in now or rank not in before or now[rank] == before[rank]]
    if silent:
        return f"{_named(silent, now)} gave no sign of life"
    fewest = min(beat.marks for beat in now.values())
    behind = [rank for rank, beat in now.items() if beat.marks == fewest]
    if len(behind) == ranks:
        return f"all {ranks} processes are at {now[0].place}"
    return f"{_named(behind, now)} stayed behind at {now[behind[0]].place}"


def _named(ranks: list[int], told: dict[int, Heartbeat]) -> str:
    return ", ".join(f"rank {rank} ({told[rank].process})" if rank in told else f"rank {rank}" for rank in ranks)


class Pace:
    """How long this process takes for its own part of the steps, in which it waits for no other process.

    Args:
        device: Where it computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0
        self._slow: list[int | None] = [None, None]

    @contextlib.contextmanager
    def timed(self, on: bool = True) -> Iterator[None]:
        """Within it the time is measured if `on`, the device's own, without waiting for it."""
        if not on:
            yield
        elif self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._spans.append((begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def seconds(self) -> float:
        """What was measured since the last call. On a GPU, all of it must be over."""
        total = self._seconds + sum(begin.elapsed_time(end) / 1000 for begin, end in self._spans)
        self._seconds = 0.0
        self._spans.clear()
        return total

    def straggler(self, seconds: list[float]) -> str | None:
        """Names the process that is slow, once it was so for the second time in a row.

        Args:
            seconds: Of each process since the last call.
        """
        slowest, usual = max(seconds), statistics.median_low(seconds)
        rank = seconds.index(slowest) if slowest > SLOW * usual else None
        before, last = self._slow
        self._slow = [last, rank]
        if rank is None or rank != last or rank == before:
            return None
        return f"rank {rank} takes {slowest / usual:.1f} times the median step time"
