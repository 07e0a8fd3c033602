"""Storage of a set of shards: a local folder or a URL."""

import errno
import json
import stat
import tempfile
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from urllib.parse import quote, urlsplit

from vae_scale.data.cache import Cache
from vae_scale.data.remote import download
from vae_scale.data.shard_file import Shard, ShardReadError
from vae_scale.errors import UserError, redact
from vae_scale.files import sha256_of

MAX_INDEX_BYTES = 2**30  # of an index.json


@dataclass(frozen=True)
class Storage:
    """Storage of a manifest and its shards. Remote shards are downloaded completely and verified.

    Attributes:
        root: Folder or URL of the manifest, including secrets.
        cache: Cache for downloaded shards.
    """

    root: str = field(repr=False)
    cache: Cache

    @property
    def location(self) -> str:
        """Folder or URL of the manifest, without secrets."""
        return redact(self.root).rstrip("/") if is_url(self.root) else str(Path(self.root))

    def resolve(self, name: str) -> str:
        """Returns the path or URL, including secrets, of a file in the folder of the manifest; a complete URL is unchanged."""
        if is_url(name):
            return name
        if not is_url(self.root):
            return str(Path(self.root, name))
        if not self.root.startswith("http"):
            return f"{self.root.rstrip('/')}/{name}"
        parts = urlsplit(self.root)  # its query, for example an access token, is kept
        return parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}").geturl()

    def read_manifest(self) -> str:
        """Returns the text of `index.json`.

        Raises:
            UserError: The file is missing or cannot be downloaded.
        """
        location = self.resolve("index.json")
        if is_url(location):
            hint = "check that this is a folder written by python -m vae_scale.pack, with its index.json"
            with tempfile.TemporaryDirectory() as folder:
                return download(location, Path(folder), hint, MAX_INDEX_BYTES, _check_json).read_text("utf-8")
        index = Path(location)
        if not index.is_file():
            raise UserError(f"data.shards {self.root}: contains no index.json; write shards with python -m vae_scale.pack")
        try:
            if (size := index.stat().st_size) > MAX_INDEX_BYTES:
                raise UserError(f"{index}: {size:,} bytes, the maximum is {MAX_INDEX_BYTES:,}")
            return index.read_text("utf-8")
        except OSError as error:
            raise UserError(f"{index}: {error.strerror}") from None

    def open(self, shard: Shard) -> BufferedReader:
        """Opens a local file of the shard, of the size in the manifest. Thread-safe.

        Raises:
            ShardReadError: The shard is missing, damaged or cannot be downloaded.
            UserError: No shard can be read, for example because the cache is full.
        """
        location = self.resolve(shard.url)
        if not is_url(location):
            return _open_file(Path(location), shard.filesize)

        def check(path: Path) -> str | None:
            if (size := path.stat().st_size) != shard.filesize:
                return f"received {size:,} bytes, expected {shard.filesize:,}"
            return None if sha256_of(path) == shard.sha256 else "its sha256 differs from the manifest"

        impact = f"{shard.samples:,} images of split {shard.split} cannot be read"
        return self.cache.open(shard, lambda folder: download(location, folder, impact, shard.filesize, check))


def is_url(location: str) -> bool:
    """Returns whether `location` is a URL instead of a path."""
    return "://" in location


def _check_json(path: Path) -> str | None:
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return "invalid JSON"
    return None


def _open_file(path: Path, size: int) -> BufferedReader:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would block
            reason = "not a file"
        elif status.st_size != size:
            reason = f"{status.st_size} bytes, expected {size}"
        else:
            return path.open("rb")
    except FileNotFoundError:
        reason = "missing, but listed in the manifest"
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        reason = str(error.strerror)
    raise ShardReadError(f"{path}: {reason}; copy or pack it again")
