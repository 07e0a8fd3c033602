"""If a rank dies or hangs, all ranks exit within the timeout, and the error names the rank."""

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from conftest import TINY

from launch import command, environment
from vae_scale.config.parsing import parse
from vae_scale.runtime.step_timer import StepTimer
from vae_scale.runtime.watchdog import HangWatchdog, Heartbeat, diagnose_hang
from vae_scale.training.trainer import Trainer

PROGRAM = str(Path(__file__).parent / "programs" / "watchdog.py")
TIMEOUT = 4


class Launched:
    """Two launched ranks that take synchronized steps."""

    def __init__(self, folder: Path, *more: object) -> None:
        self.folder, self.log = folder, folder / "log"
        with self.log.open("w") as file:
            arguments = command(2, folder, TIMEOUT, *more, program=PROGRAM)
            self.launcher = subprocess.Popen(arguments, env=environment(), stdout=file, stderr=file)
        while self.steps() < 5:
            assert self.launcher.poll() is None, self.text()
            time.sleep(0.05)
        children = psutil.Process(self.launcher.pid).children(recursive=True)
        self.workers = {int(process.environ()["RANK"]): process for process in children if "RANK" in process.environ()}

    def steps(self) -> int:
        paths = [self.folder / f"rank_{rank}" for rank in (0, 1)]
        return min(int(path.read_text() or 0) if path.exists() else 0 for path in paths)

    def text(self) -> str:
        return self.log.read_text()

    def seconds_until_exit(self, rank: int) -> float:
        begin = time.monotonic()
        psutil.wait_procs([self.workers[rank]], timeout=60)
        return time.monotonic() - begin

    def kill(self) -> None:
        for process in [*self.workers.values(), psutil.Process(self.launcher.pid)] if self.launcher.poll() is None else []:
            process.kill()
        self.launcher.wait()


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Launched]:
    processes = Launched(tmp_path)
    yield processes
    processes.kill()


def test_suspended_rank_is_named_and_the_others_exit(launched: Launched) -> None:
    stopped = launched.workers[1]
    stopped.send_signal(signal.SIGSTOP)
    assert launched.seconds_until_exit(0) < TIMEOUT + 4
    stopped.send_signal(signal.SIGCONT)  # otherwise the launcher waits 30 seconds for it
    assert launched.launcher.wait(20) != 0
    assert launched.seconds_until_exit(1) < 1
    (line,) = [line for line in launched.text().splitlines() if "error: no progress" in line]
    assert f"for {TIMEOUT} s (train.timeout): rank 1 (process {stopped.pid} on " in line
    assert "does not respond" in line


def test_rank_exits_if_the_store_does_not_respond(launched: Launched) -> None:
    stopped = [psutil.Process(launched.launcher.pid), launched.workers[1]]  # the launcher hosts the store
    for process in stopped:
        process.suspend()
    end = time.monotonic() + TIMEOUT + 4
    while f"for {TIMEOUT} s (train.timeout): the launcher's store does not respond" not in launched.text():
        assert time.monotonic() < end, launched.text()
        time.sleep(0.05)
    for process in stopped:
        process.resume()
    assert launched.launcher.wait(20) != 0


def test_killed_rank_is_named_and_ends_the_others(launched: Launched) -> None:
    launched.workers[1].send_signal(signal.SIGKILL)
    assert launched.seconds_until_exit(0) < 3
    assert launched.launcher.wait(20) != 0
    cause = launched.text().split("Root Cause")[1]
    assert "rank      : 1" in cause
    assert "SIGKILL" in cause


def test_pause_shorter_than_the_timeout_is_tolerated(launched: Launched) -> None:
    launched.workers[0].send_signal(signal.SIGSTOP)
    time.sleep(TIMEOUT / 2)
    steps = launched.steps()
    launched.workers[0].send_signal(signal.SIGCONT)
    while launched.steps() < steps + 5:
        assert launched.launcher.poll() is None, launched.text()
        time.sleep(0.05)


