"""A training process pinned to a core, which runs the steps that `two_processes.py` requests through a socket."""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vae_scale.errors import cli_main

if TYPE_CHECKING:
    from vae_scale.benchmark.training import MeasuredTrainer

REPEATS = 15  # of an all-reduce, and of drawing random inputs


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Executes requests of the form `COMMAND COUNT` and replies to each with a JSON list of durations in seconds.

    `advance` runs COUNT training steps. `exchange` all-reduces COUNT bytes, `REPEATS` times. `draw` draws the random inputs of
    COUNT images, `REPEATS` times.

    Args:
        argv: Port of the server, comma-separated cores indexed by local rank, and training options. Defaults to `sys.argv[1:]`.
    """
    port, cores, *options = sys.argv[1:] if argv is None else argv
    # Set before threads are started, since they inherit the affinity.
    os.sched_setaffinity(0, {int(cores.split(",")[int(os.environ.get("LOCAL_RANK", 0))])})
    from vae_scale.benchmark.training import open_trainer
    from vae_scale.config.parsing import parse

    with open_trainer(parse(options)[0]) as measured, socket.create_connection(("localhost", int(port))) as connection:
        commands = {"advance": _advance, "exchange": _all_reduce, "draw": _draw_random_inputs}
        with connection.makefile("rw") as lines:
            for line in lines:
                command, count = line.split()
                print(json.dumps(commands[command](measured, int(count))), file=lines, flush=True)


def _advance(measured: "MeasuredTrainer", steps: int) -> list[float]:
    measured.trainer.start_interval()
    return _measure_durations(measured.advance, steps)


def _all_reduce(measured: "MeasuredTrainer", num_bytes: int) -> list[float]:
    import torch

    gradients = torch.zeros(num_bytes // 4)
    return _measure_durations(lambda: torch.distributed.all_reduce(gradients), REPEATS)


def _draw_random_inputs(measured: "MeasuredTrainer", images: int) -> list[float]:
    return _measure_durations(lambda: measured.trainer.stage.random_inputs(0, images), REPEATS)


def _measure_durations(function: Callable[[], object], repeats: int) -> list[float]:
    durations = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        durations.append(time.perf_counter() - begin)
    return durations


if __name__ == "__main__":
    main()
