"""Checkpoints: safetensors and JSON, complete or absent, no pickle in writing or reading.

A checkpoint is a folder `images_000012345` with `model`, `ema` and `optimizer.safetensors`, `config.json` (so that
`VAE.from_pretrained` reads it), `state.json`, and `manifest.json` with size and sha256 of the others, written last. The
folder is made under a temporary name, brought to the disk, and renamed.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter
from tqdm import tqdm

from vae_scale.errors import UserError, one_line
from vae_scale.models.vae import check_version
from vae_scale.training.sharding import whole

MANIFEST, STATE, CONFIG = "manifest.json", "state.json", "config.json"
Tensors = dict[str, dict[str, Tensor]]
NAME = re.compile(r"images_\d{9,}")
RETRY_SECONDS = 30.0


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
        files = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
        for name, entry in files.items():
            if Path(name).name != name or not name.isprintable():
                return f"{MANIFEST} names a path, {name!r:.80}"
            path = folder / name
            if path.exists() and not path.is_file():  # to open a pipe would be to wait for its writer
                return f"{name} is not a file"
            size = path.stat().st_size
            if size != entry["size"]:
                return f"{name} has {size} bytes instead of {entry['size']}"
            if _sha256(path) != entry["sha256"]:
                return f"{name} does not match its sha256"
        if lacking := [name for name in (STATE, CONFIG) if name not in files]:
            return f"{MANIFEST} does not name {lacking[0]}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error!r:.200})"
    return None


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None. Says which ones it skips, and why.

    Raises:
        UserError: another version of vae_scale wrote it.
    """
    for folder in reversed(checkpoints(run)):
        problem = damage(folder)
        if problem is None:
            check_version(json.loads((folder / CONFIG).read_text("utf-8")), folder)
            return folder
        print(f"warning: {folder} is skipped: {problem}", flush=True)
    return None


def load(folder: Path, *names: str) -> tuple[dict[str, Any], Tensors]:
    """The state of a checkpoint, and the tensors of `names` (model, ema, optimizer).

    Raises:
        UserError: it is damaged.
    """
    try:
        state = json.loads((folder / STATE).read_text("utf-8"), object_hook=lambda values: _State(folder, values))
        config = state.get("config", {}) if isinstance(state, dict) else None
        parts = [config.get(part, {}) for part in ("model", "data", "prior")] if isinstance(config, dict) else [None]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError(f"{STATE} does not hold what it should")
        return state, {name: load_file(folder / f"{name}.safetensors") for name in names}
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be read ({one_line(error)}); delete it to use the one before") from None


def unlike(parameters: Iterable[tuple[str, Parameter]], optimizer: dict[str, Tensor]) -> str | None:
    """The first moment of a parameter that a checkpoint's optimizer lacks, or holds in another shape; None if there is none."""
    for name, parameter in parameters:
        for part, shape in (("step", ()), ("exp_avg", parameter.shape), ("exp_avg_sq", parameter.shape)):
            saved = optimizer.get(f"{part}.{name}")
            if saved is None or saved.shape != shape:
                return f"{part}.{name}"
    return None


class _State(dict[str, Any]):
    """An object in state.json. What it lacks is told as what is wrong with the file."""

    def __init__(self, folder: Path, values: dict[str, Any]) -> None:
        super().__init__(values)
        self._folder = folder

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self._folder / STATE}: lacks {key}; delete the checkpoint to use the one before")


def newest_of(run: str | Path, option: str) -> Path:
    """The newest whole checkpoint of the run that `option` names.

    Raises:
        UserError: it has none.
    """
    folder = newest(Path(run))
    if folder is None:
        raise UserError(f"{option} {run}: has no checkpoint yet; train it with python -m vae_scale.train --run {run}")
    return folder


def _warn(text: str) -> None:
    tqdm.write(f"warning: {text}", file=sys.stderr)


