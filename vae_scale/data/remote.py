"""Shards on other machines: web servers, object stores, and whatever a command can read."""

import asyncio
import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlsplit

from vae_scale.data.shard_file import Shard
from vae_scale.data.storage import INDEX_BYTES, SCHEMES, Cache, Storage, Unreadable
from vae_scale.errors import UserError, one_line, shown

INDEXED_BYTES = 2**36  # of a shard that has no manifest yet, at most
CHUNK = 2**20
LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # faults of our own disk, not of a server


@dataclass(frozen=True)
class Patience:
    """When a fetch is given up.

    Attributes:
        attempts: In all.
        pause: Seconds after the first; twice as many after each further one.
        silence: Seconds without a byte after which an attempt is over.
    """

    attempts: int = 5
    pause: float = 1.0
    silence: float = 30.0


PATIENCE = Patience()
logger = logging.getLogger(__name__)


class _Fault(Exception):
    """What was wrong with an attempt."""


class Fetched(Storage):
    """Files that must be fetched before they can be read: whole, and verified.

    A fault that may pass (no connection, silence, a server's error, missing or wrong bytes) is tried again as `PATIENCE`
    says. What is left is a `UserError`; what was read is never less than was asked for.
    """

    local = False

    def __init__(self, location: str, cache: Cache) -> None:
        self.location = shown(location).rstrip("/")
        self.cache = cache

    @abstractmethod
    def _fetch(self, name: str, part: Path, most: int) -> None:
        """Writes file `name` (beside the manifest, or a whole URL) to `part`.

        Raises:
            Exception: it did not arrive, or is of more than `most` bytes.
        """

    def manifest(self) -> str:
        hint = "is this the folder that python -m vae_scale.pack wrote, with its index.json?"
        with tempfile.TemporaryDirectory() as folder:
            return self._attempt("index.json", Path(folder), INDEX_BYTES, _check_index, hint).read_text("utf-8")

    def open(self, shard: Shard) -> BufferedReader:
        lost = f"{shard.samples:,} images of split {shard.split} cannot be read"
        check = functools.partial(_check_shard, shard)
        return self.cache.open(shard, lambda folder: self._attempt(shard.url, folder, shard.filesize, check, lost))

    def fetch(self, url: str, folder: Path) -> Path:
        """A file in `folder` with what is at a whole URL, of which nothing is known that it could be compared with.

        Raises:
            UserError: it cannot be fetched.
        """
        return self._attempt(url, folder, INDEXED_BYTES, lambda part: None, "it cannot be indexed")

    def _attempt(self, name: str, folder: Path, most: int, check: Callable[[Path], None], consequence: str) -> Path:
        """The path in `folder` of file `name`, which `check` has passed; after several attempts, if need be."""
        label = shown(name) if "://" in name else f"{self.location}/{name}"
        for attempt in range(1, PATIENCE.attempts + 1):
            part = folder / str(attempt)  # a new file each time: what was cut off may still write to the last
            try:
                self._fetch(name, part, most)
                check(part)
                return part
            except UserError:
                raise
            except Exception as error:  # each library has its own
                if isinstance(error, OSError) and error.errno in LOCAL:
                    raise
                reason, final = _reason(error)
            part.unlink(missing_ok=True)
            if final:
                raise Unreadable(f"{label}: {reason}; {consequence}")
            if attempt < PATIENCE.attempts:
                pause = PATIENCE.pause * 2 ** (attempt - 1)
                logger.warning("%s: %s; trying again in %g s", label, reason, pause)
                time.sleep(pause)
        raise Unreadable(f"{label}: {reason}, at the last of {PATIENCE.attempts} attempts; {consequence}")


def _check_index(part: Path) -> None:
    try:
        json.loads(part.read_bytes())
    except (ValueError, RecursionError):
        raise _Fault("not whole JSON") from None


def _check_shard(shard: Shard, part: Path) -> None:
    with part.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != shard.filesize:
            raise _Fault(f"{size:,} bytes came, the manifest says {shard.filesize:,}")
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            raise _Fault("its sha256 is not the manifest's")


def _reason(error: Exception) -> tuple[str, bool]:
    """What to say about a failed attempt, and whether another one is useless."""
    if isinstance(error, _Fault):
        return shown(str(error)), False
    if isinstance(error, FileNotFoundError):
        return "not found", True
    if isinstance(error, PermissionError):
        return "access denied", True
    # aiohttp, gcsfs, huggingface_hub
    places = ((error, "status"), (error, "code"), (getattr(error, "response", None), "status_code"))
    status = next((int(getattr(thing, name)) for thing, name in places if str(getattr(thing, name, "")).isdigit()), None)
    if status:
        return f"HTTP {status}", 400 <= status < 500 and status not in (408, 425, 429)
    return f"{type(error).__name__} {shown(one_line(error))}".strip(), False


