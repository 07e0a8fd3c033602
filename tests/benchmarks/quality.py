"""Compares generative models trained with equal compute on the same photographs (`make quality PHOTOS=DIR`).

Each method is trained in separate processes for the same number of CPU seconds (wall-clock seconds on a GPU), including
start-up and fitting its prior. The number of training images is estimated from short runs beforehand, since schedules depend
on it. The Frechet distance is computed between the held-out photographs and equally many samples of each method.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pythae_vae import PYTHAE_BATCH
from quality_methods import DEVICE, METHODS, Study
from quality_metrics import measure
from quality_report import write_report

from vae_scale.config.parsing import parse
from vae_scale.errors import UserError, cli_main

ROOT = Path(__file__).parents[2]
PYTHAE = Path(__file__).resolve().with_name("pythae_vae.py")
# Options of all methods: the same photographs, no tracking, and little evaluation.
COMMON = ("--data.train=train,unlabeled", "--evaluate.images=64", "--evaluate.samples=16", "--track.tracker=none")


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def run_command(command: list[str], log: Path) -> float:
    """Runs a command and returns the CPU seconds of all its processes; on a GPU, wall-clock seconds.

    Raises:
        UserError: if the command fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    # Spinning OpenMP threads would count as CPU time.
    threads = {} if DEVICE == "cuda" else {"OMP_NUM_THREADS": "1"}
    begin = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | threads)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        lines = [line.strip() for line in log.read_text().replace("\r", "\n").splitlines() if line.strip()]
        raise UserError(f"exit code {process.returncode}, see {log}: {' | '.join(lines[-3:])}")
    return time.perf_counter() - begin if DEVICE == "cuda" else usage.ru_utime + usage.ru_stime


class Training:
    """The training of one stage of a method."""

    def __init__(self, study: Study, method: str, number: int) -> None:
        self.study, self.method, self.stage = study, method, METHODS[method][number]
        self.run = study.folder(method, number)
        self.later_stages = METHODS[method][number + 1 :]
        self.options = [option.format(folder=self.run.parent) for option in self.stage.options]
        self.batch = PYTHAE_BATCH if not self.options else parse(self.options)[0].train.batch_size

    def command(self, run: Path, images: int) -> list[str]:
        """Returns the command that trains on `images` images."""
        shards, seed = self.study.shards, self.study.seed
        if not self.options:
            return [sys.executable, str(PYTHAE), str(shards), str(run), str(images), str(seed)]
        paths = [f"--data.shards={shards}", f"--run={run}", f"--seed={seed}"]
        duration = [f"--train.images={images}", f"--evaluate.every={images}", f"--checkpoint.every={images}"]
        return [sys.executable, "-m", "vae_scale.train", *self.options, *COMMON, *paths, *duration]

    def calibrate(self, budget: float) -> tuple[float, float]:
        """Estimates the fixed seconds of a run and the seconds per image from a few short runs."""
        folder = self.run.with_name(f"{self.run.name}_calibration")

        def cost(images: int) -> float:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            return run_command(self.command(folder, images), folder.with_suffix(".log"))

        few, many = self.batch, 3 * self.batch
        first, min_difference = cost(few), min(30.0, budget / 20)
        while True:
            second = cost(many)
            per_image = (second - first) / (many - few)
            if second - first >= min_difference:
                shutil.rmtree(folder)
                return max(0.0, first - few * per_image), per_image
            # Increase the number of images until the difference exceeds the noise.
            required = 1.3 * min_difference / per_image if per_image > 0 else math.inf
            many = self.batch * math.ceil(min(max(required, 2 * many), 16 * many) / self.batch)

    def train(self) -> None:
        """Trains the stage within its share of the budget, unless it is already trained."""
        budget = self.stage.share * self.study.budget
        settings = {"options": self.options, "seed": self.study.seed, "budget_seconds": budget, "device": DEVICE}
        name, record = f"{self.method}/{self.stage.name}", self.run / "stage.json"
        if record.exists():
            saved = json.loads(record.read_text())
            if {key: saved.get(key) for key in settings} == settings:
                log(f"{name}: already trained on {saved['images']:,} images")
                return
        log(f"{name}: measuring the time per image")
        fixed, per_image = self.calibrate(budget)
        images = int((budget - fixed) / per_image) // self.batch * self.batch
        if images < self.batch:
            raise UserError(f"{name}: a budget of {budget:,.0f} s is too small; start-up and evaluation take {fixed:,.0f} s")
        log(f"{name}: {per_image * 1000:.1f} ms per image and {fixed:.0f} s overhead; training on {images:,} images")
        shutil.rmtree(self.run, ignore_errors=True)  # the cost of an interrupted run is unknown
        self.run.mkdir(parents=True)
        for stage in self.later_stages:
            (self.run.with_name(stage.name) / "stage.json").unlink(missing_ok=True)  # they depend on this stage
        seconds = run_command(self.command(self.run, images), self.run.with_suffix(".log"))
        measured = {"images": images, "seconds": seconds, "seconds_per_image": per_image, "fixed_seconds": fixed}
        record.write_text(json.dumps(settings | measured, indent=2))
        log(f"{name}: took {seconds / 60:.1f} of {budget / 60:.1f} minutes")


