"""Checkpoints: folders of safetensors and JSON files, which hold no pickle and are either complete or absent.

A checkpoint `images_000012345` holds `model`, `ema` and `optimizer.safetensors`, the mixture prior or the guide of the flow
prior if there is one, `config.json` (for `VAE.from_pretrained`), `state.json`, and `manifest.json` with the size and SHA-256 of
the other files, written last. The folder is written under a temporary name, flushed to the disk and renamed.
"""

import contextlib
import json
import re
import shutil
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

from vae_scale.errors import UserError, one_line
from vae_scale.files import fsync, sha256_of, write_json
from vae_scale.models.pretrained import check_version
from vae_scale.runtime.distributed import SINGLE_PROCESS, DistContext
from vae_scale.runtime.sharding import full_tensor

MANIFEST, STATE, CONFIG = "manifest.json", "state.json", "config.json"
FOLDER_NAME = re.compile(r"images_\d{9,}")
RETRY_SECONDS = 30.0

Tensors = dict[str, dict[str, Tensor]]


def checkpoint_folder(run: Path, images_seen: int) -> Path:
    """Returns the folder of a run's checkpoint."""
    return run / "checkpoints" / f"images_{images_seen:09d}"


def images_seen_at(folder: Path) -> int:
    """Returns the number of images seen by a checkpoint, from its name."""
    return int(folder.name.removeprefix("images_"))


def list_checkpoints(run: Path) -> list[Path]:
    """Returns the folders of a run's checkpoints, oldest first, including damaged ones."""
    folders = (run / "checkpoints").glob("images_*")
    return sorted((path for path in folders if path.is_dir() and FOLDER_NAME.fullmatch(path.name)), key=images_seen_at)


