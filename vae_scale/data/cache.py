"""A local cache of downloaded shards."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path

from filelock import FileLock, Timeout

from vae_scale.data.shard_file import Shard
from vae_scale.errors import UserError, redact


def _default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vae_scale" / "shards"


@dataclass(frozen=True)
class Cache:
    """A folder of downloaded shards, bounded in bytes and shared by all processes of a machine.

    A file is named after its sha256 and is added once it is complete and verified. Downloads in progress count with their final
    size. Files can be deleted at any time; this does not affect processes that have opened or mapped them.

    Attributes:
        folder: Created on first use.
        max_bytes: Maximum total size of the shards.
    """

    folder: Path = field(default_factory=_default_folder)
    max_bytes: float = 50 * 2**30

    @classmethod
    def from_options(cls, folder: str | None, size_gib: float | None) -> "Cache":
        """Returns the cache for `data.cache_dir` and `data.cache_size_gib`; None selects the default."""
        default = cls()
        return cls(Path(folder).expanduser() if folder else default.folder, size_gib * 2**30 if size_gib else default.max_bytes)

    def open(self, shard: Shard, download: Callable[[Path], Path]) -> BufferedReader:
        """Opens a shard. If it is not cached, one process downloads it and the others wait.

        Args:
            shard: The shard.
            download: Downloads and verifies the shard in an empty folder, and returns its path there.

        Raises:
            UserError: The shard is larger than the cache, the folder is full or not writable, or `download` failed.
        """
        try:
            if file := self._open_cached(shard):
                return file
            if shard.filesize > self.max_bytes:
                sizes = f"is {self.max_bytes / 2**30:.3g}, but {redact(shard.url)} has {shard.filesize / 2**30:.3g} GiB"
                raise UserError(f"data.cache_size_gib {sizes}; increase it to the size of several shards")
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock(shard.sha256):
                return self._open_cached(shard) or self._download(shard, download)
        except OSError as error:
            advice = "free some space, lower data.cache_size_gib or choose another folder"
            raise UserError(f"data.cache_dir {self.folder}: {error.strerror or error}; {advice}") from None

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _lock(self, name: str) -> FileLock:
        """Returns a lock between threads and processes. The operating system releases it if its owner is killed."""
        return FileLock(self.folder / f".{name}.lock")

    def _open_cached(self, shard: Shard) -> BufferedReader | None:
        try:
            file = self._path(shard).open("rb")
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size != shard.filesize:  # truncated after it was verified
            file.close()
            return None
        with contextlib.suppress(OSError):  # the folder may be read-only
            os.utime(file.fileno())
        return file

    def _download(self, shard: Shard, download: Callable[[Path], Path]) -> BufferedReader:
        while (folder := self._reserve(shard)) is None:
            time.sleep(0.1)  # downloads of other shards fill the cache; they can be evicted once they are complete
        try:
            path = download(folder)
            os.utime(path)
            with self._lock("all"):  # prevents eviction before the file is open
                path.replace(self._path(shard))
                return self._path(shard).open("rb")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _reserve(self, shard: Shard) -> Path | None:
        """Evicts the least recently used shards and returns an empty folder for a download, or None if the cache is full."""
        with self._lock("all"):
            used = shard.filesize
            for path in self.folder.glob(".*.*.part*"):
                _, sha256, reserved, _ = path.name.split(".")
                if sha256 == shard.sha256 or not self._is_locked(sha256):
                    shutil.rmtree(path, ignore_errors=True)  # its process was killed, or has just finished
                else:
                    used += int(reserved)
            if used > self.max_bytes:
                return None
            files = [(path.stat().st_mtime_ns, path.stat().st_size, path) for path in self.folder.glob("*.tar")]
            used += sum(size for _, size, _ in files)
            for _, size, path in sorted(files):
                if used > self.max_bytes:
                    path.unlink()
                    used -= size
            return Path(tempfile.mkdtemp(prefix=f".{shard.sha256}.{shard.filesize}.part", dir=self.folder))

    def _is_locked(self, name: str) -> bool:
        try:
            with self._lock(name).acquire(timeout=0):
                return False
        except Timeout:
            return True
