"""A set of shards, and the manifest that says what they hold."""

import errno
import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from vae_scale.data.images import Images
from vae_scale.data.shard_file import ENCODINGS, FORMAT_VERSION, Layout, Shard, decode_shard, map_shard
from vae_scale.data.storage import SCHEMES, Cache, Storage, open_storage
from vae_scale.errors import UserError, shown


@dataclass(frozen=True)
class ShardSet:
    """Shards of one or more splits, and what their manifest says about them.

    Attributes:
        storage: Where the files are.
        encoding: One of `ENCODINGS`.
        image_shape: (H, W, 3) of every image.
        class_names: Of labels 0, 1, ...; may be empty.
        shards: In the order of the manifest.
        fingerprint: Identifies source and packing options.
        fit: Whether images are of other sizes, and are cut and resized to `image_shape` when they are read.
    """

    storage: Storage
    encoding: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    shards: tuple[Shard, ...]
    fingerprint: str
    fit: bool = False

    @staticmethod
    def open(location: str | Path, cache: Cache | None = None, commands: bool = True) -> "ShardSet":
        """Reads the manifest at `location`. No shard is touched.

        Args:
            location: A folder, a URL (http, https, s3, gs, hf), or `pipe:` and a command that writes the file `{}`.
            cache: For shards that are fetched; None for the user's own.
            commands: Whether the command of a `pipe:` may be run: not where the location comes with a model.

        Raises:
            UserError: there is no manifest, it cannot be fetched, it is damaged, of an unknown version, or of latents.
        """
        cache = cache or Cache()
        storage = open_storage(location, cache, commands)
        try:
            return _from_manifest(storage, json.loads(storage.manifest()), cache)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{storage.location}/index.json: damaged ({error!r}); pack again") from None

    @property
    def location(self) -> str:
        """Where the set is, as the user named it."""
        return self.storage.location

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """Number of the first sample of each shard, and the number of all samples at the end: int64 [shards + 1]."""
        return np.concatenate([[0], np.cumsum([shard.samples for shard in self.shards])]).astype(np.int64)

    @cached_property
    def labels(self) -> npt.NDArray[np.int64]:
        """Label of each sample; -1 for none: int64 [samples]."""
        return np.concatenate([np.asarray(shard.labels, np.int64) for shard in self.shards])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def splits(self) -> dict[str, int]:
        """Images of each split."""
        counts: dict[str, int] = {}
        for shard in self.shards:
            counts[shard.split] = counts.get(shard.split, 0) + shard.samples
        return counts

    def select(self, *splits: str) -> "ShardSet":
        """The shards of some splits; those that the set lacks are left out.

        Raises:
            UserError: it lacks all of them.
        """
        shards = tuple(shard for shard in self.shards if shard.split in splits)
        if not shards:
            raise UserError(f"{self.location}: has no split {' or '.join(splits)}; it has {', '.join(self.splits)}")
        return replace(self, shards=shards)

    def numbers(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Number of the shard that holds each of some samples: int64 [len(rows)]."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def images(self, rows: npt.NDArray[np.int64]) -> Images:
        """A few samples, read shard by shard: uint8 [len(rows), H, W, 3]. For many, a `Reader` loads ahead.

        Raises:
            UserError: as `read`.
        """
        images = np.empty((len(rows), *self.image_shape), np.uint8)
        numbers = self.numbers(rows)
        for number in np.unique(numbers).tolist():
            inside = numbers == number
            images[inside] = self.read(number)[rows[inside] - self.starts[number]]
        return images

    def read(self, number: int) -> Images:
        """Images of shard `number`: uint8 [n, H, W, 3]. Mapped, not read, where the encoding is npy; else decoded.

        Raises:
            UserError: the file is missing, damaged or not what the manifest says.
        """
        shard = self.shards[number]
        try:
            with self.storage.open(shard) as file:
                if self.encoding == "npy":
                    return map_shard(file, shard.samples, self.image_shape)
                return decode_shard(file, shard.samples, self.image_shape, self.fit)
        except ValueError as error:
            raise UserError(f"{self.place(shard)}: {error}; copy or pack it again") from None
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            text = f"this process may not have files of {len(self.shards):,} shards open; lower data.window, or raise ulimit -n"
            raise UserError(f"{self.location}: {text}") from None

    def place(self, shard: Shard) -> str:
        """Where a shard is, as people are told."""
        return shown(shard.url) if "://" in shard.url else f"{self.location}/{shard.url}"


def _from_manifest(storage: Storage, content: Any, cache: Cache) -> ShardSet:
    ours = content["vae_scale"]
    if ours["version"] != FORMAT_VERSION:
        raise UserError(
            f"{storage.location}/index.json: format version {ours['version']}, this vae_scale reads {FORMAT_VERSION}; "
            "pack again, or use the vae_scale that wrote it"
        )
    if ours.get("content") == "latents":
        raise UserError(f"{storage.location}/index.json: holds latents, not images; give the shards they were made of")
    if ours["encoding"] not in ENCODINGS:
        raise ValueError(f"unknown encoding {ours['encoding']}")
    height, width, channels = (int(side) for side in ours["image_shape"])
    if not (0 < height <= 4096 and 0 < width <= 4096 and channels == 3):
        raise ValueError(f"image shape {ours['image_shape']}")
    shards = tuple(_shard(entry, ours["encoding"], (height, width, channels)) for entry in content["shardlist"])
    if not shards:
        raise ValueError("no shards")
    if any("://" in shard.url for shard in shards):
        from vae_scale.data.remote import Elsewhere

        storage = Elsewhere(storage, cache)
    names = tuple(str(name) for name in ours["class_names"])
    fit = bool(ours.get("fit", False))
    if fit and (height != width or ours["encoding"] == "npy"):
        raise ValueError(f"images are not resized to {width}x{height} of {ours['encoding']}")
    return ShardSet(storage, ours["encoding"], (height, width, channels), names, shards, str(ours["fingerprint"]), fit)


def _shard(entry: Any, encoding: str, shape: tuple[int, int, int]) -> Shard:
    url, labels = _checked(str(entry["url"])), tuple(int(label) for label in entry["labels"])
    samples, size = int(entry["nsamples"]), int(entry["filesize"])
    stride = Layout(encoding, shape).stride
    if samples <= 0 or size <= 0 or len(labels) != samples or (stride and samples * stride > size):
        raise ValueError(f"shard {shown(url)}: {samples} samples, {len(labels)} labels, {size} bytes")
    hashes = str(entry["md5sum"]), str(entry["sha256"]), entry["pixels_sha256"]
    if not re.fullmatch(r"[0-9a-f]{64}", hashes[1]):  # it becomes a file name
        raise ValueError(f"shard {shown(url)}: its sha256 is no such hash")
    return Shard(url, str(entry["split"]), samples, size, *hashes, labels)


def _checked(url: str) -> str:
    """A shard's place, as far as a manifest is trusted with it: no path and no command, but a file beside it or a URL."""
    scheme, whole, _ = url.partition("://")
    path = urlsplit(url).path if whole else url
    name = path.rpartition("/")[2]
    good = scheme in SCHEMES and ".." not in path.split("/") if whole else name == url and ":" not in url
    if not (good and name and not name.startswith(".") and url.isprintable()):
        raise ValueError(f"shard {shown(url)!r} is not a file name, nor a URL of {', '.join(SCHEMES)}")
    return url
