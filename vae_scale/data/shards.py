"""A set of shards, and the manifest that says what they hold."""

import errno
import json
import logging
import math
import re
import threading
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from vae_scale.data.images import Images
from vae_scale.data.shard_file import ENCODINGS, FORMAT_VERSION, MOST_SIDE, Layout, Shard, decode_shard, map_shard
from vae_scale.data.storage import SCHEMES, Cache, Storage, Unreadable, open_storage
from vae_scale.errors import UserError, one_line, shown

MOST_LABEL = 2**20  # tables have a row for each
SHARD_BYTES = 2**34  # of the images of a shard that is decoded as a whole
logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Missing:
    """What could not be read of a set, where training goes on without it.

    Attributes:
        images: How often an image was wanted and another one came in its place.
    """

    images: int = 0
    _told: set[str] = field(default_factory=set, repr=False)
    _telling: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def tell(self, place: str, error: Exception) -> None:
        """Warns of a bad shard, the first time. Any thread may call it."""
        with self._telling:
            first, self._told = place not in self._told, self._told | {place}
        if first:
            logger.warning("%s; other images take the place of its images (data.on_bad_shard is skip)", one_line(error))


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
        missing: Counts what bad shards held; None where a bad shard is an error.
    """

    storage: Storage
    encoding: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    shards: tuple[Shard, ...]
    fingerprint: str
    fit: bool = False
    missing: Missing | None = None

    @staticmethod
    def open(location: str | Path, cache: Cache | None = None, commands: bool = True, on_bad_shard: str = "stop") -> "ShardSet":
        """Reads the manifest at `location`. No shard is touched.

        Args:
            location: A folder, a URL (http, https, s3, gs, hf), or `pipe:` and a command that writes the file `{}`.
            cache: For shards that are fetched; None for the user's own.
            commands: Whether the command of a `pipe:` may be run: not where the location comes with a model.
            on_bad_shard: stop, or skip: other images take the place of those that a bad shard held, and are counted.

        Raises:
            UserError: there is no manifest, it cannot be fetched, it is damaged, of an unknown version, or of latents.
        """
        cache = cache or Cache()
        storage = open_storage(location, cache, commands)
        try:
            shards = _from_manifest(storage, json.loads(storage.manifest()), cache)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{storage.location}/index.json: damaged ({error!r:.300}); pack again") from None
        return replace(shards, missing=Missing()) if on_bad_shard == "skip" else shards

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

    def names(self, rows: npt.NDArray[np.int64]) -> list[str]:
        """Where each of some samples lies: the shard's file, and which of its samples it is, from 0."""
        numbers = self.numbers(rows)
        places = zip(numbers.tolist(), (rows - self.starts[numbers]).tolist(), strict=True)
        return [f"{self.shards[number].url}[{position}]" for number, position in places]

    def images(self, rows: npt.NDArray[np.int64]) -> Images:
        """A few samples, read shard by shard: uint8 [len(rows), H, W, 3]. For many, a `Reader` loads ahead.

        Raises:
            UserError: as `read`.
        """
        images = np.empty((len(rows), *self.image_shape), np.uint8)
        numbers = self.numbers(rows)
        for number in np.unique(numbers).tolist():
            inside = numbers == number
            found, other = self.read_or_replace(number)
            images[inside] = found[self.replaced(rows[inside], numbers[inside], other) - self.starts[other]]
            self.count(inside.sum() if other != number else 0)
        return images

    def read_or_replace(self, number: int) -> tuple[Images, int]:
        """Images of shard `number`, and its number; where bad shards are skipped, of the next one that is good.

        What takes its place depends on nothing else: not on the process, on the window or on where the run began.

        Raises:
            UserError: as `read`; or no shard is good.
        """
        every = len(self.shards)
        for other in (*range(number, every), *range(number)):
            try:
                return self.read(other), other
            except Unreadable as error:
                if self.missing is None:
                    raise
                self.missing.tell(self.place(self.shards[other]), error)
                last = error
        raise UserError(f"{self.location}: not one of its {every:,} shards can be read: {last}")

    def replaced(
        self, rows: npt.NDArray[np.int64], numbers: npt.NDArray[np.int64], others: npt.NDArray[np.int64] | int
    ) -> npt.NDArray[np.int64]:
        """The samples that stand for samples `rows` of shards `numbers` where these are read from shards `others`."""
        samples = np.diff(self.starts)[others]
        return self.starts[others] + (rows - self.starts[numbers]) % samples

    def count(self, images: int) -> None:
        """Notes that some images were replaced."""
        if self.missing:
            self.missing.images += int(images)

    def read(self, number: int) -> Images:
        """Images of shard `number`: uint8 [n, H, W, 3]. Mapped, not read, where the encoding is npy; else decoded.

        Raises:
            Unreadable: the file is missing, damaged or not what the manifest says.
            UserError: no more files may be open, or the cache is full.
        """
        shard = self.shards[number]
        try:
            with self.storage.open(shard) as file:
                if self.encoding == "npy":
                    return map_shard(file, shard.samples, self.image_shape)
                return decode_shard(file, shard.samples, self.image_shape, self.fit)
        except ValueError as error:
            raise Unreadable(f"{self.place(shard)}: {error}; copy or pack it again") from None
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
            f"{storage.location}/index.json: format version {ours['version']!r:.40}, this vae_scale reads {FORMAT_VERSION}; "
            "pack again, or use the vae_scale that wrote it"
        )
    if ours.get("content") == "latents":
        raise UserError(f"{storage.location}/index.json: holds latents, not images; give the shards they were made of")
    if ours["encoding"] not in ENCODINGS:
        raise ValueError(f"unknown encoding {ours['encoding']}")
    height, width, channels = (_whole("image shape", side, 1, MOST_SIDE) for side in ours["image_shape"])
    if channels != 3:
        raise ValueError(f"image shape {ours['image_shape']}")
    shards = tuple(_shard(entry, ours["encoding"], (height, width, channels)) for entry in content["shardlist"])
    if not shards:
        raise ValueError("no shards")
    if any("://" in shard.url for shard in shards):
        from vae_scale.data.remote import Elsewhere

        storage = Elsewhere(storage, cache)
    # What no terminal can print (a folder's name, say, that is not UTF-8) is printed as question marks.
    names = tuple(_text("class name", name).encode(errors="replace").decode() for name in ours["class_names"])
    fit = bool(ours.get("fit", False))
    if fit and (height != width or ours["encoding"] == "npy"):
        raise ValueError(f"images are not resized to {width}x{height} of {ours['encoding']}")
    return ShardSet(
        storage, ours["encoding"], (height, width, channels), names, shards, _text("fingerprint", ours["fingerprint"]), fit
    )


