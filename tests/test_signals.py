"""Signals, concurrent runs and full disks, tested with real processes."""

import io
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from launch import command, environment, train, train_options, wait_for
from vae_scale.runtime import checkpoint
from vae_scale.runtime.signals import DELAY_STEPS, SignalHandler
from vae_scale.tracking.tracker import METRICS, JsonlWriter

SHUTDOWN_SECONDS = 25  # a launcher kills its processes after 30


def long_run_options(shards: Path, run: Path, *more: str) -> list[str]:
    long_run = ("--train.images=1000000", "--checkpoint.every=1000000", "--evaluate.every=1000000", "--train.log_every=1")
    return train_options(shards, run, *long_run, *more)


@contextmanager
def start_training(processes: int, run: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Starts a training process and waits for its first steps."""
    launch = command(processes, *options)
    process = subprocess.Popen(launch, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(lambda: process.poll() is not None or count_metrics(run) >= 2)
        assert process.poll() is None, process.communicate()[0]
        yield process
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            child.kill()


def count_metrics(run: Path) -> int:
    path = run / METRICS
    return len(path.read_text().splitlines()) if path.exists() else 0


def find_workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Returns the training processes of a launcher in rank order."""
    children = [child for child in psutil.Process(process.pid).children(recursive=True) if "LOCAL_RANK" in child.environ()]
    return sorted(
        (child for child in children if "vae_scale.train" in child.cmdline()), key=lambda child: child.environ()["RANK"]
    )


def newest_images_seen(run: Path) -> int:
    folder = checkpoint.newest_checkpoint(run)
    assert folder is not None
    return checkpoint.images_seen_at(folder)


def test_sigterm_saves_and_the_next_run_resumes(shards: Path, tmp_path: Path) -> None:
    options = long_run_options(shards, tmp_path)
    with start_training(1, tmp_path, *options) as process:
        process.terminate()
        output, _ = process.communicate(timeout=SHUTDOWN_SECONDS)
    assert process.returncode == 0, output
    images = newest_images_seen(tmp_path)
    assert f"{images:,} images: stopped by a signal" in output
    assert json.loads((tmp_path / "requeue.json").read_text()) == {"images_seen": images}
    assert images == json.loads((tmp_path / METRICS).read_text().splitlines()[-1])["images"]  # logged metrics are complete
    output = train(1, *options, f"--train.images={images + 24}")
    assert f"resuming {tmp_path} at {images:,} images" in output
    assert not (tmp_path / "requeue.json").exists()


def test_signal_to_one_rank_stops_all_ranks_at_the_same_step(shards: Path, tmp_path: Path) -> None:
    with start_training(2, tmp_path, *long_run_options(shards, tmp_path)) as process:
        rank_1 = find_workers(process)[1]
        rank_1.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=SHUTDOWN_SECONDS)
    assert process.returncode == 0, output
    assert f"{newest_images_seen(tmp_path):,} images: stopped by a signal" in output
    assert (tmp_path / "requeue.json").exists()


def test_sigterm_to_the_launcher_saves_a_checkpoint(shards: Path, tmp_path: Path) -> None:
    with start_training(2, tmp_path, *long_run_options(shards, tmp_path)) as process:
        process.terminate()
        output, _ = process.communicate(timeout=SHUTDOWN_SECONDS + 10)
    assert f"{newest_images_seen(tmp_path):,} images: stopped by a signal" in output
    assert (tmp_path / "requeue.json").exists()


def test_ctrl_c_saves_and_a_second_one_stops_immediately(shards: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    with start_training(1, once, *long_run_options(shards, once)) as process:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=SHUTDOWN_SECONDS)
    assert process.returncode == 0, output
    assert newest_images_seen(once) > 0
    assert not (once / "requeue.json").exists()
    with start_training(1, twice, *long_run_options(shards, twice, "--train.batch_size=150")) as process:  # slow steps
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        for line in process.stdout:
            if "press Ctrl-C again to stop at once" in line:
                break
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=SHUTDOWN_SECONDS)
    assert process.returncode == 130
    assert checkpoint.newest_checkpoint(twice) is None


def test_second_run_in_the_same_folder_is_refused(shards: Path, tmp_path: Path) -> None:
    options = long_run_options(shards, tmp_path)
    with start_training(1, tmp_path, *options):
        other = subprocess.run(command(1, *options), env=environment(), capture_output=True, text=True)
        assert other.returncode == 2
        assert f"error: {tmp_path}: is being trained by another process" in other.stderr
        logged = count_metrics(tmp_path)
        wait_for(lambda: count_metrics(tmp_path) > logged)


def test_all_ranks_stop_at_the_same_step() -> None:
    first, second = SignalHandler(torch.device("cpu")), SignalHandler(torch.device("cpu"))
    stopped: list[list[int]] = [[], []]
    for step in range(20):
        if step == 7:
            first._handle(signal.SIGTERM, None)
        total = first.local_flag() + second.local_flag()
        for rank, handler in enumerate((first, second)):
            handler.update(total)
            if handler.should_stop:
                stopped[rank].append(step)
    assert stopped[0] == stopped[1] == list(range(7 + DELAY_STEPS, 20))
    assert second.preempted


def test_metrics_are_written_after_a_full_disk_was_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # pytest replaces it with a file, to which the limit applies
    metrics = JsonlWriter(tmp_path / METRICS, 0)
    metrics.write({"images": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        metrics.write({"images": 2})
        metrics.write({"images": 3})
        assert (tmp_path / METRICS).read_text() == '{"images": 1}\n'
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    metrics.write({"images": 4})
    assert [json.loads(line)["images"] for line in (tmp_path / METRICS).read_text().splitlines()] == [1, 2, 3, 4]
