"""Kills a run again and again and checks that nothing is lost. Run by hand: `make soak`.

A run of small data is trained once without a break. The same command is then started anew after every SIGKILL of all its
processes: while it starts, while it trains, while it writes a checkpoint. It has to end with the same bits in its last
checkpoint and the same logged losses; to have read every image of every epoch once, but for what came after the checkpoint
from which it goes on; and to go on from the newest whole checkpoint, whose hashes are computed here, too.
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
from conftest import CLASSES, COUNTS, TINY, discs
from tqdm import tqdm

from launch import command, environment
from vae_scale.data.stl10 import write_binaries
from vae_scale.pack import main as pack

RECORD = str(Path(__file__).parent / "programs" / "record_rows.py")
EPOCH = COUNTS["train"] + COUNTS["unlabeled"]
BATCH, EVERY = 12, 60  # images of a step, and between two checkpoints
MOST_WRITING, MOST_STEP, MOST_STARTING = 0.012, 0.1, 6.0  # seconds from such a moment to a kill
STARTING, WRITING = 0.1, 0.4  # shares of kills while the run starts, and while it writes a checkpoint
PATIENCE = 300.0  # seconds for whatever is waited for


@dataclass
class Findings:
    """What the kills did.

    Attributes:
        kills: How many there were.
        while_writing: How many left an unfinished checkpoint.
        restarts: Starts after a kill.
        lost: Images that some epoch lacks, or has more than once.
        repeated: Images read once more after a restart, at most.
        torn: Restarts from anything but the newest whole checkpoint.
        differing: What differs from the run without a break.
    """

    kills: int = 0
    while_writing: int = 0
    restarts: int = 0
    lost: int = 0
    repeated: int = 0
    torn: int = 0
    differing: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether nothing is off. A checkpoint is written while training goes on up to the next, so two may be missing."""
        return not (self.lost or self.torn or self.differing) and self.repeated <= 2 * EVERY

    def table(self) -> str:
        """For people."""
        rows = {
            "kills": self.kills,
            "... while a checkpoint was being written": self.while_writing,
            "restarts": self.restarts,
            "lost images": self.lost,
            f"repeated images, at most (of {2 * EVERY} allowed)": self.repeated,
            "torn checkpoints loaded": self.torn,
            "identical to the run without a break": "yes" if not self.differing else f"no: {', '.join(self.differing)}",
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


class Soak:
    """A run that is killed, and the same one that is not.

    Args:
        folder: For everything that is written.
        shards: The data.
        processes: Of each run.
        precision: Of both.
        images: To train on, in all.
        seed: Of the moments of the kills.
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
        self._starts: list[int] = []  # images seen at the beginning of each start that trained
        self._read: list[list[list[int]]] = []  # and the batches of each
        self.findings = Findings()

    def soak(self, kills: int, told: Callable[[], object] = lambda: None) -> Findings:
        """Trains without a break, then with `kills` kills, after each of which it calls `told`."""
        reference = self._start(self.reference, "reference")
        try:
            while self.findings.kills < kills:
                left = (self.images - (self._newest_whole() or 0)) // BATCH
                if not self._killed(self._random.randrange(max(1, round(0.9 * left / (kills - self.findings.kills))))):
                    raise RuntimeError(f"training ended by itself after {self.findings.kills} kills: see {self.folder}")
                told()
            self._to_the_end()
            self._finish(reference)
        finally:
            _kill(reference)
        self._compare()
        return self.findings

    def _start(self, run: Path, name: str) -> subprocess.Popen[bytes]:
        diary = self.folder / f"{name}.read"
        diary.mkdir()
        self._began = time.time()
        words = command(self._processes, *self._options, f"--run={run}", program=RECORD)
        with (self.folder / f"{name}.told").open("w") as told:
            return subprocess.Popen(words, env=environment(DIARY=str(diary)), stdout=told, stderr=told)

    def _finish(self, process: subprocess.Popen[bytes]) -> None:
        try:
            code = process.wait(max(PATIENCE, self.images / 2))
        finally:
            _kill(process)
        if code:
            raise RuntimeError(f"training ended with exit code {code}: see {self.folder}")

    def _killed(self, steps: int) -> bool:
        """Starts the run, kills it at some moment, and takes down what it did. False if it ended before.

        Args:
            steps: After which it is killed, unless it is killed while it starts or writes a checkpoint.
        """
        expected, number, moment = self._newest_whole(), str(self.findings.restarts), self._random.random()
        process = self._start(self.run, number)
        try:
            if moment < STARTING:
                time.sleep(self._random.uniform(0, MOST_STARTING))
            elif moment < STARTING + WRITING:
                self._wait(process, self._writing)
                time.sleep(self._random.uniform(0, MOST_WRITING))
            else:
                self._wait(process, lambda: len(self._batches(number)) > steps)
                time.sleep(self._random.uniform(0, MOST_STEP))
            ended = process.poll() is not None
        finally:
            _kill(process)
        if not ended:
            self.findings.kills += 1
            self.findings.restarts += 1
            self.findings.while_writing += self._writing()
            self._take_down(number, expected)
        return not ended

    def _to_the_end(self) -> None:
        expected, number = self._newest_whole(), str(self.findings.restarts)
        self._finish(self._start(self.run, number))
        self._take_down(number, expected)

    def _wait(self, process: subprocess.Popen[bytes], over: Callable[[], bool]) -> None:
        begin = time.monotonic()
        while not over() and process.poll() is None:
            if time.monotonic() - begin > PATIENCE:
                raise RuntimeError(f"nothing happens for {PATIENCE:g} s: see {self.folder}")
            time.sleep(0.002)

    def _writing(self) -> bool:
        """Whether a checkpoint was begun since the last start, and did not become whole."""
        begun = 0.0
        for path in (self.run / "checkpoints").glob(".images_*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                begun = max(begun, path.stat().st_mtime)
        return begun > self._began

    def _batches(self, name: str) -> list[list[int]]:
        """The global batches of which every process was given its share in the start `name`."""
        shares = []
        for rank in range(self._processes):
            path = self.folder / f"{name}.read" / f"rank_{rank}_of_{self._processes}.jsonl"
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            shares.append([json.loads(line) for line in lines if line.endswith("\n")])
        return [[row for share in step for row in share] for step in zip(*shares, strict=False)]

    def _newest_whole(self) -> int | None:
        """The images seen by the newest checkpoint that is what its manifest says."""
        whole = [path for path in (self.run / "checkpoints").glob("images_*") if _is_whole(path)]
        return max((int(path.name.removeprefix("images_")) for path in whole), default=None)

    def _take_down(self, number: str, expected: int | None) -> None:
        told, batches = (self.folder / f"{number}.told").read_text(), self._batches(number)
        resumed = f"resuming {self.run} at {expected:,} images" in told if expected else "resuming" not in told
        if batches or "resuming" in told:
            self.findings.torn += not resumed
        if batches:
            begin = expected or 0
            if self._read:
                reached = self._starts[-1] + BATCH * len(self._read[-1])
                self.findings.repeated = max(self.findings.repeated, reached - begin)
            self._starts.append(begin)
            self._read.append(batches)

    def _compare(self) -> None:
        """Looks at what there is in the end."""
        history: list[int] = []
        for begin, batches in zip(self._starts, self._read, strict=True):
            history[begin:] = [row for batch in batches for row in batch]
        for begin in range(0, self.images - EPOCH + 1, EPOCH):
            read = Counter(history[begin : begin + EPOCH])
            self.findings.lost += sum(abs(read[row] - 1) for row in range(EPOCH))
        differing = self.findings.differing
        if history != [row for batch in self._batches("reference") for row in batch]:
            differing.append("order of images")
        ours, theirs = (_hashes(run / "checkpoints" / f"images_{self.images:09d}") for run in (self.run, self.reference))
        differing += [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
        if _losses(self.run) != _losses(self.reference):
            differing.append("logged losses")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """All processes at once. Those of the launcher have sessions of their own, and it must not begin others meanwhile."""
    if process.poll() is None:
        launcher = psutil.Process(process.pid)
        launcher.suspend()
        for each in [*launcher.children(recursive=True), launcher]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


def _is_whole(folder: Path) -> bool:
    """Whether a checkpoint is what its manifest says. Not the trainer's own check, which is on trial here."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        return all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"] for name, entry in files.items())
    except (FileNotFoundError, ValueError):
        return False


def _hashes(folder: Path) -> dict[str, str]:
    """Of all tensors of a checkpoint: weights, averages, moments, mixture."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def _losses(run: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["images"], line["train/loss"], line["train/grad_norm"]) for line in lines if "train/loss" in line]


def pack_discs(folder: Path) -> Path:
    """Small data: discs, packed."""
    binaries, out = folder / "stl10_binary", folder / "shards"
    splits = {
        name: iter([(discs(count, seed), [row % 10 for row in range(count)])])
        for seed, (name, count) in enumerate(COUNTS.items())
    }
    write_binaries(binaries, splits, CLASSES)
    pack(["--source=stl10", f"--data={binaries}", f"--out={out}", "--images-per-shard=25", "--workers=1"])
    return out


def main() -> int:
    """Runs the script and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--steps", type=int, default=50, help="of the run, for each kill")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak_"))
    soak = Soak(folder, pack_discs(folder), args.processes, args.precision, args.kills * args.steps * BATCH, args.seed)
    with tqdm(total=args.kills, unit=" kills", desc=f"{args.processes} x {args.precision}") as bar:
        found = soak.soak(args.kills, bar.update)
    print(found.table())
    if not found.good:
        print(f"error: something is off; everything is kept in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
