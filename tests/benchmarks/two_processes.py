"""Two processes that train together, and two that train alone, each pinned to a core."""

import contextlib
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scaling import Cluster, Job, Link, Prediction, predict, size

from vae_scale.benchmark.measuring import Row, alternate, machine, markdown, table, write_report
from vae_scale.config.options import Config
from vae_scale.errors import UserError

SECONDS = 3.0  # of a run
MIN_STEPS = 4  # of a run
WORKER = [str(Path(__file__).with_name("pinned_worker.py"))]
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--num_processes=2", "--main_process_port=0"]
LAUNCH += ["--mixed_precision=no", "--dynamo_backend=no"]
ALONE, TOGETHER = "two processes, each alone", "two processes together"
CLOSING = 30  # seconds until a process that does not end is ended


@dataclass
class Report:
    """Efficiency of two processes.

    Attributes:
        rows: Images per second of both processes.
        ratios: `two_process_efficiency`, together over alone, the median of neighbouring runs; `predicted_efficiency`.
        job: Of each process, as measured while it was alone.
        link: Between the two, as measured.
        predicted: What follows from these for the two together.
        steps: Of a run.
    """

    rows: list[Row]
    ratios: dict[str, float]
    job: Job
    link: Link
    predicted: Prediction
    steps: int


def measure(words: Sequence[str], batch: int, gradient_bytes: int, repeats: int) -> Report:
    """Measures the training of `words` on two cores, as two processes share its batches and as each would go on by itself.

    All four processes are there from the start and run in turn, so that a busy machine slows all alike.

    Args:
        words: Options of the training.
        batch: Images of a batch of the two together.
        gradient_bytes: That they exchange in a step.
        repeats: Runs of each.

    Raises:
        UserError: there are no two cores, the batch cannot be halved, or a process could not train.
    """
    cores = sorted(os.sched_getaffinity(0))[:2] if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        raise UserError("scaling.py measures on two cores, on Linux; with --step-ms or --tflops it only computes")
    if batch % 2:
        raise UserError(f"train.batch_size is {batch}; two processes share it, so it must be even")
    both = ",".join(map(str, cores))
    with socket.create_server(("localhost", 0)) as server, contextlib.ExitStack() as stack:
        end = [*words, "--track.tracker=none"]
        port = str(server.getsockname()[1])
        lonely = [[sys.executable, *WORKER, port, str(core), *end, f"--train.batch_size={batch // 2}"] for core in cores]
        alone = stack.enter_context(_Group(server, lonely))
        together = stack.enter_context(_Group(server, [[sys.executable, *LAUNCH, *WORKER, port, both, *end]]))
        return _measure(alone, together, batch, gradient_bytes, repeats)