def integrity_error(folder: Path) -> str | None:
    """Returns the reason why a checkpoint is invalid, or None if it matches its manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
        for name, entry in files.items():
            if Path(name).name != name or not name.isprintable():
                return f"{MANIFEST} contains a path, {name!r:.80}"
            path = folder / name
            if path.exists() and not path.is_file():  # opening a pipe would block
                return f"{name} is not a file"
            size = path.stat().st_size
            if size != entry["size"]:
                return f"{name} has {size} bytes instead of {entry['size']}"
            if sha256_of(path) != entry["sha256"]:
                return f"{name} does not match its sha256"
        for name in (STATE, CONFIG):
            if name not in files:
                return f"{MANIFEST} does not list {name}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error!r:.200})"
    return None


def newest_checkpoint(run: Path) -> Path | None:
    """Returns the newest valid checkpoint of a run, or None. Prints a warning for each one that is skipped.

    Raises:
        UserError: if its format version is not supported.
    """
    for folder in reversed(list_checkpoints(run)):
        reason = integrity_error(folder)
        if reason is None:
            check_version(json.loads((folder / CONFIG).read_text("utf-8")), folder)
            return folder
        print(f"warning: {folder} is skipped: {reason}", flush=True)
    return None


def require_checkpoint(
    run: str | Path, option: str, dist: DistContext = SINGLE_PROCESS, device: torch.device | str = "cpu"
) -> Path:
    """Returns the newest valid checkpoint of the run that `option` names. All ranks must call it and return the same one.

    Raises:
        UserError: if the run has no valid checkpoint.
    """
    images_seen = 0
    if dist.rank == 0:
        folder = newest_checkpoint(Path(run))
        if folder is None:
            raise UserError(f"{option} {run}: has no checkpoint yet; train it with python -m vae_scale.train --run {run}")
        images_seen = images_seen_at(folder)
    return checkpoint_folder(Path(run), int(dist.all_reduce_sum(torch.tensor(images_seen, device=device))))


def load_checkpoint(folder: Path, *names: str) -> tuple[dict[str, Any], Tensors]:
    """Returns the state of a checkpoint and the tensors of `names` (model, ema, optimizer).

    Raises:
        UserError: if it is damaged.
    """
    try:
        state = json.loads((folder / STATE).read_text("utf-8"), object_hook=lambda values: _StateDict(folder, values))
        config = state.get("config", {}) if isinstance(state, dict) else None
        sections = [config.get(name, {}) for name in ("model", "data", "prior")] if isinstance(config, dict) else [None]
        if not all(isinstance(section, dict) for section in sections):
            raise ValueError(f"{STATE} is invalid")
        return state, {name: load_file(folder / f"{name}.safetensors") for name in names}
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be read ({one_line(error)}); delete it to use the previous checkpoint") from None


class _StateDict(dict[str, Any]):
    """An object in state.json. A missing key raises a UserError instead of a KeyError."""

    def __init__(self, folder: Path, values: dict[str, Any]) -> None:
        super().__init__(values)
        self._folder = folder

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self._folder / STATE}: lacks {key}; delete the checkpoint to use the previous one")


def first_mismatch(parameters: Iterable[tuple[str, Parameter]], optimizer: dict[str, Tensor]) -> str | None:
    """Returns the name of the first AdamW state that is missing or has another shape, or None."""
    for name, parameter in parameters:
        for key, shape in (("step", ()), ("exp_avg", parameter.shape), ("exp_avg_sq", parameter.shape)):
            saved = optimizer.get(f"{key}.{name}")
            if saved is None or saved.shape != shape:
                return f"{key}.{name}"
    return None


class CheckpointWriter:
    """Writes a run's checkpoints in a background thread, one at a time.

    A checkpoint that cannot be written, for instance because the disk is full, is retried until the next one is due.

    Args:
        run: The run's folder.
        keep: Number of newest checkpoints to keep.
        keep_every: Also keeps the first checkpoint after each multiple of this number of images.
        on_failed: Called from the background thread with a message if a checkpoint cannot be written.
        on_saved: Called from the background thread with the folder of each written checkpoint.
    """

    def __init__(
        self,
        run: Path,
        keep: int,
        keep_every: int | None = None,
        on_failed: Callable[[str], object] = print,
        on_saved: Callable[[Path], object] | None = None,
    ) -> None:
        self._run, self._keep, self._keep_every, self._on_failed, self._on_saved = run, keep, keep_every, on_failed, on_saved
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._stop_retrying = threading.Event()
        self._staged: Tensors = {}
        self._copied: torch.cuda.Event | None = None

    def save(self, images_seen: int, tensors: Tensors, state: dict[str, Any], config: dict[str, Any]) -> None:
        """Copies the tensors and writes a checkpoint in the background."""
        self.stage({name: group.items() for name, group in tensors.items()})
        self.write(images_seen, state, config)

    def stage(self, tensors: Mapping[str, Iterable[tuple[str, Tensor]]]) -> None:
        """Copies the tensors of the next checkpoint to reused host buffers.

        Copies from a GPU to pinned memory are asynchronous. Sharded tensors are gathered one at a time.
        """
        with contextlib.suppress(UserError):  # was reported; this checkpoint replaces the failed one
            self.wait()
        previous, self._staged = self._staged, {}
        # Not copied in the background thread, which would start a second pool of OpenMP threads. With more threads than cores,
        # OpenMP stops spinning, which doubles the duration of all later steps.
        for group, named_tensors in tensors.items():
            buffers = previous.get(group, {})
            self._staged[group] = {
                name: _copy_to_host(full_tensor(tensor), buffers.get(name)) for name, tensor in named_tensors
            }
        self._copied = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None

    def write(self, images_seen: int, state: dict[str, Any], config: dict[str, Any]) -> None:
        """Writes the staged tensors in the background."""
        self._stop_retrying.clear()
        self._pending = self._executor.submit(self._write_with_retries, images_seen, state, config)

    def wait(self) -> None:
        """Waits for the pending checkpoint.

        Raises:
            UserError: if it cannot be written, after a last attempt.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._stop_retrying.set()
            pending.result()

    def _write_with_retries(self, images_seen: int, state: dict[str, Any], config: dict[str, Any]) -> None:
        if self._copied:
            self._copied.synchronize()
        final = checkpoint_folder(self._run, images_seen)
        temporary = final.with_name(f".{final.name}.tmp")
        while True:
            is_last_attempt = self._stop_retrying.is_set()
            try:
                self._write(temporary, final, state, config)
                break
            except (OSError, SafetensorError) as error:
                shutil.rmtree(temporary, ignore_errors=True)  # frees the space
                message = f"{final}: cannot be written ({one_line(error)})"
                if is_last_attempt:
                    raise UserError(f"{message}; free disk space and run again to resume from the last checkpoint") from None
                self._on_failed(f"{message}; training continues and writing is retried")
            self._stop_retrying.wait(RETRY_SECONDS)
        if self._on_saved:
            self._on_saved(final)
        self._delete_old()

    def _write(self, temporary: Path, final: Path, state: dict[str, Any], config: dict[str, Any]) -> None:
        final.parent.mkdir(parents=True, exist_ok=True)
        for leftover in final.parent.glob(".*.tmp"):
            shutil.rmtree(leftover)
        temporary.mkdir()
        for name, group in self._staged.items():
            save_file(group, temporary / f"{name}.safetensors")
            fsync(temporary / f"{name}.safetensors")
        write_json(temporary / STATE, state)
        write_json(temporary / CONFIG, config)
        files = {path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in temporary.iterdir()}
        write_json(temporary / MANIFEST, {"version": 1, "files": files})
        if final.exists():  # damaged, or the same checkpoint
            shutil.rmtree(final)
        temporary.rename(final)
        fsync(final.parent)

    def _delete_old(self) -> None:
        """Deletes old checkpoints. Checkpoints without a manifest are neither counted nor deleted."""
        complete = [path for path in list_checkpoints(self._run) if (path / MANIFEST).exists()]
        milestones = {images_seen_at(path) // self._keep_every: path for path in reversed(complete)} if self._keep_every else {}
        milestones.pop(0, None)
        for old in complete[: -self._keep]:
            if old not in milestones.values():
                shutil.rmtree(old, ignore_errors=True)


def _copy_to_host(tensor: Tensor, buffer: Tensor | None) -> Tensor:
    """Returns a contiguous copy, in `buffer` if it fits. From a GPU, the copy is asynchronous."""
    tensor = tensor.detach()
    if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return buffer.copy_(tensor, non_blocking=True)
