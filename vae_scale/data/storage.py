"""Where the files of a set of shards are."""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path

from filelock import FileLock, Timeout

from vae_scale.data.shard_file import Shard
from vae_scale.errors import UserError, shown

SCHEMES = ("http", "https", "s3", "gs", "hf")  # of URLs that shards may have
INDEX_BYTES = 2**30  # of an index.json, at most


class Unreadable(UserError):
    """A file of a set is missing, damaged or cannot be fetched. Of the others nothing is said."""


class Storage(ABC):
    """A place that holds a manifest and shards.

    Attributes:
        location: As the user named it, without secrets.
        local: Whether files can be read in place.
    """

    location: str
    local: bool

    @abstractmethod
    def manifest(self) -> str:
        """The text of `index.json`.

        Raises:
            UserError: there is none, or it cannot be fetched.
        """

    @abstractmethod
    def open(self, shard: Shard) -> BufferedReader:
        """A local file that holds a shard, of the size that the manifest says. Any thread may call it.

        Raises:
            Unreadable: it is missing, damaged or cannot be fetched.
            UserError: none can be read, whichever it is: the cache is full, say.
        """


class Folder(Storage):
    """A folder of this machine."""

    local = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.location = str(folder)

    def manifest(self) -> str:
        index = self.folder / "index.json"
        if not index.is_file():
            raise UserError(f"data.shards {self.folder}: no index.json there; write shards with python -m vae_scale.pack")
        try:
            if (size := index.stat().st_size) > INDEX_BYTES:
                raise UserError(f"{index}: {size:,} bytes, at most {INDEX_BYTES:,} are read")
            return index.read_text("utf-8")
        except OSError as error:
            raise UserError(f"{index}: {error.strerror}") from None

    def open(self, shard: Shard) -> BufferedReader:
        # Shards may be links to files elsewhere: whoever can make one here can read these files as well, and nothing is
        # ever written through it.
        path = self.folder / shard.url
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would be to wait for its writer
                raise Unreadable(f"{path}: not a file; copy or pack it again")
            file = path.open("rb")
        except FileNotFoundError:
            raise Unreadable(f"{path}: missing, though the manifest names it; copy or pack it again") from None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            raise Unreadable(f"{path}: {error.strerror}; copy or pack it again") from None
        size = os.fstat(file.fileno()).st_size
        if size != shard.filesize:
            file.close()
            raise Unreadable(f"{path}: {size} bytes, the manifest says {shard.filesize}; copy or pack it again")
        return file


def _users_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vae_scale" / "shards"


@dataclass(frozen=True)
class Cache:
    """A folder of fetched shards, bounded in bytes, that all processes of a machine share.

    A file is named after its sha256 and is there only once it is whole and verified. What is on its way counts with the
    size it will have. Files may be removed at any time: whoever has one open or mapped keeps it.

    Attributes:
        folder: Made when it is needed.
        limit: Bytes that the shards may take.
    """

    folder: Path = field(default_factory=_users_folder)
    limit: float = 50 * 2**30

    @classmethod
    def configured(cls, folder: str | None, gib: float | None) -> "Cache":
        """As `data.cache_dir` and `data.cache_gib` say; None for the default."""
        default = cls()
        return cls(Path(folder).expanduser() if folder else default.folder, gib * 2**30 if gib else default.limit)

    def open(self, shard: Shard, fetch: Callable[[Path], Path]) -> BufferedReader:
        """The file of a shard. Where it is missing, one process fetches it, and the others wait for that.

        Args:
            shard: What is wanted.
            fetch: Fetches the shard into an empty folder, verifies it, and says where it lies there.

        Raises:
            UserError: the shard is larger than the cache, or the folder is full or cannot be written, or from `fetch`.
        """
        try:
            if file := self._opened(shard):
                return file
            if shard.filesize > self.limit:
                need = f"{shown(shard.url)} has {shard.filesize / 2**30:.3g} GiB"
                raise UserError(f"data.cache_gib is {self.limit / 2**30:.3g}, but {need}; raise it to several shards")
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock(shard.sha256):
                return self._opened(shard) or self._fetched(shard, fetch)
        except OSError as error:
            text = f"data.cache_dir {self.folder}: {error.strerror or error}; free some space, lower data.cache_gib or choose"
            raise UserError(f"{text} another folder") from None

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _lock(self, name: str) -> FileLock:
        """Held by one thread of one process; the system frees it when that is killed."""
        return FileLock(self.folder / f".{name}.lock")

    def _opened(self, shard: Shard) -> BufferedReader | None:
        try:
            file = self._path(shard).open("rb")
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size != shard.filesize:  # its hash was right once; a crash or a person cut it
            file.close()
            return None
        with contextlib.suppress(OSError):  # a folder that is only read serves as well
            os.utime(file.fileno())
        return file

    def _fetched(self, shard: Shard, fetch: Callable[[Path], Path]) -> BufferedReader:
        while (folder := self._reserved(shard)) is None:
            time.sleep(0.1)  # others have taken the room; once they are done, what they fetched may go
        try:
            part = fetch(folder)
            os.utime(part)
            with self._lock("all"):  # so that it is not removed before it is open
                part.replace(self._path(shard))
                return self._path(shard).open("rb")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _reserved(self, shard: Shard) -> Path | None:
        """A folder to fetch a shard into, once there is room; the files used longest ago make it."""
        with self._lock("all"):
            taken = shard.filesize
            for path in self.folder.glob(".*.*.part*"):
                _, sha256, reserved, _ = path.name.split(".")
                if sha256 == shard.sha256 or self._free(sha256):
                    shutil.rmtree(path, ignore_errors=True)  # whoever made it was killed, or is just done
                else:
                    taken += int(reserved)
            if taken > self.limit:
                return None
            files = [(path.stat().st_mtime_ns, path.stat().st_size, path) for path in self.folder.glob("*.tar")]
            taken += sum(size for _, size, _ in files)
            for _, size, path in sorted(files):
                if taken > self.limit:
                    path.unlink()
                    taken -= size
            return Path(tempfile.mkdtemp(prefix=f".{shard.sha256}.{shard.filesize}.part", dir=self.folder))

    def _free(self, name: str) -> bool:
        try:
            with self._lock(name).acquire(timeout=0):
                return True
        except Timeout:
            return False


def open_storage(location: str | Path, cache: Cache, commands: bool) -> Storage:
    """The storage that a location names.

    Args:
        location: A folder, a URL, or `pipe:` and a command.
        cache: For what is not on this machine.
        commands: Whether a command may be run: not where somebody else may have written the location.

    Raises:
        UserError: there is no such kind of location, or a library for it is missing.
    """
    text = str(location)
    if text.startswith("pipe:"):
        if not commands:
            raise UserError(f"the run's data.shards is a command ({shown(text)}), which is not run unasked; pass --shards")
        from vae_scale.data.remote import Pipe

        return Pipe(text, cache)
    if "://" in text:
        from vae_scale.data.remote import Remote

        return Remote(text, cache)
    return Folder(Path(text))