def _shard(entry: Any, encoding: str, shape: tuple[int, int, int]) -> Shard:
    url, labels = _checked(_text("url", entry["url"])), tuple(entry["labels"])
    if set(map(type, labels)) != {int} or min(labels) < -1 or max(labels) > MOST_LABEL:
        raise ValueError(f"shard {shown(url)}: its labels are not all whole numbers from -1 to {MOST_LABEL:,}")
    samples, size = _whole("nsamples", entry["nsamples"], 1, 2**40), _whole("filesize", entry["filesize"], 1, 2**60)
    stride = Layout(encoding, shape).stride
    if len(labels) != samples or (stride and samples * stride > size):
        raise ValueError(f"shard {shown(url)}: {samples} samples, {len(labels)} labels, {size} bytes")
    if not stride and samples * math.prod(shape) > SHARD_BYTES:
        raise ValueError(f"shard {shown(url)}: its images take more than {SHARD_BYTES / 2**30:g} GiB; make smaller shards")
    split, pixels = _text("split", entry["split"]), entry["pixels_sha256"]
    if not (split and split.isprintable()):
        raise ValueError(f"shard {shown(url)}: its split has the name {split!r}")
    # sha256 becomes a file name.
    hashes = (entry["md5sum"], 32), (entry["sha256"], 64), (pixels if pixels is not None else "0" * 64, 64)
    if not all(re.fullmatch(r"[0-9a-f]*", _text("hash", text)) and len(text) == digits for text, digits in hashes):
        raise ValueError(f"shard {shown(url)}: its md5sum, sha256 or pixels_sha256 is no such hash")
    return Shard(url, split, samples, size, entry["md5sum"], entry["sha256"], pixels, labels)


def _whole(what: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} {value!r:.40} is no whole number from {least} to {most}")
    return value


def _text(what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} {value!r:.40} is no text")
    return value


def _checked(url: str) -> str:
    """A shard's place, as far as a manifest is trusted with it: no path and no command, but a file beside it or a URL."""
    scheme, whole, _ = url.partition("://")
    path = urlsplit(url).path if whole else url
    name = path.rpartition("/")[2]
    good = scheme in SCHEMES and ".." not in path.split("/") if whole else name == url and ":" not in url
    if not (good and name and not name.startswith(".") and url.isprintable()):
        raise ValueError(f"shard {shown(url)!r} is not a file name, nor a URL of {', '.join(SCHEMES)}")
    return url
