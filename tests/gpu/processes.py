"""Runs tasks in separate processes with time limits, so that a hang or crash does not affect other tasks."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
SETTINGS = "VAE_SCALE_GPU_KIT"  # environment variable that passes `Settings` to the tasks
GRACE = 3.0  # seconds from SIGTERM to SIGKILL
LAST_LINES = 15  # of the output of a failed task that are recorded


@dataclass(frozen=True)
class Settings:
    """Settings of all tasks.

    Attributes:
        shards: Synthetic 96x96 images, for checks and measurements.
        images: Images for the last stage.
        scratch: Temporary folder, deleted at the end.
        rehearse: Whether to use tiny sizes on a CPU.
    """

    shards: Path
    images: Path
    scratch: Path
    rehearse: bool

    @staticmethod
    def load() -> "Settings":
        """Reads the settings from the environment variable set by the parent process."""
        values = json.loads(os.environ[SETTINGS])
        return Settings(*(Path(values[name]) for name in ("shards", "images", "scratch")), values["rehearse"])

    def environment(self, threads: int) -> dict[str, str]:
        """Returns the environment variables of a task with `threads` CPU threads."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        variables = {
            SETTINGS: json.dumps(asdict(self), default=str),
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": str(threads),
            "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
            "TORCHINDUCTOR_CACHE_DIR": str(self.scratch / "inductor"),  # shared by all tasks
            "HF_HUB_OFFLINE": "1",
        }
        return os.environ | variables | ({"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""} if self.rehearse else {})


@dataclass
class Entry:
    """One result.

    Attributes:
        name: What was checked or measured.
        status: passed, measured, failed, `needs a GPU`, or `skipped: REASON`.
        detail: Summary in one line.
        values: Measured values.
        seconds: Duration.
        output: Last lines of the output of a failed task.
    """

    name: str
    status: str
    detail: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    output: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """A program and the results it writes.

    Attributes:
        names: Results that the program writes (see `serve`).
        command: Command line.
        seconds: Time limit.
        least: Minimum remaining seconds to start the task.
        writes_results: Whether the program writes results; otherwise the task passes if its exit status is 0.
    """

    names: Sequence[str]
    command: Sequence[str]
    seconds: float
    least: float = 0.0
    writes_results: bool = True


Record = Callable[[Entry], None]


class Runner:
    """Runs tasks.

    Args:
        settings: Settings of the tasks.
        log: File to which the output of all tasks is appended.
    """

    def __init__(self, settings: Settings, log: Path) -> None:
        self.settings, self.log = settings, log
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock, self._stopped = threading.Lock(), False

    def run_all(self, tasks: Sequence[Task], num_workers: int, deadline: float, record: Record) -> None:
        """Runs tasks in order, `num_workers` in parallel, until `deadline` (`time.monotonic`). Calls `record` for each."""
        threads = max(1, (os.cpu_count() or 1) // num_workers)
        with ThreadPoolExecutor(num_workers) as pool:
            try:
                list(pool.map(lambda task: self.run(task, threads, deadline, record), tasks))
            except BaseException:
                self.stop()
                raise

    def run(self, task: Task, threads: int, deadline: float, record: Record, grace: float = GRACE) -> None:
        """Runs a task. At its time limit or at `deadline` it gets SIGTERM, and SIGKILL `grace` seconds later."""
        try:
            self._run(task, threads, deadline, record, grace)
        except Exception as error:  # e.g. a full disk; other tasks still run
            for name in task.names:
                record(Entry(name, "failed", f"{type(error).__name__}: {error}"))

    def _run(self, task: Task, threads: int, deadline: float, record: Record, grace: float) -> None:
        begin, left = time.monotonic(), deadline - time.monotonic()
        if left <= task.least + grace or self._stopped:
            for name in task.names:
                record(Entry(name, "skipped: no time left"))
            return
        for name in task.names:
            entry_path(self.settings, name).unlink(missing_ok=True)
        output, limit = self.settings.scratch / f"{slug(task.names[0])}.log", min(task.seconds, left - grace)
        with output.open("wb") as file:
            process = subprocess.Popen(
                task.command, stdout=file, stderr=file, start_new_session=True, env=self.settings.environment(threads), cwd=ROOT
            )
            with self._lock:
                self._running.add(process)
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                kill(process, grace)
                reason = f"no result within {limit:.0f} s" if limit == task.seconds else ""
            else:
                reason = f"ended with exit status {process.returncode}"
            finally:
                kill(process, 0)  # remaining processes of the group
                with self._lock:
                    self._running.discard(process)
        seconds, lines = time.monotonic() - begin, output.read_text(errors="replace").splitlines()
        with self._lock, self.log.open("a") as log:
            log.write("\n".join([f"==== {', '.join(task.names)}: {seconds:.1f} s", *lines[-400:], ""]))
        for name in task.names:
            path = entry_path(self.settings, name)
            if path.exists():
                entry = Entry(**json.loads(path.read_text()))
            elif process.returncode == 0 and not task.writes_results:
                entry = Entry(name, "passed", seconds=seconds)
            elif reason:
                entry = Entry(name, "failed", reason, seconds=seconds)
            else:
                entry = Entry(name, "skipped: no time left", seconds=seconds)
            if entry.status == "failed" and (len(task.names) == 1 or not entry.output):
                entry.output = [line[:300] for line in lines[-LAST_LINES:]]  # includes the output of subprocesses
            record(entry)

    def stop(self) -> None:
        """Kills all running tasks and prevents further ones from starting."""
        self._stopped = True
        with self._lock:
            running = list(self._running)
        for process in running:
            kill(process, 0)


def kill(process: "subprocess.Popen[bytes]", grace: float) -> None:
    """Terminates a process and its descendants, also those in other sessions, with SIGKILL `grace` seconds after SIGTERM."""
    descendants: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        descendants = psutil.Process(process.pid).children(recursive=True)
    if grace and process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


def slug(name: str) -> str:
    """Converts a name to a file name."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def entry_path(settings: Settings, name: str) -> Path:
    """Returns the path of the result `name`."""
    return settings.scratch / f"{slug(name)}.result.json"


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


class NeedsGPU(Exception):
    """Raised by checks that require a GPU."""


class Skip(Exception):
    """Raised with a reason if a check or measurement is not possible."""


def serve(functions: dict[str, Callable[[Settings], tuple[str, dict[str, Any]]]], done: str) -> None:
    """Runs the functions named on the command line and writes their results.

    A function returns a summary in one line and values. Its result has the status `done`, or `failed` if it raises.
    """
    settings = Settings.load()
    for name in sys.argv[1:]:
        begin, entry = time.monotonic(), Entry(name, done)
        try:
            entry.detail, entry.values = functions[name](settings)
        except NeedsGPU:
            entry.status = "needs a GPU"
        except Skip as reason:
            entry.status = f"skipped: {reason}"
        except BaseException as error:
            traceback.print_exc()
            entry.status, entry.detail = "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            entry.output = traceback.format_exc().splitlines()[-LAST_LINES:]
        entry.seconds = time.monotonic() - begin
        write_atomically(entry_path(settings, name), json.dumps(asdict(entry)))
        reset_state()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all results are written; skips slow cleanup of libraries


def reset_state() -> None:
    """Resets Accelerate's state, compiled code and the variables of the process group between checks."""
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_FSDP"):
        os.environ.pop(name, None)
