"""Downloads from web servers and object stores with fsspec."""

import asyncio
import concurrent.futures
import contextlib
import errno
import functools
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vae_scale.data.shard_file import ShardReadError
from vae_scale.errors import UserError, one_line, redact

SCHEMES = ("http", "https", "s3", "gs", "hf")  # of supported URLs
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


def download(
    url: str,
    folder: Path,
    impact: str,
    max_bytes: int = MAX_SHARD_BYTES,
    check: Callable[[Path], str | None] = lambda path: None,
) -> Path:
    """Downloads a file into `folder`, and returns its path there.

    Transient errors (no connection, stalled transfer, server error, failed check) are retried as set by `RETRY_POLICY`.

    Args:
        url: URL of the file, including secrets.
        folder: An existing folder.
        impact: Consequence of a failure, for the error message.
        max_bytes: Maximum size of the file.
        check: Returns what is wrong with the downloaded file, or None.

    Raises:
        ShardReadError: The download failed.
        UserError: The scheme is not supported, or its library is not installed.
        OSError: The disk is full.
    """
    for attempt in range(1, RETRY_POLICY.max_attempts + 1):
        path = folder / str(attempt)  # a new file: a cancelled transfer may still write to the previous one
        try:
            _transfer(url, path, max_bytes)
            reason, is_permanent = check(path), False
            if reason is None:
                return path
        except UserError:
            raise
        except Exception as error:  # the types depend on the library
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            reason, is_permanent = _describe(error)
        path.unlink(missing_ok=True)
        if is_permanent:
            raise ShardReadError(f"{redact(url)}: {reason}; {impact}")
        if attempt < RETRY_POLICY.max_attempts:
            delay = RETRY_POLICY.initial_delay * 2 ** (attempt - 1)
            logger.warning("%s: %s; retrying in %g s", redact(url), reason, delay)
            time.sleep(delay)
    raise ShardReadError(f"{redact(url)}: {reason}, after {RETRY_POLICY.max_attempts} attempts; {impact}")


def _describe(error: Exception) -> tuple[str, bool]:
    """Returns the reason of a failed attempt, and whether it is permanent."""
    if isinstance(error, FileNotFoundError):
        return "not found", True
    if isinstance(error, PermissionError):
        return "access denied", True
    # aiohttp, gcsfs, huggingface_hub
    for source, name in ((error, "status"), (error, "code"), (getattr(error, "response", None), "status_code")):
        status = str(getattr(source, name, ""))
        if status.isdigit() and status != "0":
            return f"HTTP {status}", status.startswith("4") and status not in ("408", "425", "429")
    return redact(one_line(error)) or type(error).__name__, False


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
                raise ValueError(f"received more than {max_bytes:,} bytes")
            if received > size:
                size, last_progress = received, time.monotonic()
            if time.monotonic() - last_progress > timeout:
                raise TimeoutError(f"no data for {timeout:g} s after {size:,} bytes")
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


@functools.cache
def _filesystem(scheme: str) -> Any:
    """Returns fsspec's file system for a URL scheme. The library of the protocol reads the credentials."""
    if scheme not in SCHEMES:
        raise UserError(f"data.shards {scheme}://...: not one of {', '.join(SCHEMES)}")
    options: dict[str, Any] = {"skip_instance_cache": True}
    try:
        if scheme == "s3":  # one request per file, retried only according to RETRY_POLICY
            options |= {"max_concurrency": 1, "config_kwargs": {"retries": {"total_max_attempts": 1}}}
        elif scheme != "hf":
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None)  # the default limits a transfer to five minutes
            if scheme == "gs":
                # fsspec's default class queries the bucket type by gRPC, which hangs for minutes behind some firewalls.
                from gcsfs.core import GCSFileSystem

                return GCSFileSystem(requests_timeout=timeout, **options)
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
        import fsspec

        return fsspec.filesystem(scheme, **options)
    except ImportError:
        library = {"s3": "s3fs", "gs": "gcsfs"}.get(scheme, "aiohttp")
        extra = "gs" if scheme == "gs" else "remote"
        raise UserError(f"data.shards {scheme}://...: requires {library}: pip install 'vae_scale[{extra}]'") from None
