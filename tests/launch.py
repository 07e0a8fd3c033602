"""Starts training, in this process or in separate ones."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vae_scale.training.trainer import Trainer

LAUNCH = Path(__file__).parent.parent / "launch"
DDP, FSDP2, MULTI_NODE = (LAUNCH / name for name in ("ddp.yaml", "fsdp2.yaml", "multi_node.yaml"))
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def command(processes: int, *options: object, program: str | None = None, config: Path = DDP) -> list[str]:
    """Returns the command line: `accelerate launch` for several processes, `python` for one."""
    target = [program] if program else ["-m", "vae_scale.train"]
    arguments = [str(option) for option in options]
    if processes == 1:
        return [sys.executable, *target, *arguments]
    return [*ACCELERATE, f"--config_file={config}", f"--num_processes={processes}", *target, *arguments]


def environment(**extra: str) -> dict[str, str]:
    """Returns the environment of a CPU run, with one thread per process so that sums are reproducible."""
    return os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | extra


def train(processes: int, *options: object, program: str | None = None, config: Path = DDP, **extra: str) -> str:
    """Trains in separate processes and returns their output."""
    arguments = command(processes, *options, program=program, config=config)
    run = subprocess.run(arguments, env=environment(**extra), capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def train_options(shards: Path, run: Path, *more: object) -> list[str]:
    """Returns options that train a tiny network without a tracker."""
    from conftest import TINY  # conftest imports this module

    return [f"--data.shards={shards}", f"--run={run}", *TINY, "--track.tracker=none", *map(str, more)]


def train_in_process(*options: str) -> "Trainer":
    """Trains in this process and returns the trainer."""
    from vae_scale.config.parsing import parse
    from vae_scale.training.trainer import Trainer

    trainer = Trainer(parse(list(options))[0])
    trainer.run()
    return trainer


def losses(run: Path) -> dict[int, float]:
    """Returns the logged training loss by number of images."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["images"]: line["train/loss"] for line in lines if "train/loss" in line}


def wait_for(condition: Callable[[], object], seconds: float = 120, describe: Callable[[], str] = str) -> None:
    """Waits until a condition holds and fails with a description after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, describe()
        time.sleep(0.05)
