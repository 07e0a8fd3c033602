"""Pictures that are written while training goes on."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from vae_scale.errors import one_line
from vae_scale.training.pictures import save_grid


class PictureWriter:
    """Writes pictures as PNG files in a thread, and hands them on.

    Args:
        folder: Where they go.
        on_written: Called in the thread with the images seen, the name and the path of each picture.
        on_failed: Called in the thread with the reason why one could not be written.
    """

    def __init__(
        self, folder: Path, on_written: Callable[[int, str, Path], object], on_failed: Callable[[str], object]
    ) -> None:
        self._folder, self._on_written, self._on_failed = folder, on_written, on_failed
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self._pending: Future[None] | None = None

    def write(self, images_seen: int, drawn: Mapping[str, tuple[Tensor, int | None]]) -> None:
        """Writes pictures, given as images on the CPU and their columns, in the background."""
        self.wait()
        self._pending = self._pool.submit(self._write, images_seen, drawn)

    def wait(self) -> None:
        """Returns when all are written and handed on. Raises what went wrong on the way, other than a full disk."""
        if self._pending:
            self._pending.result()

    def _write(self, images_seen: int, drawn: Mapping[str, tuple[Tensor, int | None]]) -> None:
        for name, (images, columns) in drawn.items():
            path = self._folder / f"{name}_{images_seen:09d}.png"
            try:
                save_grid(images, path, columns)
            except OSError as error:
                self._on_failed(f"{path}: cannot be written ({one_line(error)}); training goes on")
            else:
                self._on_written(images_seen, f"samples/{name}", path)
