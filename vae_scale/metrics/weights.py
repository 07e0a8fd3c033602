"""Networks of others, and their weights: trusted by their sha256, and never before it was compared."""

import hashlib
import importlib
from pathlib import Path
from typing import Any

import torch

from vae_scale.errors import UserError


def needed(package: str) -> Any:
    """The module `package`, which comes with the extra `eval`.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f'{package} cannot be imported ({error}); pip install "vae_scale[eval]"') from None


def checked(path: Path, sha256: str) -> str:
    """`path` as text, once the file has turned out to be the one whose sha256 is known.

    The libraries that read such files unpickle them, and a pickle can run code.

    Raises:
        UserError: it is missing or another file.
    """
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the file of the weights") from None
    if found != sha256:
        raise UserError(
            f"{path}: its sha256 begins {found[:8]}, not {sha256[:8]}; it is damaged or another file, fetch it again"
        )
    return str(path)


def downloads() -> Path:
    """The folder into which PyTorch downloads weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"
