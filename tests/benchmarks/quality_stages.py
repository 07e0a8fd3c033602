"""Trains the stages of the methods of `quality.py`, each for a given number of CPU seconds (on a GPU, wall-clock seconds)."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock
from pythae_vae import PYTHAE_BATCH
from quality_methods import DEVICE, Method, Stage, training_splits

from vae_scale.config.parsing import parse
from vae_scale.data.shards import ShardSet
from vae_scale.errors import UserError
from vae_scale.files import write_json

ROOT = Path(__file__).parents[2]
PYTHAE = Path(__file__).resolve().with_name("pythae_vae.py")
# Options of all stages, which those of a stage override: no tracking, and little evaluation.
COMMON = ("--evaluate.images=64", "--evaluate.samples=16", "--evaluate.early=false", "--track.tracker=none")
MAX_ATTEMPTS = 3  # trainings of a stage
TOLERANCE = 0.05  # relative difference between budget and cost that is accepted


@dataclass(frozen=True)
class Study:
    """Settings common to all methods.

    Attributes:
        shards: The images.
        out: Folder of the results.
        budget: Seconds per method and seed.
        jobs: Stages trained in parallel.
    """

    shards: ShardSet
    out: Path
    budget: float
    jobs: int = 1


@dataclass(frozen=True)
class StageRun:
    """The training of a stage with one seed, in a folder that its hash names.

    Attributes:
        study: The common settings.
        stage: The stage.
        budget: Seconds of this stage.
        seed: Random seed.
        earlier: The run of the earlier stage, or None.
    """

    study: Study
    stage: Stage
    budget: float
    seed: int
    earlier: "StageRun | None" = None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that the weights depend on. Configuration files are replaced by their content."""
        return {
            "stage": self.stage.name,
            "options": [_expand_config(option) for option in (*COMMON, *self.stage.options)],
            "earlier": self.earlier.hash if self.earlier else None,
            "seed": self.seed,
            "budget_seconds": round(self.budget, 3),
            "device": DEVICE,
            "shards": self.study.shards.fingerprint,
        }

    @cached_property
    def hash(self) -> str:
        """Hash of the settings."""
        return _hash(self.settings)

    @property
    def cost_hash(self) -> str:
        """Hash of the settings that the cost depends on: all except seeds."""
        return _hash(self.settings | {"seed": None, "earlier": self.earlier.cost_hash if self.earlier else None})

    @property
    def name(self) -> str:
        """Name of the folder."""
        return f"{self.stage.name}-{self.hash}"

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.study.out / "stages" / self.name

    @property
    def depth(self) -> int:
        """Number of earlier stages."""
        return self.earlier.depth + 1 if self.earlier else 0

    @property
    def batch(self) -> int:
        """Batch size."""
        return parse(self.stage.options)[0].train.global_batch_size if self.stage.options else PYTHAE_BATCH

    def record(self) -> dict[str, Any] | None:
        """Returns the images, the seconds and the attempts of the training, or None before it has finished."""
        path = self.folder / "stage.json"
        return json.loads(path.read_text()) if path.exists() else None

    def command(self, run: Path, images: int) -> list[str]:
        """Returns the command that trains on `images` images."""
        shards = self.study.shards
        if not self.stage.options:
            return [sys.executable, str(PYTHAE), shards.storage.root, str(run), str(images), str(self.seed)]
        earlier = self.earlier.folder if self.earlier else ""
        options = [option.replace("{earlier}", str(earlier)) for option in self.stage.options]
        data = [f"--data.shards={shards.storage.root}", f"--data.train={','.join(training_splits(shards))}"]
        duration = [f"--{option}={images}" for option in ("train.images", "evaluate.every", "checkpoint.every")]
        paths = [f"--run={run}", f"--seed={self.seed}"]
        return [sys.executable, "-m", "vae_scale.train", *COMMON, *options, *data, *paths, *duration]


