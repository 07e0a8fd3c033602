"""Checkpoints: safetensors and JSON, complete or absent, no pickle in writing or reading.

A checkpoint is a folder `images_000012345` with `model`, `ema` and `optimizer.safetensors`, `config.json` (so that
`VAE.from_pretrained` reads it), `state.json`, and `manifest.json` with size and sha256 of the others, written last. The
folder is made under a temporary name, brought to the disk, and renamed.
"""

import hashlib
import json
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vae_scale.errors import UserError

MANIFEST, STATE, CONFIG = "manifest.json", "state.json", "config.json"
Tensors = dict[str, dict[str, Tensor]]
NAME = re.compile(r"images_\d{9,}")


def folder_of(run: Path, images_seen: int) -> Path:
    """The folder of a run's checkpoint."""
    return run / "checkpoints" / f"images_{images_seen:09d}"


def images_of(folder: Path) -> int:
    """The images seen by a checkpoint, from its name."""
    return int(folder.name.removeprefix("images_"))


def checkpoints(run: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first, damaged ones included."""
    found = [path for path in (run / "checkpoints").glob("images_*") if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(found, key=images_of)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name, entry in files.items():
            if Path(name).name != name:
                return f"{MANIFEST} names a path, {name!r}"
            path = folder / name
            size = path.stat().st_size
            if size != entry["size"]:
                return f"{name} has {size} bytes instead of {entry['size']}"
            if _sha256(path) != entry["sha256"]:
                return f"{name} does not match its sha256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error!r})"
    return None


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None. Says which ones it skips, and why."""
    for folder in reversed(checkpoints(run)):
        problem = damage(folder)
        if problem is None:
            return folder
        print(f"warning: {folder} is skipped: {problem}", flush=True)
    return None


def load(folder: Path, *names: str) -> tuple[dict[str, Any], Tensors]:
    """The state of a checkpoint, and the tensors of `names` (model, ema, optimizer).

    Raises:
        UserError: it is damaged.
    """
    try:
        state = json.loads((folder / STATE).read_text())
        return state, {name: load_file(folder / f"{name}.safetensors") for name in names}
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be read ({error}); delete it to use the one before") from None


def newest_of(run: str | Path, option: str) -> Path:
    """The newest whole checkpoint of the run that `option` names.

    Raises:
        UserError: it has none.
    """
    folder = newest(Path(run))
    if folder is None:
        raise UserError(f"{option} {run}: has no checkpoint yet; train it with python -m vae_scale.train --run {run}")
    return folder


class Writer:
    """Writes a run's checkpoints in a thread, one at a time, while training goes on."""

    def __init__(self, run: Path, keep: int) -> None:
        self._run, self._keep = run, keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, images_seen: int, tensors: Tensors, state: dict[str, Any], config: dict[str, Any]) -> None:
        """Copies everything, then writes it in the background.

        Raises:
            OSError: the checkpoint before could not be written.
        """
        self.wait()
        copies = {
            name: {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in part.items()}
            for name, part in tensors.items()
        }
        self._pending = self._pool.submit(self._write, images_seen, copies, state, config)

    def wait(self) -> None:
        """Returns when nothing is left to be written.

        Raises:
            OSError: a checkpoint could not be written.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _write(self, images_seen: int, tensors: Tensors, state: dict[str, Any], config: dict[str, Any]) -> None:
        final = folder_of(self._run, images_seen)
        temporary = final.with_name(f".{final.name}.tmp")
        final.parent.mkdir(parents=True, exist_ok=True)
        for leftover in final.parent.glob(".*.tmp"):
            shutil.rmtree(leftover)
        temporary.mkdir()
        for name, part in tensors.items():
            save_file(part, temporary / f"{name}.safetensors")
        (temporary / STATE).write_text(json.dumps(state, indent=2))
        (temporary / CONFIG).write_text(json.dumps(config, indent=2))
        files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in temporary.iterdir()}
        (temporary / MANIFEST).write_text(json.dumps({"version": 1, "files": files}, indent=2))
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        if final.exists():  # a damaged one, or the same again
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(final.parent)
        # Only now that the new one is safe. Damaged ones do not count, so a good one always stays.
        whole = [path for path in checkpoints(self._run) if (path / MANIFEST).exists()]
        for old in whole[: -self._keep]:
            shutil.rmtree(old)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
