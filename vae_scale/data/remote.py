"""Shards on web servers and object stores, downloaded with fsspec."""

import asyncio
import concurrent.futures
import contextlib
import errno
import functools
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from vae_scale.data.cache import Cache
from vae_scale.data.shard_file import Shard
from vae_scale.data.storage import MAX_INDEX_BYTES, SCHEMES, ShardReadError, Storage
from vae_scale.errors import UserError, one_line, redact
from vae_scale.files import sha256_of

MAX_SHARD_BYTES = 2**36  # of a shard that is downloaded without a manifest
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True)
class RetryPolicy:
    """How downloads are retried."""

    max_attempts: int = 5
    initial_delay: float = 1.0  # seconds, doubled after each attempt
    stall_timeout: float = 30.0  # seconds without data after which an attempt fails


RETRY_POLICY = RetryPolicy()
logger = logging.getLogger(__name__)


class _DownloadError(Exception):
    """A download attempt failed and can be retried."""


class RemoteStorage(Storage):
    """A folder at a URL that fsspec supports. Files are downloaded completely and verified.

    Transient errors (no connection, stalled transfer, server error, wrong size or hash) are retried as set by `RETRY_POLICY`.
    """

    is_local = False

    def __init__(self, url: str, cache: Cache) -> None:
        self.url = url
        self.location = redact(url).rstrip("/")
        self.cache = cache

    def read_manifest(self) -> str:
        hint = "check that this is a folder written by python -m vae_scale.pack, with its index.json"
        with tempfile.TemporaryDirectory() as folder:
            return self._download("index.json", Path(folder), MAX_INDEX_BYTES, _check_json, hint).read_text("utf-8")

    def open(self, shard: Shard) -> BufferedReader:
        impact = f"{shard.samples:,} images of split {shard.split} cannot be read"
        check = functools.partial(_check_shard, shard)
        return self.cache.open(shard, lambda folder: self._download(shard.url, folder, shard.filesize, check, impact))

    def download(self, url: str, folder: Path) -> Path:
        """Downloads a file of unknown content from a complete URL into `folder`, and returns its path.

        Raises:
            UserError: The download failed.
        """
        return self._download(url, folder, MAX_SHARD_BYTES, lambda path: None, "it cannot be indexed")

    def _download(self, name: str, folder: Path, max_bytes: int, check: Callable[[Path], None], impact: str) -> Path:
        label = redact(name) if "://" in name else f"{self.location}/{name}"
        url = name if "://" in name else _join(self.url, name)
        for attempt in range(1, RETRY_POLICY.max_attempts + 1):
            path = folder / str(attempt)  # a new file: a cancelled transfer may still write to the previous one
            try:
                _transfer(url, path, max_bytes)
                check(path)
                return path
            except UserError:
                raise
            except Exception as error:  # the types depend on the library
                if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                    raise
                reason, is_permanent = _describe(error)
            path.unlink(missing_ok=True)
            if is_permanent:
                raise ShardReadError(f"{label}: {reason}; {impact}")
            if attempt < RETRY_POLICY.max_attempts:
                delay = RETRY_POLICY.initial_delay * 2 ** (attempt - 1)
                logger.warning("%s: %s; retrying in %g s", label, reason, delay)
                time.sleep(delay)
        raise ShardReadError(f"{label}: {reason}, after {RETRY_POLICY.max_attempts} attempts; {impact}")


class MixedStorage(Storage):
    """A manifest with complete URLs of some shards; the other shards are in the folder of the manifest."""

    is_local = False

    def __init__(self, base: Storage, cache: Cache) -> None:
        self.base = base
        self.location = base.location
        self.remote = RemoteStorage(self.location, cache)

    def read_manifest(self) -> str:
        return self.base.read_manifest()

    def open(self, shard: Shard) -> BufferedReader:
        return (self.remote if "://" in shard.url else self.base).open(shard)


def _check_json(path: Path) -> None:
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise _DownloadError("invalid JSON") from None


def _check_shard(shard: Shard, path: Path) -> None:
    if (size := path.stat().st_size) != shard.filesize:
        raise _DownloadError(f"received {size:,} bytes, expected {shard.filesize:,}")
    if sha256_of(path) != shard.sha256:
        raise _DownloadError("its sha256 differs from the manifest")


