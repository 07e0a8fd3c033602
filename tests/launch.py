"""Starts training as users do, in processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

LAUNCH = Path(__file__).parent.parent / "launch"
DDP, FSDP2, MULTI_NODE = (LAUNCH / name for name in ("ddp.yaml", "fsdp2.yaml", "multi_node.yaml"))
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def command(processes: int, *options: object, program: str | None = None, config: Path = DDP) -> list[str]:
    """The command line: `accelerate launch` for several processes, plain Python for one."""
    target = [program] if program else ["-m", "vae_scale.train"]
    words = [str(option) for option in options]
    if processes == 1:
        return [sys.executable, *target, *words]
    return [*ACCELERATE, f"--config_file={config}", f"--num_processes={processes}", *target, *words]


def environment(**extra: str) -> dict[str, str]:
    """One thread per process, so that sums are the same from run to run."""
    return os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | extra


def train(processes: int, *options: object, program: str | None = None, config: Path = DDP, **extra: str) -> str:
    """Trains to the end and returns what was printed."""
    words = command(processes, *options, program=program, config=config)
    run = subprocess.run(words, env=environment(**extra), capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def losses(run: Path) -> dict[int, float]:
    """The logged training loss at each number of images."""
    import json

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["images"]: line["train/loss"] for line in lines if "train/loss" in line}
