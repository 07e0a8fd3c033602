"""What a run may change when it goes on, and what it cannot."""

from pathlib import Path
from typing import Any

from vae_scale.errors import UserError

ORDER = ("train", "window", "streams")  # options of data that decide the order of images
FLOW = ("width", "depth", "patch")  # options of prior that describe the network
NOT_TOLD = "run"  # which is only a name


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
