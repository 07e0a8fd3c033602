"""Writes image grids in the background while training continues."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from vae_scale.errors import one_line
from vae_scale.evaluation.image_grids import save_grid


class ImageWriter:
    """Writes image grids as PNG files into a folder, in a thread.

    The thread calls `on_written` with images seen, metric name and path of a grid, or `on_failed` with an error message.
    """

    def __init__(
        self, folder: Path, on_written: Callable[[int, str, Path], object], on_failed: Callable[[str], object]
    ) -> None:
        self._folder, self._on_written, self._on_failed = folder, on_written, on_failed
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="image-writer")
        self._pending: Future[None] | None = None

    def write(self, images_seen: int, grids: Mapping[str, tuple[Tensor, int | None]]) -> None:
        """Writes grids, given as images on the CPU and number of columns by name, in the background."""
        self.wait()
        self._pending = self._pool.submit(self._write, images_seen, grids)

    def wait(self) -> None:
        """Waits for pending writes and callbacks. Raises their exceptions, except `OSError`, which `on_failed` reports."""
        if self._pending:
            self._pending.result()

    def _write(self, images_seen: int, grids: Mapping[str, tuple[Tensor, int | None]]) -> None:
        for name, (images, columns) in grids.items():
            path = self._folder / f"{name}_{images_seen:09d}.png"
            try:
                save_grid(images, path, columns)
            except OSError as error:
                self._on_failed(f"{path}: cannot be written ({one_line(error)}); training continues")
            else:
                self._on_written(images_seen, f"samples/{name}", path)
