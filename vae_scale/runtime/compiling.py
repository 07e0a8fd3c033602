"""torch.compile with a persistent cache and progress reports."""

import contextlib
import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import nn
from torch._dynamo.callback import callback_handler
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

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
    """Reports compilations within the context: "compiling", then "compiled in 35 s".

    The time accumulates over all compilations in the context, because a network is compiled in several parts. `on_compiling` is
    called with True when a compilation begins and with False when it ends.
    """
    start_time = total_seconds = 0.0

    def begin(*_: object) -> None:
        nonlocal start_time
        start_time = time.perf_counter()
        on_compiling(True)
        report("compiling")

    def end(*_: object) -> None:
        nonlocal total_seconds
        total_seconds += time.perf_counter() - start_time
        on_compiling(False)
        report(f"compiled in {total_seconds:.0f} s")

    callback_handler.register_start_callback(begin)
    callback_handler.register_end_callback(end)
    try:
        yield
    finally:
        callback_handler.remove_start_callback(begin)
        callback_handler.remove_end_callback(end)