def _describe(error: Exception) -> tuple[str, bool]:
    """Returns the reason of a failed attempt, and whether it is permanent."""
    if isinstance(error, _DownloadError):
        return redact(str(error)), False
    if isinstance(error, FileNotFoundError):
        return "not found", True
    if isinstance(error, PermissionError):
        return "access denied", True
    # aiohttp, gcsfs, huggingface_hub
    sources = ((error, "status"), (error, "code"), (getattr(error, "response", None), "status_code"))
    status = next((int(getattr(source, name)) for source, name in sources if str(getattr(source, name, "")).isdigit()), None)
    if status:
        return f"HTTP {status}", 400 <= status < 500 and status not in (408, 425, 429)
    return f"{type(error).__name__} {redact(one_line(error))}".strip(), False


def _transfer(url: str, path: Path, max_bytes: int) -> None:
    """Writes the content of `url` to `path`; raises if it exceeds `max_bytes` or stalls."""
    filesystem = _filesystem(url.partition("://")[0])
    import fsspec.asyn

    # Transfers run in fsspec's event loop. They are monitored here, because the timeouts of the libraries miss some stalls.
    task = asyncio.run_coroutine_threadsafe(_get(filesystem, url, path), fsspec.asyn.get_loop())
    timeout = RETRY_POLICY.stall_timeout
    try:
        size, last_progress = 0, time.monotonic()
        while not concurrent.futures.wait([task], timeout=min(1.0, timeout / 4)).done:
            received = size
            with contextlib.suppress(FileNotFoundError):  # not created yet, or deleted by the library
                received = path.stat().st_size
            if received > max_bytes:
                raise _DownloadError(f"received more than {max_bytes:,} bytes")
            if received > size:
                size, last_progress = received, time.monotonic()
            if time.monotonic() - last_progress > timeout:
                raise _DownloadError(f"no data for {timeout:g} s after {size:,} bytes")
        task.result()
    finally:
        task.cancel()


async def _get(filesystem: Any, url: str, path: Path) -> None:
    if filesystem.async_impl:
        options = {"concurrency": 1} if "gs" in filesystem.protocol else {}
        await filesystem._get_file(url, str(path), **options)
    else:
        await asyncio.to_thread(_copy, filesystem, url, path)


def _copy(filesystem: Any, url: str, path: Path) -> None:
    with filesystem.open(url, "rb", block_size=0) as source, path.open("wb") as file:
        shutil.copyfileobj(source, file, 2**20)


def _join(url: str, name: str) -> str:
    """Returns the URL of a file in a folder; the query, for example an access token, is kept."""
    if not url.startswith("http"):
        return f"{url.rstrip('/')}/{name}"
    parts = urlsplit(url)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}").geturl()


@functools.cache
def _filesystem(scheme: str) -> Any:
    """Returns fsspec's file system for a URL scheme. The library of the protocol reads the credentials."""
    if scheme not in SCHEMES:
        raise UserError(f"data.shards {scheme}://...: not one of {', '.join(SCHEMES)}")
    try:
        if scheme in ("http", "https", "gs"):
            import aiohttp

            no_timeout = aiohttp.ClientTimeout(total=None)  # the default limits a transfer to five minutes
        if scheme == "gs":
            # fsspec's default class queries the bucket type by gRPC, which hangs for minutes behind some firewalls.
            from gcsfs.core import GCSFileSystem

            return GCSFileSystem(requests_timeout=no_timeout, skip_instance_cache=True)
        import fsspec

        options: dict[str, Any] = {}
        if scheme.startswith("http"):
            options = {"client_kwargs": {"timeout": no_timeout, "trust_env": True}}
        if scheme == "s3":  # one request per file, retried only according to RETRY_POLICY
            options = {"max_concurrency": 1, "config_kwargs": {"retries": {"total_max_attempts": 1}}}
        return fsspec.filesystem(scheme, skip_instance_cache=True, **options)
    except ImportError:
        library = {"s3": "s3fs", "gs": "gcsfs"}.get(scheme, "aiohttp")
        extra = "gs" if scheme == "gs" else "remote"
        raise UserError(f"data.shards {scheme}://...: requires {library}: pip install 'vae_scale[{extra}]'") from None