def test_stuck_rank_is_named_with_its_location(tmp_path: Path) -> None:
    processes = Launched(tmp_path, 1)
    try:
        assert processes.launcher.wait(TIMEOUT + 20) != 0
    finally:
        processes.kill()
    assert f"rank 1 (process {processes.workers[1].pid} on " in processes.text()
    assert "is stuck at the batch after 21 steps" in processes.text()


def test_compilation_counts_as_progress(tmp_path: Path) -> None:
    processes = Launched(tmp_path, 1, 2.5 * TIMEOUT)
    try:
        end = time.monotonic() + 5 * TIMEOUT
        while processes.steps() < 25:
            assert processes.launcher.poll() is None, processes.text()
            assert time.monotonic() < end, processes.text()
            time.sleep(0.05)
    finally:
        processes.kill()
    assert "compiling" in processes.text()


def heartbeats(*values: tuple[int, int, str]) -> dict[int, Heartbeat]:
    return {rank: Heartbeat(*value, process=f"process {rank}") for rank, value in enumerate(values)}


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ({}, {}, "the launcher's store does not respond, so the cause is unknown"),
        (heartbeats((5, 2, "a")), heartbeats((7, 2, "a")), "rank 1 does not respond"),
        (heartbeats((5, 2, "a"), (5, 1, "b")), heartbeats((7, 2, "a"), (5, 1, "b")), "rank 1 (process 1) does not respond"),
        (heartbeats((5, 2, "a"), (5, 1, "b")), heartbeats((7, 2, "a"), (7, 1, "b")), "rank 1 (process 1) is stuck at b"),
        (heartbeats((5, 2, "a"), (5, 2, "a")), heartbeats((7, 2, "a"), (7, 2, "a")), "all 2 ranks are at a"),
    ],
)
def test_diagnose_hang(before: dict[int, Heartbeat], now: dict[int, Heartbeat], expected: str) -> None:
    assert diagnose_hang(before, now, 2) == expected


def test_training_reports_its_location(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locations: list[str] = []
    monkeypatch.setattr(HangWatchdog, "heartbeat", lambda _, location: locations.append(location))
    options = [f"--data.shards={shards}", f"--run={tmp_path}", *TINY, "--track.tracker=none", "--train.images=24"]
    Trainer(parse([*options, "--evaluate.prior_fit_images=24"])[0]).run()
    assert locations == [
        "the step after 0 images",
        "the wait for the batch after 12 images",
        "the step after 12 images",
        "the evaluation after 24 images",
        *(f"batch {number} of 30 images" for number in range(3)),
        "the fit of the mixture after 24 images",
        *(f"batch {number} of 24 images" for number in range(2)),
        "the checkpoint after 24 images",
        "the wait for the batch after 24 images",
    ]


def test_single_process_is_not_watched() -> None:
    with HangWatchdog(0, 1, 0.1) as watchdog:
        watchdog.heartbeat("a step")
        time.sleep(0.5)


def test_straggler_is_reported_once_after_two_slow_intervals() -> None:
    timer = StepTimer(torch.device("cpu"))
    fast, slow = [1.0, 1.1, 1.0, 1.2], [1.0, 1.1, 1.0, 1.8]
    messages = [timer.detect_straggler(seconds) for seconds in (slow, fast, slow, slow, slow, fast)]
    assert messages == [None, None, None, "rank 3 takes 1.8 times the median step time", None, None]
    assert timer.detect_straggler([2.0, 4.0]) is None
    assert timer.detect_straggler([2.0, 4.0]) == "rank 1 takes 2.0 times the median step time"


def test_step_timer_counts_timed_blocks_only() -> None:
    timer = StepTimer(torch.device("cpu"))
    for _ in range(2):
        with timer.record():
            time.sleep(0.05)
        time.sleep(0.2)
    assert 0.1 <= timer.pop_seconds() < 0.25
    assert timer.pop_seconds() == 0
