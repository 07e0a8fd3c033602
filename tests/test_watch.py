"""A process that dies or stalls takes the others down, in a stated time, and is named."""

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
from vae_scale.config import parse
from vae_scale.training.trainer import Trainer
from vae_scale.training.watch import Heartbeat, Pace, Watch, verdict

PROGRAM = str(Path(__file__).parent / "programs" / "watched.py")
TIMEOUT = 4


class Launched:
    """Two processes that take steps together."""

    def __init__(self, folder: Path, *more: object) -> None:
        self.folder, self.told = folder, folder / "told"
        with self.told.open("w") as file:
            words = command(2, folder, TIMEOUT, *more, program=PROGRAM)
            self.launcher = subprocess.Popen(words, env=environment(), stdout=file, stderr=file)
        while self.steps() < 5:
            assert self.launcher.poll() is None, self.text()
            time.sleep(0.05)
        family = psutil.Process(self.launcher.pid).children(recursive=True)
        self.ranks = {int(each.environ()["RANK"]): each for each in family if "RANK" in each.environ()}

    def steps(self) -> int:
        counts = [self.folder / f"rank_{rank}" for rank in (0, 1)]
        return min(int(path.read_text() or 0) if path.exists() else 0 for path in counts)

    def text(self) -> str:
        return self.told.read_text()

    def seconds_of(self, rank: int) -> float:
        """How long a process still lives."""
        begin = time.monotonic()
        psutil.wait_procs([self.ranks[rank]], timeout=60)
        return time.monotonic() - begin

    def kill(self) -> None:
        for each in [*self.ranks.values(), psutil.Process(self.launcher.pid)] if self.launcher.poll() is None else []:
            each.kill()
        self.launcher.wait()


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Launched]:
    processes = Launched(tmp_path)
    yield processes
    processes.kill()


def test_a_stopped_process_is_named_and_the_others_end(launched: Launched) -> None:
    stopped = launched.ranks[1]
    stopped.send_signal(signal.SIGSTOP)
    assert launched.seconds_of(0) < TIMEOUT + 4
    stopped.send_signal(signal.SIGCONT)  # or the launcher would give it 30 seconds to end by itself
    assert launched.launcher.wait(20) != 0
    assert launched.seconds_of(1) < 1
    (line,) = [line for line in launched.text().splitlines() if "error: no process got any further" in line]
    assert f"for {TIMEOUT} s (train.timeout): rank 1 (process {stopped.pid} on " in line
    assert "gave no sign of life" in line


def test_where_the_store_does_not_answer_either_a_process_still_ends_and_says_so(launched: Launched) -> None:
    stopped = [psutil.Process(launched.launcher.pid), launched.ranks[1]]  # the store is the launcher's
    for each in stopped:
        each.suspend()
    end = time.monotonic() + TIMEOUT + 4
    while f"for {TIMEOUT} s (train.timeout): the launcher's store does not answer" not in launched.text():
        assert time.monotonic() < end, launched.text()
        time.sleep(0.05)
    for each in stopped:
        each.resume()
    assert launched.launcher.wait(20) != 0


def test_a_killed_process_takes_the_others_down_at_once_and_is_named(launched: Launched) -> None:
    launched.ranks[1].send_signal(signal.SIGKILL)
    assert launched.seconds_of(0) < 3
    assert launched.launcher.wait(20) != 0
    cause = launched.text().split("Root Cause")[1]
    assert "rank      : 1" in cause
    assert "SIGKILL" in cause


def test_a_pause_shorter_than_the_timeout_harms_nobody(launched: Launched) -> None:
    launched.ranks[0].send_signal(signal.SIGSTOP)
    time.sleep(TIMEOUT / 2)
    steps = launched.steps()
    launched.ranks[0].send_signal(signal.SIGCONT)
    while launched.steps() < steps + 5:
        assert launched.launcher.poll() is None, launched.text()
        time.sleep(0.05)


def test_a_process_that_lives_but_stays_behind_is_named_with_its_place(tmp_path: Path) -> None:
    processes = Launched(tmp_path, 1)
    try:
        assert processes.launcher.wait(TIMEOUT + 20) != 0
    finally:
        processes.kill()
    assert f"rank 1 (process {processes.ranks[1].pid} on " in processes.text()
    assert "stayed behind at the batch after 21 steps" in processes.text()


def test_compiling_for_longer_than_the_timeout_is_progress(tmp_path: Path) -> None:
    processes = Launched(tmp_path, 1, 2.5 * TIMEOUT)
    try:
        end = time.monotonic() + 5 * TIMEOUT
        while processes.steps() < 25:
            assert processes.launcher.poll() is None, processes.text()
            assert time.monotonic() < end, processes.text()
            time.sleep(0.05)
    finally:
        processes.kill()
    assert "compiling: " in processes.text()


def beats(*told: tuple[int, int, str]) -> dict[int, Heartbeat]:
    return {rank: Heartbeat(number, marks, place, f"process {rank}") for rank, (number, marks, place) in enumerate(told)}


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({}, {}, "the launcher's store does not answer, so nobody knows for whom"),
        (beats((5, 2, "a")), beats((7, 2, "a")), "rank 1 gave no sign of life"),
        (beats((5, 2, "a"), (5, 1, "b")), beats((7, 2, "a"), (5, 1, "b")), "rank 1 (process 1) gave no sign of life"),
        (beats((5, 2, "a"), (5, 1, "b")), beats((7, 2, "a"), (7, 1, "b")), "rank 1 (process 1) stayed behind at b"),
        (beats((5, 2, "a"), (5, 2, "a")), beats((7, 2, "a"), (7, 2, "a")), "all 2 processes are at a"),
    ],
)
def test_what_is_said_follows_from_what_each_process_told(
    before: dict[int, Heartbeat], now: dict[int, Heartbeat], said: str
) -> None:
    assert verdict(before, now, 2) == said


def test_training_tells_where_it_is(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[str] = []
    monkeypatch.setattr(Watch, "mark", lambda _, place: places.append(place))
    words = [f"--data.shards={shards}", f"--run={tmp_path}", *TINY, "--track.tracker=none", "--train.images=24"]
    Trainer(parse([*words, "--evaluate.latents=24"])[0]).run()
    assert places == [
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


def test_one_process_alone_is_not_watched() -> None:
    with Watch(0, 1, 0.1) as watch:
        watch.mark("a step")
        time.sleep(0.5)


def test_a_process_that_is_slow_twice_in_a_row_is_named_once() -> None:
    pace = Pace(torch.device("cpu"))
    fast, slow = [1.0, 1.1, 1.0, 1.2], [1.0, 1.1, 1.0, 1.8]
    told = [pace.straggler(seconds) for seconds in (slow, fast, slow, slow, slow, fast)]
    assert told == [None, None, None, "rank 3 takes 1.8 times the median step time", None, None]
    assert pace.straggler([2.0, 4.0]) is None
    assert pace.straggler([2.0, 4.0]) == "rank 1 takes 2.0 times the median step time"


def test_only_what_is_timed_counts() -> None:
    pace = Pace(torch.device("cpu"))
    for _ in range(2):
        with pace.timed():
            time.sleep(0.05)
        time.sleep(0.2)
    assert 0.1 <= pace.seconds() < 0.25
    assert pace.seconds() == 0
