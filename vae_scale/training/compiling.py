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
from torch._dynamo.callback import callback_handler
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

FOLDER = "TORCHINDUCTOR_CACHE_DIR"
PATIENCE = 3.0  # seconds of compiling of which nothing is told
INTERVAL = 1.0  # seconds from one telling to the next

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """A function or module under torch.compile. Where torch compiled the same before, in any process, it takes that."""
    keep()
    return torch.compile(function)


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

    Code for a CPU is made for all that it can do, which torch does not look at when it takes code from the folder; a home may
    be shared by machines of several kinds.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "vae_scale" / "compiled" / hashlib.sha256(_instructions().encode()).hexdigest()[:8]


def _instructions() -> str:
    """What the CPU can do, as far as the system tells."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


@contextlib.contextmanager
def shown(tell: Callable[[str], object]) -> Iterator[None]:
    """Within it, compiling that takes more than a moment is told, by a thread: "compiling: 35 s", a second later anew.

    The seconds are those of all compiling within it so far: networks are compiled in several parts, the way back by itself.
    """
    watch = _Watch(tell)
    callback_handler.register_start_callback(watch.begin)
    callback_handler.register_end_callback(watch.end)
    try:
        yield
    finally:
        callback_handler.remove_start_callback(watch.begin)
        callback_handler.remove_end_callback(watch.end)


class _Watch:
    """Tells how long compiling has taken, while it is under way."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        self.tell, self.before = tell, 0.0
        self.told = False

    def begin(self, *_: object) -> None:
        """Compiling begins."""
        self.began, self.ended = time.perf_counter(), threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def end(self, *_: object) -> None:
        """Compiling has ended."""
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
