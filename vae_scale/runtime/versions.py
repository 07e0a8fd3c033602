"""Versions of the code that a run was trained with."""

import subprocess
from importlib.metadata import version
from pathlib import Path

from vae_scale import __version__


def get_versions() -> dict[str, str]:
    """Returns the versions of vae_scale and torch and, in a Git checkout, the commit, with `-changed` if it was modified."""
    versions = {"vae_scale": __version__, "torch": version("torch")}
    if commit := _git("rev-parse", "HEAD"):
        versions["commit"] = commit + ("-changed" if _git("status", "--porcelain", "--untracked-files=no") else "")
    return versions


def _git(*arguments: str) -> str:
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():  # an installed package may lie inside another project's repository
        return ""
    try:
        return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
