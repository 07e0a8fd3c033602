"""Simulated hosts: Linux namespaces with a separate network, host name, /etc/hosts and processes."""

import os
import shutil
import subprocess
from pathlib import Path

REQUIRED_TOOLS = ("unshare", "nsenter", "setpriv", "ip", "mount", "hostname")
KILL_WITH_PARENT = ("setpriv", "--pdeathsig=KILL")


def skip_reason() -> str | None:
    """Returns why hosts cannot be created here, or None."""
    if missing := [tool for tool in REQUIRED_TOOLS if not shutil.which(tool)]:
        return f"hosts need {', '.join(missing)}"
    if os.geteuid() != 0:
        return "hosts need root"
    command = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "ip", "link", "set", "lo", "up"]
    result = subprocess.run(command, capture_output=True, text=True)
    return f"hosts need namespaces: {result.stderr.strip()}" if result.returncode else None


class Host:
    """A host that exists until `close`.

    Args:
        name: Host name, which resolves to a loopback address, as on Debian.
        folder: Folder for its files.
        names: Additional lines of /etc/hosts.
    """

    def __init__(self, name: str, folder: Path, names: str = "") -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{names}")
        script = (
            f"mount --bind {folder}/hosts /etc/hosts && hostname {name} && ip link set lo up && echo up && exec sleep infinity"
        )
        command = [*KILL_WITH_PARENT, "unshare", "--net", "--uts", "--mount", "sh", "-c", script]
        self._holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "up\n"
        self._programs: list[subprocess.Popen[bytes]] = []

    @property
    def pid(self) -> int:
        """A process in the host's namespaces."""
        return self._holder.pid

    @property
    def command_prefix(self) -> list[str]:
        """The command that runs a program on this host."""
        return ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount"]

    def run(self, *command: str) -> str:
        """Runs a program and returns its output."""
        return subprocess.run([*self.command_prefix, *command], check=True, capture_output=True, text=True).stdout

    def start(self, command: list[str], environment: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
        """Starts a program whose child processes are killed with it. Its output is appended to `log`."""
        namespace = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with log.open("ab") as file:
            program = subprocess.Popen(
                [*KILL_WITH_PARENT, *self.command_prefix, *namespace, *command], env=environment, stdout=file, stderr=file
            )
        self._programs.append(program)
        return program

    def close(self) -> None:
        for process in [*self._programs, self._holder]:
            process.kill()
            process.wait()
