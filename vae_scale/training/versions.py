"""Which code a run was trained with."""

import subprocess
from importlib.metadata import version
from pathlib import Path

from vae_scale import __version__


def versions() -> dict[str, str]:
    """Of vae_scale and torch; and the commit, where vae_scale is run from a clone of its repository: ...-changed if it was."""
    found = {"vae_scale": __version__, "torch": version("torch")}
    if commit := _git("rev-parse", "HEAD"):
        changed = "-changed" if _git("status", "--porcelain", "--untracked-files=no") else ""
        found["commit"] = commit + changed
    return found


def _git(*words: str) -> str:
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():  # an installed package may lie within somebody else's repository
        return ""
    try:
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
