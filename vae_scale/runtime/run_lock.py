"""Exclusive access to a run's folder, and a check of options that cannot change on resume."""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from filelock import FileLock, Timeout

from vae_scale.errors import UserError

DATA_ORDER_OPTIONS = ("train", "shuffle_window", "streams")
FLOW_OPTIONS = ("width", "depth", "clusters")


def acquire_run_lock(folder: Path, is_main: bool, device: torch.device) -> FileLock:
    """Locks a run's folder, which is created if necessary. Rank 0 holds the lock for all ranks. All ranks must call it.

    Raises:
        UserError: if another run holds the lock.
    """
    lock, acquired = FileLock(folder / ".lock"), True
    if is_main:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            acquired = False
    if not int(broadcast(torch.tensor(int(acquired), device=device))):
        raise UserError(f"{folder}: is being trained by another process; stop it or choose another --run")
    return lock


def diff_config(saved: dict[str, Any], current: dict[str, Any], folder: Path) -> list[str]:
    """Returns the differences between a checkpoint's configuration and the current one, as `key old -> new`.

    Raises:
        UserError: if an option that cannot change differs.
    """
    fixed = {"seed"} | {f"model.{name}" for name in current["model"]} | {f"data.{name}" for name in DATA_ORDER_OPTIONS}
    if current["prior"]["vae"] is not None:
        fixed |= {f"prior.{name}" for name in FLOW_OPTIONS}
    if (saved["prior"]["vae"] is None) != (current["prior"]["vae"] is None):
        fixed.add("prior.vae")
    old, new = _flatten(saved), _flatten(current)
    # An option added by a newer version has no old value.
    changed = sorted(name for name, value in new.items() if old.get(name, value) != value)
    if conflicts := [name for name in changed if name in fixed]:
        raise UserError(f"{folder}: was trained with another {', '.join(conflicts)}; choose another --run")
    return [f"{name} {old[name]} -> {new[name]}" for name in changed if name != "run"]


def _flatten(config: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in config.items():
        values |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return values
