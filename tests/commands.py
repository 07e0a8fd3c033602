"""Runs commands in this process."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from vae_scale.pack import main


def pack(*options: object) -> None:
    """Runs `vae_scale.pack`."""
    main([str(option) for option in options])


def error_line(capsys: pytest.CaptureFixture[str], command: Callable[..., None], *options: object) -> str:
    """Runs a command that must fail and returns its one-line error message."""
    with pytest.raises(SystemExit) as caught:
        command([str(option) for option in options])
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


def hash_files(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file of a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}
