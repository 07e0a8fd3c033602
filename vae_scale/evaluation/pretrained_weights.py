"""Third-party networks and their weights, which are verified by SHA-256 before they are loaded."""

import importlib
from pathlib import Path
from typing import Any

from vae_scale.errors import UserError
from vae_scale.files import sha256_of


def import_optional(package: str) -> Any:
    """Imports a package of the extra `eval`. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f'{package} cannot be imported ({error}); pip install "vae_scale[eval]"') from None


def verify_sha256(path: Path, sha256: str) -> str:
    """Returns `path` as a string if the file has this SHA-256.

    The libraries that load these files unpickle them, which can execute code.

    Raises UserError if the file is missing or different.
    """
    try:
        actual = sha256_of(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the file of the weights") from None
    if actual != sha256:
        raise UserError(f"{path}: its SHA-256 starts with {actual[:8]}, expected {sha256[:8]}; download it again")
    return str(path)
