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

TIMES = 15  # of an exchange or a draw


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Answers lines with lines, until there are no more.

    A line names what to do and how often or how much, and is answered with a list of seconds: `advance` takes so many steps,
    `exchange` sums so many bytes over the processes, some times, `draw` draws the random numbers of so many images, some times.

    Args:
        argv: The port to answer to, the cores of all processes that train together, and the options of the training.
    """
    port, cores, *words = sys.argv[1:] if argv is None else argv
    # First of all, so that all threads that are started later stay there too.
    os.sched_setaffinity(0, {int(cores.split(",")[int(os.environ.get("LOCAL_RANK", 0))])})
    from vae_scale.benchmark.training import open_trainer
    from vae_scale.config.parsing import parse

    with open_trainer(parse(words)[0]) as subject, socket.create_connection(("localhost", int(port))) as connection:
        verbs = {"advance": _advance, "exchange": _exchange, "draw": _draw}
        with connection.makefile("rw") as lines:
            for line in lines:
                verb, count = line.split()
                print(json.dumps(verbs[verb](subject, int(count))), file=lines, flush=True)


def _advance(subject: "MeasuredTrainer", steps: int) -> list[float]:
    subject.trainer.start_interval()
    return _timed(subject.advance, steps)


def _exchange(subject: "MeasuredTrainer", size: int) -> list[float]:
    import torch

    gradients = torch.zeros(size // 4)
    return _timed(lambda: torch.distributed.all_reduce(gradients), TIMES)


def _draw(subject: "MeasuredTrainer", images: int) -> list[float]:
    return _timed(lambda: subject.trainer.stage.random_inputs(0, images), TIMES)


def _timed(work: Callable[[], object], times: int) -> list[float]:
    durations = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        durations.append(time.perf_counter() - begin)
    return durations


if __name__ == "__main__":
    main()
