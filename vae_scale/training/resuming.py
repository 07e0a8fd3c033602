"""Going on with a run: alone in its folder, and with what may change and what cannot."""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from filelock import FileLock, Timeout

from vae_scale.errors import UserError

ORDER = ("train", "window", "streams")  # options of data that decide the order of images
FLOW = ("width", "depth", "patch")  # options of prior that describe the network
NOT_TOLD = "run"  # which is only a name


def locked(folder: Path, main: bool, device: torch.device) -> FileLock:
    """Keeps other runs out of a run's folder, until this process ends. All processes must call it.

    Args:
        folder: Made, if it is not there.
        main: Whether this is rank 0, which holds the lock for all.
        device: Where processes talk to each other.

    Raises:
        UserError: another run is in it.
    """
    lock, mine = FileLock(folder / ".lock"), True
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            mine = False
    if not int(broadcast(torch.tensor(int(mine), device=device))):
        raise UserError(f"{folder}: is being trained by another process; stop that one, or choose another --run")
    return lock


def changes(was: dict[str, Any], now: dict[str, Any], folder: Path) -> list[str]:
    """What differs between a checkpoint's configuration and that of the run that goes on with it: `key old -> new`.

    Raises:
        UserError: something that cannot change does, naming it.
    """
    fixed = {f"model.{name}" for name in now["model"]} | {f"data.{name}" for name in ORDER} | {"seed"}
    if now["prior"]["vae"] is not None:
        fixed |= {f"prior.{name}" for name in FLOW}
    old, new = _flat(was), _flat(now)
    # An option that came with a newer version has no old value.
    different = sorted(name for name, value in new.items() if old.get(name, value) != value)
    if (was["prior"]["vae"] is None) != (now["prior"]["vae"] is None):
        fixed.add("prior.vae")
    if clash := [name for name in different if name in fixed]:
        raise UserError(f"{folder}: was trained with another {', '.join(clash)}; choose another --run")
    return [f"{name} {old[name]} -> {new[name]}" for name in different if name != NOT_TOLD]


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in config.items():
        values |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return values
