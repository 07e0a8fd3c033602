"""Signals, full disks and second runs: what a run in its folder goes through, in real processes."""

import io
import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from conftest import TINY

from launch import command, environment, train
from vae_scale.training import checkpoint
from vae_scale.training.stopping import LAG, Stopping
from vae_scale.training.tracking import METRICS, _Lines

SECONDS = 25  # that a process has to save and leave; a launcher kills it after 30


def words(shards: Path, run: Path, *more: str) -> list[str]:
    longer = ["--train.images=1000000", "--checkpoint.every=1000000", "--evaluate.every=1000000", "--train.log_every=1"]
    return [f"--data.shards={shards}", f"--run={run}", *TINY, "--track.tracker=none", *longer, *more]


@contextmanager
def started(processes: int, run: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A training that has taken its first steps."""
    launch = command(processes, *options)
    process = subprocess.Popen(launch, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(lambda: process.poll() is not None or lines(run) >= 2)
        assert process.poll() is None, process.communicate()[0]
        yield process
    finally:
        for each in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            each.kill()


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def lines(run: Path) -> int:
    path = run / METRICS
    return len(path.read_text().splitlines()) if path.exists() else 0


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes below a launcher, by rank."""
    found = [each for each in psutil.Process(process.pid).children(recursive=True) if "LOCAL_RANK" in each.environ()]
    return sorted((each for each in found if "vae_scale.train" in each.cmdline()), key=lambda each: each.environ()["RANK"])


def saved(run: Path) -> int:
    folder = checkpoint.newest(run)
    assert folder is not None
    return checkpoint.images_of(folder)


def test_sigterm_saves_leaves_and_marks_and_the_next_run_goes_on_from_there(shards: Path, tmp_path: Path) -> None:
    options = words(shards, tmp_path)
    with started(1, tmp_path, *options) as process:
        process.terminate()
        told, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, told
    images = saved(tmp_path)
    assert f"{images:,} images: stopped by a signal, and saved" in told
    assert json.loads((tmp_path / "requeue.json").read_text()) == {"images_seen": images}
    assert (
        images == json.loads((tmp_path / METRICS).read_text().splitlines()[-1])["images"]
    )  # what was measured until then is told, too
    told = train(1, *options, f"--train.images={images + 24}")
    assert f"resuming {tmp_path} at {images:,} images" in told
    assert not (tmp_path / "requeue.json").exists()


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(shards: Path, tmp_path: Path) -> None:
    with started(2, tmp_path, *words(shards, tmp_path)) as process:
        rank_1 = workers(process)[1]
        rank_1.send_signal(signal.SIGUSR1)
        told, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, told
    assert f"{saved(tmp_path):,} images: stopped by a signal, and saved" in told
    assert (tmp_path / "requeue.json").exists()


def test_sigterm_to_the_launcher_leaves_a_checkpoint_and_the_marker(shards: Path, tmp_path: Path) -> None:
    with started(2, tmp_path, *words(shards, tmp_path)) as process:
        process.terminate()
        told, _ = process.communicate(timeout=SECONDS + 10)
    assert f"{saved(tmp_path):,} images: stopped by a signal, and saved" in told  # whatever the launcher makes of it
    assert (tmp_path / "requeue.json").exists()


def test_ctrl_c_saves_and_a_second_one_stops_at_once(shards: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    with started(1, once, *words(shards, once)) as process:
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, told
    assert saved(once) > 0
    assert not (once / "requeue.json").exists()
    with started(1, twice, *words(shards, twice, "--train.batch_size=150")) as process:  # steps that take their time
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        for line in process.stdout:
            if "press Ctrl-C again to stop at once" in line:
                break
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert checkpoint.newest(twice) is None


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(shards: Path, tmp_path: Path) -> None:
    options = words(shards, tmp_path)
    with started(1, tmp_path, *options):
        other = subprocess.run(command(1, *options), env=environment(), capture_output=True, text=True)
        assert other.returncode == 2
        assert f"error: {tmp_path}: is being trained by another process" in other.stderr
        reached = lines(tmp_path)
        wait_for(lambda: lines(tmp_path) > reached)


def test_all_act_at_the_same_step_whoever_was_asked_first() -> None:
    ours, theirs = Stopping(torch.device("cpu")), Stopping(torch.device("cpu"))
    stopped: list[list[int]] = [[], []]
    for step in range(20):
        if step == 7:
            ours._asked(signal.SIGTERM, None)
        total = ours.said() + theirs.said()
        for place, each in enumerate((ours, theirs)):
            each.heard(total)
            if each.agreed:
                stopped[place].append(step)
    assert stopped[0] == stopped[1] == list(range(7 + LAG, 20))
    assert theirs.preempted


def test_metrics_that_find_the_disk_full_are_written_later_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # pytest's is a file, too
    metrics = _Lines(tmp_path / METRICS, 0)
    metrics.append('{"images": 1}')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        metrics.append('{"images": 2}')
        metrics.append('{"images": 3}')
        assert (tmp_path / METRICS).read_text() == '{"images": 1}\n'
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    metrics.append('{"images": 4}')
    assert [json.loads(line)["images"] for line in (tmp_path / METRICS).read_text().splitlines()] == [1, 2, 3, 4]
