"""Storage of a set of shards."""

import errno
import os
import stat
from abc import ABC, abstractmethod
from io import BufferedReader
from pathlib import Path

from vae_scale.data.shard_file import Shard
from vae_scale.errors import UserError

SCHEMES = ("http", "https", "s3", "gs", "hf")  # of supported URLs
MAX_INDEX_BYTES = 2**30  # of an index.json


class ShardReadError(UserError):
    """A shard is missing, damaged or cannot be downloaded. Other shards may be readable."""


class Storage(ABC):
    """Storage of a manifest and its shards.

    Attributes:
        location: Folder or URL, without secrets.
        is_local: Whether all files are in a local folder.
    """

    location: str
    is_local: bool

    @abstractmethod
    def read_manifest(self) -> str:
        """Returns the text of `index.json`.

        Raises:
            UserError: The file is missing or cannot be downloaded.
        """

    @abstractmethod
    def open(self, shard: Shard) -> BufferedReader:
        """Opens a local file of the shard, of the size in the manifest. Thread-safe.

        Raises:
            ShardReadError: The shard is missing, damaged or cannot be downloaded.
            UserError: No shard can be read, for example because the cache is full.
        """


class LocalStorage(Storage):
    """A folder on this machine."""

    is_local = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.location = str(folder)

    def read_manifest(self) -> str:
        index = self.folder / "index.json"
        if not index.is_file():
            raise UserError(f"data.shards {self.folder}: contains no index.json; write shards with python -m vae_scale.pack")
        try:
            if (size := index.stat().st_size) > MAX_INDEX_BYTES:
                raise UserError(f"{index}: {size:,} bytes, the maximum is {MAX_INDEX_BYTES:,}")
            return index.read_text("utf-8")
        except OSError as error:
            raise UserError(f"{index}: {error.strerror}") from None

    def open(self, shard: Shard) -> BufferedReader:
        path = self.folder / shard.url
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would block
                raise ShardReadError(f"{path}: not a file; copy or pack it again")
            file = path.open("rb")
        except FileNotFoundError:
            raise ShardReadError(f"{path}: missing, but listed in the manifest; copy or pack it again") from None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            raise ShardReadError(f"{path}: {error.strerror}; copy or pack it again") from None
        size = os.fstat(file.fileno()).st_size
        if size != shard.filesize:
            file.close()
            raise ShardReadError(f"{path}: {size} bytes, expected {shard.filesize}; copy or pack it again")
        return file
