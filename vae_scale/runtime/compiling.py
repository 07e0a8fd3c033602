"""torch.compile with a persistent cache and progress reports."""

import contextlib
import hashlib
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import nn
from torch._dynamo.callback import callback_handler
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
REPORT_AFTER, REPORT_INTERVAL = 3.0, 1.0  # seconds

# Per function. FSDP2's hooks break the graph at every block, and all blocks of a class share one function. Beyond this limit,
# torch silently falls back to eager mode.
MAX_GRAPHS = 1024

P = ParamSpec("P")
R = TypeVar("R")


def compile_function(function: Callable[P, R], cuda_graphs: bool = False) -> Callable[P, R]:
    """Compiles a function or module for inputs of static shapes. Other shapes cause a recompilation.

    With `cuda_graphs`, outputs are valid until the next call of `torch.compiler.cudagraph_mark_step_begin`.
    """
    enable_persistent_cache()
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    torch._dynamo.config.accumulated_recompile_limit = 4 * MAX_GRAPHS
    return torch.compile(function, dynamic=False, mode="reduce-overhead" if cuda_graphs else "default")


def compile_module(module: nn.Module) -> None:
    """Compiles a module in place for inputs of static shapes."""
    enable_persistent_cache()
    module.compile(dynamic=False)


def enable_persistent_cache() -> None:
    """Stores compiled code in `cache_folder()` instead of a temporary folder, unless TORCHINDUCTOR_CACHE_DIR is set.

    If the folder cannot be created, the temporary folder is used.
    """
    if os.environ.get(CACHE_VARIABLE, default_cache_dir()) == default_cache_dir():  # torch sets it on import
        with contextlib.suppress(OSError):
            cache_folder().mkdir(parents=True, exist_ok=True)
            os.environ[CACHE_VARIABLE] = str(cache_folder())


def cache_folder() -> Path:
    """Returns $XDG_CACHE_HOME/vae_scale/compiled/HASH, by default in ~/.cache, where HASH identifies the CPU's instruction set.

    torch does not check the instruction set of cached CPU code, which gives wrong results on another CPU if the home folder is
    shared. ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA restrict the instruction set.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    target = f"{flags} {torch.backends.cpu.get_cpu_capability()} {os.environ.get('ONEDNN_MAX_CPU_ISA', '')}"
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "vae_scale" / "compiled" / hashlib.sha256(target.encode()).hexdigest()[:8]


@contextlib.contextmanager
def report_compilation(
    report: Callable[[str], object], on_compiling: Callable[[bool], object] = lambda active: None
) -> Iterator[None]:
    """Reports long compilations within the context, once per second: "compiling: 35 s".

    The time accumulates over all compilations in the context, because a network is compiled in several parts. `report` is
    called from a thread, `on_compiling` with True when a compilation begins and with False when it ends.
    """
    reporter = _CompilationReporter(report, on_compiling)
    callback_handler.register_start_callback(reporter.begin)
    callback_handler.register_end_callback(reporter.end)
    try:
        yield
    finally:
        callback_handler.remove_start_callback(reporter.begin)
        callback_handler.remove_end_callback(reporter.end)


class _CompilationReporter:
    def __init__(self, report: Callable[[str], object], on_compiling: Callable[[bool], object]) -> None:
        self._report, self._on_compiling = report, on_compiling
        self._total_seconds, self._has_reported = 0.0, False

    def begin(self, *_: object) -> None:
        self._on_compiling(True)
        self._start_time, self._finished = time.perf_counter(), threading.Event()
        self._thread = threading.Thread(target=self._report_periodically, daemon=True)
        self._thread.start()

    def end(self, *_: object) -> None:
        self._on_compiling(False)
        self._finished.set()
        self._thread.join()
        self._total_seconds = self._elapsed_seconds()
        if self._has_reported:
            self._report(f"compiled in {self._total_seconds:.0f} s")
        self._has_reported = False

    def _elapsed_seconds(self) -> float:
        return self._total_seconds + time.perf_counter() - self._start_time

    def _report_periodically(self) -> None:
        while not self._finished.wait(REPORT_INTERVAL):
            if self._elapsed_seconds() > REPORT_AFTER:
                self._has_reported = True
                self._report(f"compiling: {self._elapsed_seconds():.0f} s")
