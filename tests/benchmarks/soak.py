"""Kills a training run repeatedly and checks that it resumes exactly (`make soak`).

A reference run is trained without interruption. The same command is then restarted after every SIGKILL of all its processes,
sent during start-up, during training, and while a checkpoint is written. The last checkpoint and the logged losses must be
bit-identical to those of the reference run; every image must be read once per epoch, apart from those repeated after resuming;
and the run must resume from the newest complete checkpoint, whose hashes are verified independently.
"""

import argparse
import contextlib
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from tqdm import tqdm

from vae_scale.pack import main as pack

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

from conftest import COUNTS, TINY, write_discs  # noqa: E402

from launch import command, environment  # noqa: E402

RECORD = str(TESTS / "programs" / "record_rows.py")
EPOCH = COUNTS["train"] + COUNTS["unlabeled"]
BATCH, EVERY = 12, 60  # images per step, and between checkpoints
MAX_WRITING_DELAY, MAX_STEP_DELAY, MAX_STARTUP_DELAY = 0.012, 0.1, 6.0  # seconds until a kill
STARTUP_FRACTION, WRITING_FRACTION = 0.1, 0.4  # of kills, during start-up and while a checkpoint is written
TIMEOUT = 300.0  # seconds


@dataclass
class SoakReport:
    """Results of a soak test.

    Attributes:
        kills: Number of kills.
        while_writing: Kills that left an incomplete checkpoint.
        restarts: Starts after a kill.
        lost: Images missing from an epoch, or read more than once.
        repeated: Maximum number of images read again after a restart.
        torn: Restarts that did not resume from the newest complete checkpoint.
        differences: Differences from the reference run.
    """

    kills: int = 0
    while_writing: int = 0
    restarts: int = 0
    lost: int = 0
    repeated: int = 0
    torn: int = 0
    differences: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the runs are equal. Checkpoints are written asynchronously, so up to two intervals may be repeated."""
        return not (self.lost or self.torn or self.differences) and self.repeated <= 2 * EVERY

    def table(self) -> str:
        """Formats the results."""
        rows = {
            "kills": self.kills,
            "kills while a checkpoint was written": self.while_writing,
            "restarts": self.restarts,
            "lost images": self.lost,
            f"repeated images, at most (of {2 * EVERY} allowed)": self.repeated,
            "damaged checkpoints loaded": self.torn,
            "identical to the uninterrupted run": "yes" if not self.differences else f"no: {', '.join(self.differences)}",
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


class Soak:
    """A run that is killed repeatedly, and an uninterrupted reference run.

    Args:
        folder: Output folder.
        shards: Training data.
        processes: Number of processes of each run.
        precision: Precision of both runs.
        images: Images to train on.
        seed: Seed of the times of the kills.
    """

    def __init__(self, folder: Path, shards: Path, processes: int, precision: str, images: int, seed: int) -> None:
        self.folder, self.run, self.reference = folder, folder / "run", folder / "reference"
        self.images, self._processes, self._random = images, processes, random.Random(seed)
        self._options = [
            f"--data.shards={shards}",
            *TINY,
            f"--train.batch_size={BATCH}",
            f"--train.precision={precision}",
            f"--train.images={images}",
            "--train.log_every=1",
            f"--checkpoint.every={EVERY}",
            f"--evaluate.every={5 * EVERY}",
            "--track.tracker=none",
        ]
        self._starts: list[int] = []  # images seen at the beginning of each start that read images
        self._read: list[list[list[int]]] = []  # batches read by each of these starts
        self.report = SoakReport()

    def soak(self, kills: int, on_kill: Callable[[], object] = lambda: None) -> SoakReport:
        """Trains without interruption, then with `kills` kills, and calls `on_kill` after each."""
        reference = self._start(self.reference, "reference")
        try:
            while self.report.kills < kills:
                left = (self.images - (self._newest_complete() or 0)) // BATCH
                if not self._run_and_kill(self._random.randrange(max(1, round(0.9 * left / (kills - self.report.kills))))):
                    raise RuntimeError(f"training finished after {self.report.kills} kills: see {self.folder}")
                on_kill()
            self._run_to_end()
            self._finish(reference)
        finally:
            _kill(reference)
        self._compare()
        return self.report

    def _start(self, run: Path, name: str) -> subprocess.Popen[bytes]:
        record_dir = self.folder / f"{name}.read"
        record_dir.mkdir()
        self._start_time = time.time()
        arguments = command(self._processes, *self._options, f"--run={run}", program=RECORD)
        with (self.folder / f"{name}.log").open("w") as log:
            return subprocess.Popen(arguments, env=environment(RECORD_DIR=str(record_dir)), stdout=log, stderr=log)

    def _finish(self, process: subprocess.Popen[bytes]) -> None:
        try:
            code = process.wait(max(TIMEOUT, self.images / 2))
        finally:
            _kill(process)
        if code:
            raise RuntimeError(f"training ended with exit code {code}: see {self.folder}")

    def _run_and_kill(self, steps: int) -> bool:
        """Starts the run, kills it at a random time and records its batches. Returns False if it finished before the kill.

        Args:
            steps: Steps before the kill, unless it is sent during start-up or while a checkpoint is written.
        """
        expected, number, moment = self._newest_complete(), str(self.report.restarts), self._random.random()
        process = self._start(self.run, number)
        try:
            if moment < STARTUP_FRACTION:
                time.sleep(self._random.uniform(0, MAX_STARTUP_DELAY))
            elif moment < STARTUP_FRACTION + WRITING_FRACTION:
                self._wait(process, self._writing)
                time.sleep(self._random.uniform(0, MAX_WRITING_DELAY))
            else:
                self._wait(process, lambda: len(self._batches(number)) > steps)
                time.sleep(self._random.uniform(0, MAX_STEP_DELAY))
            ended = process.poll() is not None
        finally:
            _kill(process)
        if not ended:
            self.report.kills += 1
            self.report.restarts += 1
            self.report.while_writing += self._writing()
            self._record(number, expected)
        return not ended

    def _run_to_end(self) -> None:
        expected, number = self._newest_complete(), str(self.report.restarts)
        self._finish(self._start(self.run, number))
        self._record(number, expected)

    def _wait(self, process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
        begin = time.monotonic()
        while not condition() and process.poll() is None:
            if time.monotonic() - begin > TIMEOUT:
                raise RuntimeError(f"no progress for {TIMEOUT:g} s: see {self.folder}")
            time.sleep(0.002)

    def _writing(self) -> bool:
        """Whether a checkpoint begun since the last start is incomplete."""
        newest = 0.0
        for path in (self.run / "checkpoints").glob(".images_*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                newest = max(newest, path.stat().st_mtime)
        return newest > self._start_time

    def _batches(self, name: str) -> list[list[int]]:
        """Returns the global batches read by all processes in the start `name`."""
        by_rank = []
        for rank in range(self._processes):
            path = self.folder / f"{name}.read" / f"rank_{rank}_of_{self._processes}.jsonl"
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            by_rank.append([json.loads(line) for line in lines if line.endswith("\n")])
        return [[row for rows in step for row in rows] for step in zip(*by_rank, strict=False)]

    def _newest_complete(self) -> int | None:
        """Returns the images seen of the newest checkpoint that matches its manifest."""
        complete = [path for path in (self.run / "checkpoints").glob("images_*") if _is_complete(path)]
        return max((int(path.name.removeprefix("images_")) for path in complete), default=None)

    def _record(self, number: str, expected: int | None) -> None:
        log, batches = (self.folder / f"{number}.log").read_text(), self._batches(number)
        resumed = f"resuming {self.run} at {expected:,} images" in log if expected else "resuming" not in log
        if batches or "resuming" in log:
            self.report.torn += not resumed
        if batches:
            begin = expected or 0
            if self._read:
                reached = self._starts[-1] + BATCH * len(self._read[-1])
                self.report.repeated = max(self.report.repeated, reached - begin)
            self._starts.append(begin)
            self._read.append(batches)

    def _compare(self) -> None:
        """Compares the final state of both runs."""
        history: list[int] = []
        for begin, batches in zip(self._starts, self._read, strict=True):
            history[begin:] = [row for batch in batches for row in batch]
        for begin in range(0, self.images - EPOCH + 1, EPOCH):
            read = Counter(history[begin : begin + EPOCH])
            self.report.lost += sum(abs(read[row] - 1) for row in range(EPOCH))
        differences = self.report.differences
        if history != [row for batch in self._batches("reference") for row in batch]:
            differences.append("order of images")
        hashes, expected = (_hashes(run / "checkpoints" / f"images_{self.images:09d}") for run in (self.run, self.reference))
        differences += [name for name in hashes.keys() | expected.keys() if hashes.get(name) != expected.get(name)]
        if _losses(self.run) != _losses(self.reference):
            differences.append("logged losses")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and its descendants. The launcher is suspended first, so that it does not start others."""
    if process.poll() is None:
        launcher = psutil.Process(process.pid)
        launcher.suspend()
        for child in [*launcher.children(recursive=True), launcher]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.wait()