def _hash(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _expand_config(option: str) -> Any:
    """Returns the content of the file of a `--config` option, and other options unchanged."""
    name, _, value = option.partition("=")
    return yaml.safe_load(Path(value).read_text()) if name == "--config" else option


def plan_runs(study: Study, method: Method, seed: int) -> list[StageRun]:
    """Returns the runs of a method's stages, which share the budget."""
    runs: list[StageRun] = []
    total = sum(stage.share for stage in method.stages)
    for stage in method.stages:
        runs.append(StageRun(study, stage, study.budget * (stage.share / total), seed, runs[-1] if runs else None))
    return runs


def log(text: str) -> None:
    """Prints a line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def run_command(command: list[str], log: Path) -> float:
    """Runs a command and returns the CPU seconds of all its processes; on a GPU, wall-clock seconds.

    Raises:
        UserError: The command fails.
    """
    # Spinning OpenMP threads would count as CPU time.
    threads = {} if DEVICE == "cuda" else {"OMP_NUM_THREADS": "1"}
    begin = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | threads, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        lines = [line.strip() for line in log.read_text().replace("\r", "\n").splitlines() if line.strip()]
        raise UserError(f"exit code {process.returncode}, see {log}: {' | '.join(lines[-3:])}")
    return time.perf_counter() - begin if DEVICE == "cuda" else usage.ru_utime + usage.ru_stime


def measure_cost(run: StageRun, folder: Path, images: int) -> float:
    """Trains on `images` images in an empty folder and returns the seconds that it took."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return run_command(run.command(folder, images), folder.with_name(f"{folder.name}.log"))


def calibrate(cost: Callable[[int], float], batch: int, budget: float) -> tuple[float, float]:
    """Estimates the fixed seconds of a run and its seconds per image from short runs.

    Args:
        cost: Returns the seconds of a run by its number of images.
        batch: Batch size.
        budget: Seconds available for the final run.

    Raises:
        UserError: The budget is smaller than the shortest run.
    """
    few, many, min_difference = batch, 3 * batch, min(60.0, budget / 8)
    first = cost(few)
    check_budget(budget, first)
    while True:
        second = cost(many)
        per_image = (second - first) / (many - few)
        if second - first >= min_difference:
            return max(0.0, first - few * per_image), per_image
        # Increase the number of images until the difference exceeds the noise.
        required = 1.3 * min_difference / per_image if per_image > 0 else math.inf
        many = batch * math.ceil(min(max(required, 2 * many), 16 * many) / batch)


def check_budget(budget: float, fixed: float) -> None:
    """Raises UserError if a budget does not exceed the seconds of a run without training."""
    if budget <= fixed:
        raise UserError(f"a budget of {budget:,.1f} s is too small; start-up and evaluation take {fixed:,.1f} s")


def affordable_images(budget: float, fixed: float, per_image: float, batch: int) -> int:
    """Returns the number of images, a multiple of the batch size, that a budget allows.

    Raises:
        UserError: The budget is too small for one batch.
    """
    images = int((budget - fixed) / per_image) // batch * batch
    check_budget(budget if images else 0.0, fixed)
    return images


def correct_images(images: int, seconds: float, budget: float, fixed: float, batch: int) -> int:
    """Returns the number of images of the next attempt, after `images` images took `seconds`.

    The fixed seconds are those of the calibration, at most 0.9 of what the attempt took.
    """
    fixed = min(fixed, 0.9 * min(seconds, budget))
    return max(batch, round((budget - fixed) / (seconds - fixed) * images / batch) * batch)


def train_within(budget: float, cost: Callable[[int], float], images: int, fixed: float, batch: int) -> list[tuple[int, float]]:
    """Trains until the cost is within 5% of the budget, at most three times.

    Args:
        budget: Seconds.
        cost: Trains on a number of images and returns the seconds that it took.
        images: Number of images of the first attempt.
        fixed: Estimate of the fixed seconds of a run.
        batch: Batch size.

    Returns:
        Images and seconds of each attempt. The last one counts.
    """
    attempts: list[tuple[int, float]] = []
    while len(attempts) < MAX_ATTEMPTS:
        seconds = cost(images)
        attempts.append((images, seconds))
        corrected = correct_images(images, seconds, budget, fixed, batch)
        if abs(seconds - budget) <= TOLERANCE * budget or corrected == images:
            break
        images = corrected
    return attempts


def estimate_images(run: StageRun) -> tuple[int, float]:
    """Returns the number of images that the budget of a run allows, and its fixed seconds.

    They are those of the same stage with another seed, if it has been trained, and else measured.

    Raises:
        UserError: The budget is too small.
    """
    for path in sorted(run.folder.parent.glob("*/stage.json")):
        record = json.loads(path.read_text())
        if record["cost_hash"] == run.cost_hash:
            return record["images"], record["fixed_seconds"]
    folder = run.folder.with_name(f"{run.name}-calibration")
    fixed, per_image = calibrate(lambda images: measure_cost(run, folder, images), run.batch, run.budget)
    shutil.rmtree(folder)
    return affordable_images(run.budget, fixed, per_image, run.batch), fixed


def train_stage(run: StageRun, label: str) -> None:
    """Trains a stage within its budget, unless it is already trained. `label` names it in messages.

    Raises:
        UserError: The budget is too small, or the training fails.
    """
    folder = run.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{run.name}.lock")):
        if record := run.record():
            log(f"{label}: already trained on {record['images']:,} images")
            return
        log(f"{label}: estimating the number of images")
        images, fixed = estimate_images(run)
        log(f"{label}: training on {images:,} images; {fixed:.1f} s of overhead")

        def cost(images: int) -> float:
            seconds = measure_cost(run, folder, images)
            log(f"{label}: {images:,} images took {seconds / 60:.2f} of {run.budget / 60:.2f} minutes")
            return seconds

        attempts = train_within(run.budget, cost, images, fixed, run.batch)
        images, seconds = attempts[-1]
        result = {"images": images, "seconds": seconds, "attempts": attempts}
        result |= {"fixed_seconds": fixed, "cost_hash": run.cost_hash}
        write_json(folder / "stage.json", run.settings | result)


def train_methods(study: Study, methods: list[Method], seeds: range) -> dict[tuple[str, int], list[StageRun]]:
    """Trains the stages of all methods, `jobs` at a time; a stage that methods share is trained once.

    Returns:
        The runs of each method and seed of which all stages succeeded.
    """
    plans = {(method.name, seed): plan_runs(study, method, seed) for seed in seeds for method in methods}
    # Earlier stages are started first, so a stage never waits for one that is queued behind it.
    labels: dict[str, tuple[StageRun, str]] = {}
    for (name, seed), runs in plans.items():
        for run in runs:
            labels.setdefault(run.hash, (run, f"{name}, {run.stage.name}, seed {seed}"))
    futures: dict[str, Future[bool]] = {}

    def attempt(run: StageRun, label: str) -> bool:
        if run.earlier and not futures[run.earlier.hash].result():
            return False
        try:
            train_stage(run, label)
        except UserError as error:
            log(f"{label} is skipped: {error}")
            return False
        return True

    pool = ThreadPoolExecutor(study.jobs)
    try:
        for run, label in sorted(labels.values(), key=lambda entry: entry[0].depth):
            futures[run.hash] = pool.submit(attempt, run, label)
        return {key: runs for key, runs in plans.items() if all(futures[run.hash].result() for run in runs)}
    finally:
        pool.shutdown(cancel_futures=True)
