"""Hosts, as far as Linux makes them: each with a network, a name, an /etc/hosts and processes of its own."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NEEDED = ("unshare", "nsenter", "setpriv", "ip", "mount", "hostname")
WITH_US = ("setpriv", "--pdeathsig=KILL")  # a program started so ends when these tests do, however they end


def missing() -> str | None:
    """Why hosts cannot be made here; None where they can."""
    if lacking := [tool for tool in NEEDED if not shutil.which(tool)]:
        return f"hosts need {', '.join(lacking)}"
    if os.geteuid() != 0:
        return "hosts need root"
    trial = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "ip", "link", "set", "lo", "up"]
    ran = subprocess.run(trial, capture_output=True, text=True)
    return f"hosts need namespaces: {ran.stderr.strip()}" if ran.returncode else None


class Host:
    """A host whose name and network last until `close`, whatever runs on it.

    Args:
        name: Its name, which resolves to a loopback address, as on Debian.
        folder: Where its files go.
        names: Further lines of its /etc/hosts.
    """

    def __init__(self, name: str, folder: Path, names: str = "") -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{names}")
        script = (
            f"mount --bind {folder}/hosts /etc/hosts && hostname {name} && ip link set lo up && echo up && exec sleep infinity"
        )
        holding = [*WITH_US, "unshare", "--net", "--uts", "--mount", "sh", "-c", script]
        self._holder = subprocess.Popen(holding, stdout=subprocess.PIPE, text=True)
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "up\n"
        self._programs: list[subprocess.Popen[bytes]] = []

    @property
    def pid(self) -> int:
        """A process in its network."""
        return self._holder.pid

    @property
    def within(self) -> list[str]:
        """What comes before a program's name to run it on this host."""
        return ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount"]

    def run(self, *words: str) -> str:
        """Runs a program to its end and returns what it printed."""
        return subprocess.run([*self.within, *words], check=True, capture_output=True, text=True).stdout

    def start(self, words: list[str], environment: dict[str, str], told: Path) -> "subprocess.Popen[bytes]":
        """Starts a program that takes all of its processes with it when it is killed; what it prints is added to `told`."""
        alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with told.open("ab") as file:
            program = subprocess.Popen([*WITH_US, *self.within, *alone, *words], env=environment, stdout=file, stderr=file)
        self._programs.append(program)
        return program

    def close(self) -> None:
        for process in [*self._programs, self._holder]:
            process.kill()
            process.wait()


def wait_for(condition: Callable[[], object], seconds: float, told: Callable[[], str] = str) -> None:
    """Waits until a condition holds; fails with what was told where it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, told()
        time.sleep(0.1)
