"""Measures data-parallel training of two processes against two independent ones, each pinned to a core."""

import contextlib
import itertools
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from scaling import Cluster, Job, Link, Prediction, predict, size

from vae_scale.benchmark import training
from vae_scale.benchmark.measuring import Report, alternate, print_report
from vae_scale.config.options import Config
from vae_scale.errors import UserError

WORKER = [str(Path(__file__).with_name("pinned_worker.py"))]
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--num_processes=2", "--main_process_port=0"]
LAUNCH += ["--mixed_precision=no", "--dynamo_backend=no"]
ALONE, TOGETHER = "two processes, each alone", "two processes together"
EXIT_TIMEOUT = 30  # seconds before a process that does not exit is terminated


@dataclass(frozen=True)
class Measurement:
    """What was measured on two processes, and the prediction from it.

    Attributes:
        report: Images per second of both; `two_process_efficiency`, the median ratio of consecutive runs together and alone;
            `predicted_efficiency`.
        job: Measurements of the independent processes.
        link: Measured latency and bandwidth of all-reduce.
        predicted: Prediction for two processes from `job` and `link`.
    """

    report: Report
    job: Job
    link: Link
    predicted: Prediction


def measure(options: Sequence[str], batch: int, gradient_bytes: int, repeats: int) -> Measurement:
    """Measures training on two cores, by two data-parallel processes and by two independent ones.

    All four processes are started first and then measured alternately, so that other load affects both equally.

    Args:
        options: Training options.
        batch: Global batch size of the two processes.
        gradient_bytes: Bytes of gradients all-reduced per step.
        repeats: Runs of each pair.

    Raises:
        UserError: fewer than two cores are available, the batch size is odd, or a process fails.
    """
    cores = sorted(os.sched_getaffinity(0))[:2] if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        raise UserError("scaling.py measures on two cores, on Linux; with --step-ms or --tflops it only computes")
    if batch % 2:
        raise UserError(f"train.batch_size is {batch}; two processes share it, so it must be even")
    with socket.create_server(("localhost", 0)) as server, contextlib.ExitStack() as stack:
        options = [*options, "--track.tracker=none"]
        port = str(server.getsockname()[1])
        commands = [[sys.executable, *WORKER, port, str(core), *options, f"--train.batch_size={batch // 2}"] for core in cores]
        alone = stack.enter_context(_Group(server, commands))
        launch = [sys.executable, *LAUNCH, *WORKER, port, ",".join(map(str, cores)), *options]
        together = stack.enter_context(_Group(server, [launch]))
        return _measure(alone, together, batch, gradient_bytes, repeats)


def _measure(alone: "_Group", together: "_Group", batch: int, gradient_bytes: int, repeats: int) -> Measurement:
    for group in (alone, together):
        group.call("advance", training.MIN_STEPS)  # the first steps are slow
    step_seconds = statistics.median(alone.call("advance", training.MIN_STEPS)[0])
    steps = max(training.MIN_STEPS, math.ceil(training.SECONDS / step_seconds))
    durations: list[float] = []

    def run_alone() -> float:
        per_process = alone.call("advance", steps)
        durations.extend(itertools.chain(*per_process))
        return sum(steps * batch / 2 / sum(seconds) for seconds in per_process)

    def run_together() -> float:
        return steps * batch / max(map(sum, together.call("advance", steps)))

    speeds = alternate({ALONE: run_alone, TOGETHER: run_together}, repeats)
    latency, total = (statistics.median(together.call("exchange", size)[0]) for size in (4, gradient_bytes))
    # All-reduce of two processes sends 2 messages of half the bytes each.
    link = Link(gradient_bytes / max(total - latency, 1e-9), latency / 2)
    half_draw, full_draw = (statistics.median(alone.call("draw", images)[0]) for images in (batch // 2, batch))
    mean = statistics.mean(durations)
    draw_seconds = max(0.0, full_draw - half_draw) / (batch // 2)
    job = Job(mean, batch // 2, gradient_bytes, draw_seconds, deviation=statistics.stdev(durations) / mean)
    # On CPUs, communication and computation use the same cores, so they do not overlap.
    predicted = predict(2, job, Cluster(2, link, link, overlap=0.0))
    measured = statistics.median(a / b for a, b in zip(speeds[TOGETHER], speeds[ALONE], strict=True))
    ratios = {"two_process_efficiency": measured, "predicted_efficiency": predicted.efficiency}
    return Measurement(Report({"batch": batch, "steps": steps}, speeds, ratios), job, link, predicted)


class _Group:
    """Context manager of two worker processes that execute the same requests at the same time.

    Args:
        server: Socket to which the workers connect.
        commands: Command lines that start the workers.
    """

    def __init__(self, server: socket.socket, commands: list[list[str]]) -> None:
        self._server, self._commands = server, commands
        self._end = contextlib.ExitStack()

    def __enter__(self) -> "_Group":
        with contextlib.ExitStack() as stack:
            self._log = stack.enter_context(tempfile.TemporaryFile("w+"))
            # Train on the CPU, with one thread per process.
            environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
            # Linux schedules sessions fairly (autogroup), so each process gets its own session, as with the launcher.
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

    def call(self, command: str, count: int) -> list[list[float]]:
        """Sends a request of `pinned_worker` to both processes and returns the durations from each."""
        try:
            for lines in self._lines:
                print(command, count, file=lines, flush=True)
            return [json.loads(lines.readline()) for lines in self._lines]
        except (ConnectionError, json.JSONDecodeError):
            raise UserError(f"a process ended: {self._error_message()}") from None

    def _error_message(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        message = next((line for line in lines if line.startswith("error:")), lines[-1] if lines else "no output")
        return message.removeprefix("error: ")


def _wait(process: "subprocess.Popen[bytes]") -> None:
    """Waits for a process, which exits when its connection is closed."""
    try:
        process.wait(EXIT_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()


def run(config: Config, training_options: Sequence[str], repeats: int, path: Path | None) -> None:
    """Measures and prints the efficiency of two processes."""
    measured = measure(training_options, config.train.global_batch_size, size(config).gradient_bytes, repeats)
    job, link, predicted = measured.job, measured.link, measured.predicted
    print_report(measured.report, path, job=asdict(job), link=asdict(link), predicted=asdict(predicted))
    print(f"\na step alone takes {1e3 * job.step_seconds:,.1f} ms, with a deviation of {job.deviation:.1%}; ", end="")
    print(f"{job.gradient_bytes / 2**20:,.1f} MiB of gradients at {link.bytes_per_second / 1e9:,.2f} GB/s, ", end="")
    print(f"latency {1e6 * link.seconds:,.0f} us")
    lost = ", ".join(f"{1e3 * seconds:,.1f} ms ({name})" for name, seconds in predicted.lost.items())
    print(f"predicted overhead of a step of both: {lost}")