def _is_complete(folder: Path) -> bool:
    """Whether a checkpoint matches its manifest, independently of the trainer's check, which is under test."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        return all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"] for name, entry in files.items())
    except (FileNotFoundError, ValueError):
        return False


def _hashes(folder: Path) -> dict[str, str]:
    """Hashes of the weights, EMA weights, optimizer state and mixture of a checkpoint."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def _losses(run: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["images"], line["train/loss"], line["train/grad_norm"]) for line in lines if "train/loss" in line]


def pack_discs(folder: Path) -> Path:
    """Packs a small set of synthetic images of discs."""
    binaries, out = write_discs(folder / "stl10_binary"), folder / "shards"
    pack(["--source=stl10", f"--data={binaries}", f"--out={out}", "--images-per-shard=25", "--workers=1"])
    return out


def main() -> int:
    """Runs the script and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="number of kills (default: 50)")
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of the kills")
    parser.add_argument("--steps", type=int, default=50, help="steps of the run per kill (default: 50)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak_"))
    soak = Soak(folder, pack_discs(folder), args.processes, args.precision, args.kills * args.steps * BATCH, args.seed)
    with tqdm(total=args.kills, unit=" kills", desc=f"{args.processes} x {args.precision}") as bar:
        report = soak.soak(args.kills, bar.update)
    print(report.table())
    if not report.passed:
        print(f"error: the runs differ; all files are kept in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