def _measure(alone: "_Group", together: "_Group", batch: int, gradient_bytes: int, repeats: int) -> Report:
    for group in (alone, together):
        group.call("advance", MIN_STEPS)  # the first steps are slow
    usual = statistics.median(alone.call("advance", MIN_STEPS)[0])
    steps = max(MIN_STEPS, math.ceil(SECONDS / usual))
    times: list[float] = []

    def apart() -> float:
        durations = alone.call("advance", steps)
        times.extend(seconds for each in durations for seconds in each)
        return sum(steps * batch / 2 / sum(each) for each in durations)

    def joined() -> float:
        return steps * batch / max(map(sum, together.call("advance", steps)))

    rows = alternate({ALONE: apart, TOGETHER: joined}, repeats, "measuring")
    nothing, whole = (statistics.median(together.call("exchange", size)[0]) for size in (4, gradient_bytes))
    # Two processes exchange in 2 messages, half of the bytes in each.
    link = Link(gradient_bytes / max(whole - nothing, 1e-9), nothing / 2)
    few, many = (statistics.median(alone.call("draw", images)[0]) for images in (batch // 2, batch))
    mean = statistics.mean(times)
    drawing = max(0.0, many - few) / (batch // 2)
    job = Job(mean, batch // 2, gradient_bytes, draw_seconds=drawing, deviation=statistics.stdev(times) / mean)
    # The cores that compute also copy, so nothing is hidden.
    predicted = predict(2, job, Cluster(2, link, link, overlap=0.0))
    neighbours = zip(rows[TOGETHER].runs, rows[ALONE].runs, strict=True)
    measured = statistics.median(one / other for one, other in neighbours)
    ratios = {"two_process_efficiency": measured, "predicted_efficiency": predicted.efficiency}
    return Report(list(rows.values()), ratios, job, link, predicted, steps)


class _Group:
    """Two processes that do the same at the same time, until the block ends.

    Args:
        server: Where they answer.
        commands: That start them.
    """

    def __init__(self, server: socket.socket, commands: list[list[str]]) -> None:
        self._server, self._commands = server, commands
        self._end = contextlib.ExitStack()

    def __enter__(self) -> "_Group":
        with contextlib.ExitStack() as stack:
            self._log = stack.enter_context(tempfile.TemporaryFile("w+"))
            # On the machine's cores, not on its GPUs, and each without helpers.
            environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
            # Each in a session of its own, as the launcher's are: on a busy machine Linux shares cores out between sessions.
            self._processes = [
                subprocess.Popen(command, env=environment, stdout=self._log, stderr=self._log, start_new_session=True)
                for command in self._commands
            ]
            for process in self._processes:
                stack.callback(_wait, process)
            self._lines = []
            for _ in range(2):
                connection = stack.enter_context(self._accept())
                self._lines.append(stack.enter_context(connection.makefile("rw")))
            self._end = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.close()

    def _accept(self) -> socket.socket:
        self._server.settimeout(0.5)
        while True:
            try:
                connection, _ = self._server.accept()
            except TimeoutError:
                if any(process.poll() is not None for process in self._processes):
                    raise UserError(f"a process ended: {self._error_message()}") from None
            else:
                connection.settimeout(None)
                return connection

    def call(self, verb: str, count: int) -> list[list[float]]:
        """Has both do something, and returns the seconds that each answers with. See `pinned`."""
        try:
            for lines in self._lines:
                print(verb, count, file=lines, flush=True)
            return [json.loads(lines.readline()) for lines in self._lines]
        except (ConnectionError, json.JSONDecodeError):
            raise UserError(f"a process ended: {self._error_message()}") from None

    def _error_message(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        message = next((line for line in lines if line.startswith("error:")), lines[-1] if lines else "no output")
        return message.removeprefix("error: ")


def _wait(process: "subprocess.Popen[bytes]") -> None:
    """Waits for a process, which ends when its connection does."""
    try:
        process.wait(CLOSING)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()


def run(config: Config, training_options: Sequence[str], repeats: int, path: Path | None) -> None:
    """Measures and prints the efficiency of two processes."""
    report = measure(training_options, config.train.global_batch_size, size(config).gradient_bytes, repeats)
    job, predicted = report.job, report.predicted
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"{job.images} images per step and process; {report.steps} steps per run\n")
    print(table(report.rows))
    print()
    print(markdown([["ratio", ""], *([name, f"{ratio:.3f}"] for name, ratio in report.ratios.items())]))
    print(f"\na step alone takes {1e3 * job.step_seconds:,.1f} ms, with a deviation of {job.deviation:.1%}; ", end="")
    print(f"{job.gradient_bytes / 2**20:,.1f} MiB of gradients at {report.link.bytes_per_second / 1e9:,.2f} GB/s, ", end="")
    print(f"latency {1e6 * report.link.seconds:,.0f} us")
    lost = ", ".join(f"{1e3 * seconds:,.1f} ms ({name})" for name, seconds in predicted.lost.items())
    print(f"predicted overhead of a step of both: {lost}")
    write_report(path, report)