def train_methods(study: Study, methods: list[str]) -> list[str]:
    """Trains methods, `jobs` at a time, and returns those whose stages all succeeded."""
    prepared: dict[str, list[Training]] = {}
    for method in methods:
        try:
            prepared[method] = [Training(study, method, number) for number in range(len(METHODS[method]))]
        except UserError as error:
            log(f"{method} is skipped: {error}")

    def train_stages(trainings: list[Training]) -> bool:
        try:
            for training in trainings:
                training.train()
        except UserError as error:
            log(f"{trainings[0].method} is skipped: {error}")
            return False
        return True

    pool = ThreadPoolExecutor(study.jobs)
    try:
        succeeded = pool.map(train_stages, prepared.values())
        return [method for method, success in zip(prepared, succeeded, strict=True) if success]
    finally:
        pool.shutdown(cancel_futures=True)


@cli_main
def main(argv: Any = None) -> None:
    """Runs the command line `argv`, which defaults to `sys.argv[1:]`."""
    parser = argparse.ArgumentParser(description="Compare generative models trained with equal compute.")
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR", help="in STL-10's binary layout")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), metavar="DIR", help="default: runs/quality")
    parser.add_argument(
        "--cpu-minutes",
        type=float,
        default=30,
        metavar="M",
        help="CPU minutes per method, or wall-clock minutes on a GPU (default: 30)",
    )
    parser.add_argument("--only", default=",".join(METHODS), metavar="NAME,...", help="methods (default: all)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), metavar="N", help="methods trained in parallel (default: number of cores)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")
    args = parser.parse_args(argv)
    methods = args.only.split(",")
    if unknown := set(methods) - set(METHODS):
        raise UserError(f"--only {','.join(sorted(unknown))}: unknown; choose from {', '.join(METHODS)}")
    photos, out = args.photos.resolve(), args.out.resolve()
    os.chdir(ROOT)  # paths of configurations are relative to it
    # On a GPU, wall-clock time is measured, so methods are trained one at a time.
    study = Study(out, args.seed, 60 * args.cpu_minutes, 1 if DEVICE == "cuda" else args.jobs)
    if not (study.shards / "index.json").exists():
        pack = ["-m", "vae_scale.pack", "--source=stl10", f"--data={photos}", f"--out={study.shards}"]
        run_command([sys.executable, *pack], study.out / "pack.log")
    rows, pictures = measure(study, train_methods(study, methods))
    write_report(study.out, rows, pictures, {"seed": args.seed, "budget_minutes": args.cpu_minutes})


if __name__ == "__main__":
    main()