class Writer:
    """Writes a run's checkpoints in a thread, one at a time, while training goes on.

    One that cannot be written, as the disk is full, read-only or gone, is tried again until the next one is due.

    Args:
        run: Folder of the run.
        keep: Newest checkpoints kept.
        keep_every: Images of which the first checkpoint after each multiple is kept, too; None for no others.
        not_saved: Told, by the thread, why one cannot be written.
        saved: Told, by the thread, where one was written.
    """

    def __init__(
        self,
        run: Path,
        keep: int,
        keep_every: int | None = None,
        not_saved: Callable[[str], object] = _warn,
        saved: Callable[[Path], object] | None = None,
    ) -> None:
        self._run, self._keep, self._keep_every, self._not_saved, self._saved = run, keep, keep_every, not_saved, saved
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._hurry = threading.Event()
        self._staged: Tensors = {}
        self._copied: torch.cuda.Event | None = None

    def save(self, images_seen: int, tensors: Tensors, state: dict[str, Any], config: dict[str, Any]) -> None:
        """Copies everything, as it is now, and writes it in the background."""
        self.stage({name: part.items() for name, part in tensors.items()})
        self.write(images_seen, state, config)

    def stage(self, tensors: Mapping[str, Iterable[tuple[str, Tensor]]]) -> None:
        """Copies the tensors of the next checkpoint, as they are now, to buffers in the host's memory, which are kept.

        Those of a GPU are pinned, so that the copies are queued like its other work. Shards are gathered one after the other.
        """
        with contextlib.suppress(UserError):  # said already, and this one makes up for it
            self.wait()
        before, self._staged = self._staged, {}
        # Contiguous here, not in the thread: on a CPU its copies would have threads of their own, and with more of these than
        # cores OpenMP lets none of them wait awake any more, which makes all later steps twice as long.
        for part, named in tensors.items():
            buffers = before.get(part, {})
            self._staged[part] = {name: _copy_to_host(whole(tensor), buffers.get(name)) for name, tensor in named}
        self._copied = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None

    def write(self, images_seen: int, state: dict[str, Any], config: dict[str, Any]) -> None:
        """Writes the tensors that were staged last, in the background."""
        self._hurry.clear()
        self._pending = self._pool.submit(self._persist, images_seen, state, config)

    def wait(self) -> None:
        """Returns when nothing is left to be written.

        Raises:
            UserError: a checkpoint cannot be written, not even at a last try.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._hurry.set()
            pending.result()

    def _persist(self, images_seen: int, state: dict[str, Any], config: dict[str, Any]) -> None:
        if self._copied:
            self._copied.synchronize()
        final = folder_of(self._run, images_seen)
        while True:
            last = self._hurry.is_set()
            try:
                self._write(final, state, config)
                break
            except (OSError, SafetensorError) as error:
                shutil.rmtree(_temporary(final), ignore_errors=True)  # what there is of it may be what fills the disk
                reason = f"{final}: cannot be written ({one_line(error)})"
                if last:
                    raise UserError(f"{reason}; free some space and run again: training goes on from the one before") from None
                self._not_saved(f"{reason}; training goes on, and it is tried again")
            self._hurry.wait(RETRY_SECONDS)
        if self._saved:
            self._saved(final)
        self._delete_old()

    def _write(self, final: Path, state: dict[str, Any], config: dict[str, Any]) -> None:
        temporary = _temporary(final)
        final.parent.mkdir(parents=True, exist_ok=True)
        for leftover in final.parent.glob(".*.tmp"):
            shutil.rmtree(leftover)
        temporary.mkdir()
        for name, part in self._staged.items():
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

    def _delete_old(self) -> None:
        """Deletes those that are not kept, now that a newer one is safe. Damaged ones do not count, so a good one stays."""
        whole = [path for path in checkpoints(self._run) if (path / MANIFEST).exists()]
        first = {images_of(path) // self._keep_every: path for path in reversed(whole)} if self._keep_every else {}
        first.pop(0, None)
        for old in whole[: -self._keep]:
            if old not in first.values():
                shutil.rmtree(old, ignore_errors=True)


def _temporary(final: Path) -> Path:
    return final.with_name(f".{final.name}.tmp")


def _copy_to_host(tensor: Tensor, buffer: Tensor | None) -> Tensor:
    """A contiguous copy in `buffer`, or in a new one if that does not fit. From a GPU it is queued, not waited for."""
    tensor = tensor.detach()
    if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return buffer.copy_(tensor, non_blocking=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
