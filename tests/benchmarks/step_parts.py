"""Milliseconds of each part of a training step: data, forward, backward, optimizer, EMA, logging and checkpoints.

    python tests/benchmarks/step_parts.py --config configs/demo.yaml --data.shards DIR [--json FILE]

The device is synchronized around each part, which makes the sum longer than a step of `python -m vae_scale.bench train`. All
other options are those of vae_scale.train.
"""

import argparse
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from vae_scale.bench import parse_training_options
from vae_scale.benchmark import training
from vae_scale.benchmark.measuring import markdown, synchronize
from vae_scale.config.options import Config
from vae_scale.errors import cli_main
from vae_scale.files import write_json


def measure_parts(config: Config) -> dict[str, dict[str, float]]:
    """Returns milliseconds per call (`ms_each`) and per step (`ms_per_step`) of each part.

    The time per step of logging and checkpoints is averaged over their configured intervals.
    """
    with training.open_trainer(config) as measured:
        trainer, seconds = measured.trainer, defaultdict[str, list[float]](list)
        measured.choose_steps(training.SECONDS)
        measured.train()  # warms up
        measured.data_seconds = measured.train_seconds = 0.0
        methods: dict[str, tuple[Any, str]] = {
            "random inputs": (trainer, "random_inputs"),
            "forward": (trainer, "forward"),
            "backward": (trainer.accelerator, "backward"),
            "clip and optimizer": (trainer.optimizer_step, "step"),
            "EMA": (trainer.ema, "update"),
            "logging": (trainer, "log"),
            "checkpoint stall": (trainer, "save_checkpoint"),
        }
        with ExitStack() as stack:
            for name, (owner, method) in methods.items():
                timed_method = timed(getattr(owner, method), seconds[name], trainer.device)
                stack.enter_context(mock.patch.object(owner, method, timed_method))
            measured.train()
            total = sum(map(sum, seconds.values()))
            trainer.save_checkpoint()
        trainer.writer.wait()
    each = {name: sum(durations) / len(durations) for name, durations in seconds.items()}
    per_step = {name: sum(durations) / measured.steps for name, durations in seconds.items()}
    per_step["logging"] = each["logging"] / config.train.log_every
    per_step["checkpoint stall"] = each["checkpoint stall"] * trainer.batch_size / config.checkpoint.every
    rest = {"data wait": measured.data_seconds, "other": measured.train_seconds - measured.data_seconds - total}
    for name, duration in rest.items():
        each[name] = per_step[name] = duration / measured.steps
    return {name: {"ms_each": 1e3 * each[name], "ms_per_step": 1e3 * per_step[name]} for name in each}


def timed(function: Callable[..., Any], seconds: list[float], device: torch.device) -> Callable[..., Any]:
    """Returns a function that appends the duration of each call of `function` to `seconds`."""

    @functools.wraps(function)
    def timed_function(*args: Any, **options: Any) -> Any:
        synchronize(device)
        begin = time.perf_counter()
        result = function(*args, **options)
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
        return result

    return timed_function


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv`, which defaults to `sys.argv[1:]`."""
    parser = argparse.ArgumentParser(description="Measure the parts of a training step.", allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    args, training_options = parser.parse_known_args(argv)
    parts = measure_parts(parse_training_options(training_options))
    total = sum(part["ms_per_step"] for part in parts.values())
    lines = [["part of a step", "ms each", "ms per step", "share"]]
    for name, part in parts.items():
        share = part["ms_per_step"] / total
        lines.append([name, f"{part['ms_each']:,.3f}", f"{part['ms_per_step']:,.3f}", f"{share:.2%}"])
    print(markdown(lines))
    if args.json:
        write_json(args.json, {"parts": parts})


if __name__ == "__main__":
    main()
