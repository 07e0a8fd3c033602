"""Detects hangs: ends all ranks if none makes progress, and reports the rank that blocks the others."""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

HEARTBEATS_PER_TIMEOUT, MAX_INTERVAL = 20, 10.0  # seconds
GRACE = 2  # intervals within which a live process publishes a new heartbeat


@dataclass(frozen=True)
class Heartbeat:
    """The state that a rank publishes periodically.

    Attributes:
        number: Number of this heartbeat.
        progress: Number of calls of `HangWatchdog.heartbeat`, equal on all ranks at the same point of the program.
        location: Current operation of the rank.
        process: Process id and host.
        compiling: Whether the rank is compiling, which counts as progress.
    """

    number: int
    progress: int
    location: str
    process: str
    compiling: bool = False


class HangWatchdog(contextlib.AbstractContextManager["HangWatchdog"]):
    """Ends this process if no rank makes progress for `timeout` seconds.

    Within the context, a thread of each rank publishes heartbeats in the launcher's TCPStore, even while the main thread is
    blocked in a collective. A single process is not monitored.

    Args:
        rank: Rank of this process.
        world_size: Number of ranks.
        timeout: Seconds without progress.
        on_hang: Called with the error message before the process exits.
    """

    def __init__(
        self, rank: int, world_size: int, timeout: float, on_hang: Callable[[str], None] = lambda message: None
    ) -> None:
        self._rank, self._world_size, self._timeout, self._on_hang = rank, world_size, timeout, on_hang
        self._interval = min(timeout / HEARTBEATS_PER_TIMEOUT, MAX_INTERVAL)
        self._last = Heartbeat(0, 0, "the start", f"process {os.getpid()} on {socket.gethostname()}")
        self._closed = threading.Event()
        # Two connections, because a connection is locked while it waits for a response.
        self._publish_store: TCPStore | None = None
        self._read_store: TCPStore | None = None

    def heartbeat(self, location: str) -> None:
        """Records progress: this rank starts the operation `location`."""
        self._last = replace(self._last, progress=self._last.progress + 1, location=location)

    def set_compiling(self, active: bool) -> None:
        """Marks the beginning or the end of compilation, which may take longer than the timeout."""
        self._last = replace(self._last, compiling=active)

    def __enter__(self) -> "HangWatchdog":
        if self._world_size > 1:
            self._publish_store, self._read_store = self._connect(), self._connect()
            self._publish(0)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def _connect(self) -> TCPStore:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = timedelta(seconds=self._timeout)
        return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)

    def _watch(self) -> None:
        # Idle time is counted in heartbeats, so that time during which this process was suspended does not count.
        idle, progress = 0, -1
        max_idle = round(self._timeout / self._interval)
        before: dict[int, Heartbeat] = {}
        for number in itertools.count(1):
            if self._closed.wait(self._interval):
                return
            self._publish(number)
            idle = 0 if self._last.compiling or self._last.progress != progress else idle + 1
            progress = self._last.progress
            if idle == max_idle:
                before = self._read_heartbeats()
            elif idle == max_idle + GRACE:
                now = self._read_heartbeats()
                if any(_has_progressed(beat, now[rank]) for rank, beat in before.items() if rank in now):
                    idle = 0  # another rank is slow or compiling
                else:
                    self._abort(before, now)

    def _abort(self, before: dict[int, Heartbeat], now: dict[int, Heartbeat]) -> None:
        alive = [rank for rank, beat in now.items() if rank in before and before[rank].number < beat.number]
        if self._rank > min(alive, default=self._rank):
            time.sleep(GRACE * self._interval)  # the lowest live rank reports the error
        else:
            message = f"no progress for {self._timeout:g} s (train.timeout): {diagnose_hang(before, now, self._world_size)}"
            hint = "run the same command again to resume from the last checkpoint"
            print(f"\nerror: {message}; {hint}", file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):  # the process must exit in any case
                self._on_hang(message)
        os._exit(1)  # the main thread is blocked

    def _publish(self, number: int) -> None:
        if self._publish_store is None:
            return
        try:
            self._publish_store.set(f"watchdog/{self._rank}", json.dumps(astuple(replace(self._last, number=number))))
        except RuntimeError:  # the launcher has exited; training continues without the watchdog
            self._publish_store = None

    def _read_heartbeats(self) -> dict[int, Heartbeat]:
        """Returns the last heartbeat of each rank, or an empty dict if the store does not respond."""
        heartbeats: dict[int, Heartbeat] = {}
        store = self._read_store
        if store is None or self._publish_store is None:
            return heartbeats

        def read() -> None:
            with contextlib.suppress(RuntimeError):
                for rank in range(self._world_size):
                    if store.check([f"watchdog/{rank}"]):
                        heartbeats[rank] = Heartbeat(*json.loads(store.get(f"watchdog/{rank}")))

        # In a thread, because the store's timeout does not apply if its process is suspended or the link is cut.
        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(self._interval)
        return dict(heartbeats)


def _has_progressed(before: Heartbeat, now: Heartbeat) -> bool:
    is_alive = now.number > before.number
    return now.progress > before.progress or (is_alive and (before.compiling or now.compiling))


def diagnose_hang(before: dict[int, Heartbeat], now: dict[int, Heartbeat], world_size: int) -> str:
    """Returns a description of the ranks that block the others, from heartbeats read at two times."""
    if not now:
        return "the launcher's store does not respond, so the cause is unknown"

    def describe(ranks: list[int]) -> str:
        return ", ".join(f"rank {rank} ({now[rank].process})" if rank in now else f"rank {rank}" for rank in ranks)

    silent = [rank for rank in range(world_size) if rank not in now or rank not in before or now[rank] == before[rank]]
    if silent:
        return f"{describe(silent)} does not respond"
    least = min(beat.progress for beat in now.values())
    behind = [rank for rank, beat in now.items() if beat.progress == least]
    if len(behind) == world_size:
        return f"all {world_size} ranks are at {now[0].location}"
    return f"{describe(behind)} is stuck at {now[behind[0]].location}"
