"""torch.compile: what it made is kept for later runs, and while it works this is shown."""

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

FOLDER = "TORCHINDUCTOR_CACHE_DIR"
PATIENCE = 3.0  # seconds of compiling of which nothing is told
INTERVAL = 1.0  # seconds from one telling to the next

# Graphs of one function. FSDP2's hooks divide a network at every block, and all blocks of a class share a function; beyond the
# limit torch would go on without compiling.
MAX_GRAPHS = 1024

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R], cuda_graphs: bool = False) -> Callable[P, R]:
    """A function or module under torch.compile. Where torch compiled the same before, in any process, it takes that.

    Args:
        function: Called with tensors of constant shapes: for each other shape it is compiled again.
        cuda_graphs: Whether a GPU replays its kernels as CUDA graphs. What it returns is then valid until the next call of
            `torch.compiler.cudagraph_mark_step_begin`.
    """
    keep()
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    torch._dynamo.config.accumulated_recompile_limit = 4 * MAX_GRAPHS
    return torch.compile(function, dynamic=False, mode="reduce-overhead" if cuda_graphs else "default")


def compile_module(module: nn.Module) -> None:
    """Compiles a module where it is, for calls with tensors of constant shapes."""
    keep()
    module.compile(dynamic=False)


def keep() -> None:
    """From now on what torch compiles is kept in `folder()`, unless TORCHINDUCTOR_CACHE_DIR names another place.

    torch by itself keeps it among temporary files, where it does not last; and so does this where the home cannot be written.
    """
    if os.environ.get(FOLDER, default_cache_dir()) != default_cache_dir():  # to which torch sets it as it is imported
        return
    with contextlib.suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        os.environ[FOLDER] = str(folder())


def folder() -> Path:
    """$XDG_CACHE_HOME/vae_scale/compiled or ~/.cache/vae_scale/compiled, and in it one folder for each kind of CPU.

    Code for a CPU is made for all that it can do, or may do (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA), which torch does not
    look at when it takes code from the folder; made for another kind, it gives wrong numbers. A home may be shared by machines
    of several kinds.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "vae_scale" / "compiled" / hashlib.sha256(_instructions().encode()).hexdigest()[:8]


def _instructions() -> str:
    """What the CPU can do, as far as the system tells, and what torch and oneDNN may use of it."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.is_file() else []
    able = next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    return f"{able} {torch.backends.cpu.get_cpu_capability()} {os.environ.get('ONEDNN_MAX_CPU_ISA', '')}"


@contextlib.contextmanager
def shown(tell: Callable[[str], object], under_way: Callable[[bool], object] = lambda compiling: None) -> Iterator[None]:
    """Within it, compiling that takes more than a moment is told, by a thread: "compiling: 35 s", a second later anew.

    The seconds are those of all compiling within it so far: networks are compiled in several parts, the way back by itself.

    Args:
        tell: Takes these texts.
        under_way: Called with True when compiling begins and with False when it has ended.
    """
    watch = _Watch(tell, under_way)
    callback_handler.register_start_callback(watch.begin)
    callback_handler.register_end_callback(watch.end)
    try:
        yield
    finally:
        callback_handler.remove_start_callback(watch.begin)
        callback_handler.remove_end_callback(watch.end)


class _Watch:
    """Tells how long compiling has taken, while it is under way."""

    def __init__(self, tell: Callable[[str], object], under_way: Callable[[bool], object]) -> None:
        self.tell, self.under_way, self.before = tell, under_way, 0.0
        self.told = False

    def begin(self, *_: object) -> None:
        """Compiling begins."""
        self.under_way(True)
        self.began, self.ended = time.perf_counter(), threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def end(self, *_: object) -> None:
        """Compiling has ended."""
        self.under_way(False)
        self.ended.set()
        self.thread.join()
        self.before = self._seconds()
        if self.told:
            self.tell(f"compiled in {self.before:.0f} s")
        self.told = False

    def _seconds(self) -> float:
        return self.before + time.perf_counter() - self.began

    def _follow(self) -> None:
        while not self.ended.wait(INTERVAL):
            if self._seconds() > PATIENCE:
                self.told = True
                self.tell(f"compiling: {self._seconds():.0f} s")
