"""Where the files of a set of shards are."""

import os
from abc import ABC, abstractmethod
from io import BufferedReader
from pathlib import Path

from vae_scale.data.shard_file import Shard
from vae_scale.errors import UserError


class Storage(ABC):
    """A place that holds a manifest and shards.

    Attributes:
        location: As the user named it.
        local: Whether files can be read in place.
    """

    location: str
    local: bool

    @abstractmethod
    def manifest(self) -> str:
        """The text of `index.json`.

        Raises:
            UserError: there is none.
        """

    @abstractmethod
    def open(self, shard: Shard) -> BufferedReader:
        """A local file that holds a shard, of the size that the manifest says. Any thread may call it.

        Raises:
            UserError: the shard is missing, damaged or cannot be fetched.
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
        return index.read_text()

    def open(self, shard: Shard) -> BufferedReader:
        path = self.folder / shard.url
        try:
            file = path.open("rb")
        except FileNotFoundError:
            raise UserError(f"{path}: missing, though the manifest names it; copy or pack it again") from None
        size = os.fstat(file.fileno()).st_size
        if size != shard.filesize:
            file.close()
            raise UserError(f"{path}: {size} bytes, the manifest says {shard.filesize}; copy or pack it again")
        return file