class Remote(Fetched):
    """A folder behind a URL that fsspec understands."""

    def __init__(self, location: str, cache: Cache) -> None:
        super().__init__(location, cache)
        self.base = location

    def _fetch(self, name: str, part: Path, most: int) -> None:
        url = name if "://" in name else _inside(self.base, name)
        files = _filesystem(url.partition("://")[0])
        import fsspec.asyn

        # All transfers are tasks of one thread. It is watched from here, since no library has a time-out for everything.
        task = asyncio.run_coroutine_threadsafe(_get(files, url, part), fsspec.asyn.get_loop())
        try:
            size, heard = 0, time.monotonic()
            while not concurrent.futures.wait([task], timeout=min(1.0, PATIENCE.silence / 4)).done:
                now = _size(part)
                if now > most:
                    raise _Fault(f"more than {most:,} bytes came")
                if now > size:
                    size, heard = now, time.monotonic()
                if time.monotonic() - heard > PATIENCE.silence:
                    raise _Fault(f"silence for {PATIENCE.silence:g} s after {size:,} bytes")
            task.result()
        finally:
            task.cancel()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # not begun, or taken back
        return 0


async def _get(files: Any, url: str, part: Path) -> None:
    """Writes what is at `url` to `part` as it comes, in one request."""
    if files.async_impl:
        options = {"concurrency": 1} if "gs" in files.protocol else {}
        await files._get_file(url, str(part), **options)
    else:
        await asyncio.to_thread(_copy, files, url, part)


def _copy(files: Any, url: str, part: Path) -> None:
    with files.open(url, "rb", block_size=0) as stream, part.open("wb") as file:
        shutil.copyfileobj(stream, file, CHUNK)


def _inside(location: str, name: str) -> str:
    """The URL of a file in a folder. A query, an access token say, goes with it."""
    if not location.startswith("http"):
        return f"{location.rstrip('/')}/{name}"
    parts = urlsplit(location)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}").geturl()


@functools.cache
def _filesystem(scheme: str) -> Any:
    """fsspec's view of all that has this scheme; credentials are found as the protocol's library finds them."""
    if scheme not in SCHEMES:
        raise UserError(f"data.shards {scheme}://...: not one of {', '.join(SCHEMES)}")
    try:
        if scheme in ("http", "https", "gs"):
            import aiohttp

            # Its own limit is five minutes, however well the transfer goes.
            patient = aiohttp.ClientTimeout(total=None)
        if scheme == "gs":
            # The class that fsspec takes asks what kind of bucket it is by gRPC, for minutes where a firewall drops that.
            from gcsfs.core import GCSFileSystem

            return GCSFileSystem(requests_timeout=patient, skip_instance_cache=True)
        import fsspec

        options: dict[str, Any] = {}
        if scheme.startswith("http"):
            options = {"client_kwargs": {"timeout": patient, "trust_env": True}}
        if scheme == "s3":
            # One request per file and no attempts but ours, which tell what went wrong.
            options = {"max_concurrency": 1, "config_kwargs": {"retries": {"total_max_attempts": 1}}}
        return fsspec.filesystem(scheme, skip_instance_cache=True, **options)
    except ImportError:
        library = {"s3": "s3fs", "gs": "gcsfs"}.get(scheme, "aiohttp")
        extra = "gs" if scheme == "gs" else "remote"
        raise UserError(f"data.shards {scheme}://...: needs {library}: pip install 'vae_scale[{extra}]'") from None


class Pipe(Fetched):
    """Files that a command writes to its standard output; in the command, `{}` stands for the file's name."""

    def __init__(self, location: str, cache: Cache) -> None:
        super().__init__(location, cache)
        self.command = location.removeprefix("pipe:")
        if "{}" not in self.command:
            raise UserError(f"data.shards {self.location}: the command lacks {{}}, which stands for the name of a file")

    def _fetch(self, name: str, part: Path, most: int) -> None:
        command = self.command.replace("{}", shlex.quote(name))
        with part.open("wb") as file, tempfile.TemporaryFile() as complaints:
            process = subprocess.Popen(
                command,
                bufsize=0,
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=complaints,
                start_new_session=True,
            )
            assert process.stdout is not None
            try:
                with process.stdout:
                    _receive(process.stdout, file, most)
                code = process.wait(PATIENCE.silence)
            except BaseException as error:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with all that the command started
                process.wait()
                if isinstance(error, subprocess.TimeoutExpired):  # whose text has the command in it
                    raise _Fault(f"still running {PATIENCE.silence:g} s after the end of its output") from None
                raise
            if code:
                complaints.seek(0)
                lines = complaints.read().decode(errors="replace").split("\n")
                last = next((line for line in reversed(lines) if line.strip()), "")
                raise _Fault(f"exit code {code}: {last}" if last else f"exit code {code}")


def _receive(stream: IO[bytes], file: IO[bytes], most: int) -> None:
    size = 0
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while selector.select(PATIENCE.silence):
            chunk = stream.read(CHUNK)
            if not chunk:
                return
            size += len(chunk)
            if size > most:
                raise _Fault(f"more than {most:,} bytes came")
            file.write(chunk)
    raise _Fault(f"silence for {PATIENCE.silence:g} s after {size:,} bytes")


class Elsewhere(Storage):
    """Shards that a manifest names by whole URLs; others lie beside it."""

    local = False

    def __init__(self, index: Storage, cache: Cache) -> None:
        self.index = index
        self.location = index.location
        self.remote = Remote(self.location, cache)

    def manifest(self) -> str:
        return self.index.manifest()

    def open(self, shard: Shard) -> BufferedReader:
        return (self.remote if "://" in shard.url else self.index).open(shard)
