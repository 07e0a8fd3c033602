"""A set of shards and its manifest."""

import errno
import json
import logging
import math
import re
import threading
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from vae_scale.data.cache import Cache
from vae_scale.data.images import Images, Rows
from vae_scale.data.remote import SCHEMES
from vae_scale.data.shard_file import (
    ENCODINGS,
    FORMAT_VERSION,
    MAX_IMAGE_SIDE,
    Layout,
    Shard,
    ShardReadError,
    decode_shard,
    map_shard,
)
from vae_scale.data.storage import Storage, is_url
from vae_scale.errors import UserError, one_line, redact

MAX_LABEL = 2**20  # embedding tables have a row per label
MAX_DECODED_BYTES = 2**34  # of the decoded images of a shard
logger = logging.getLogger(__name__)


@dataclass(eq=False)
class BadShards:
    """The unreadable shards of a set, if `data.on_bad_shard` is skip."""

    replaced_images: int = 0  # images for which another image was used
    _warned: set[str] = field(default_factory=set, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def warn_once(self, location: str, error: Exception) -> None:
        """Logs a warning on the first call for a shard. Thread-safe."""
        with self._lock:
            is_new = location not in self._warned
            self._warned.add(location)
        if is_new:
            logger.warning("%s; its images are replaced (data.on_bad_shard is skip)", one_line(error))


@dataclass(frozen=True)
class ShardSet:
    """Shards of one or more splits.

    Attributes:
        storage: Storage of the manifest and the shards.
        encoding: One of `ENCODINGS`.
        image_shape: (H, W, 3) of every image.
        class_names: Names of labels 0, 1, ...; may be empty.
        shards: In the order of the manifest.
        fingerprint: Hash of the source and the packing options.
        resize: Whether images are cropped and resized to `image_shape` when they are read.
        bad_shards: Unreadable shards; None if an unreadable shard is an error.
    """

    storage: Storage
    encoding: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    shards: tuple[Shard, ...]
    fingerprint: str
    resize: bool = False
    bad_shards: BadShards | None = None

    @staticmethod
    def open(location: str | Path, cache: Cache | None = None, on_bad_shard: str = "stop") -> "ShardSet":
        """Reads the manifest at `location`. Shards are not read.

        Args:
            location: A folder, or a URL (http, https, s3, gs, hf).
            cache: Cache for downloaded shards; defaults to the user's cache.
            on_bad_shard: "stop" raises an error for an unreadable shard; "skip" replaces its images.

        Raises:
            UserError: The manifest is missing, damaged, of an unknown version, or of latents.
        """
        storage = Storage(str(location), cache or Cache())
        try:
            shards = _parse_manifest(storage, json.loads(storage.read_manifest()))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{storage.location}/index.json: damaged ({error!r:.300}); pack again") from None
        return replace(shards, bad_shards=BadShards()) if on_bad_shard == "skip" else shards

    @property
    def location(self) -> str:
        """Folder or URL of the set, without secrets."""
        return self.storage.location

    @property
    def is_local(self) -> bool:
        """Whether all shards are files on this machine."""
        return not any(map(is_url, [self.storage.root, *(shard.url for shard in self.shards)]))

    @cached_property
    def starts(self) -> Rows:
        """Row of the first sample of each shard, followed by the number of samples: int64 [shards + 1]."""
        return np.concatenate([[0], np.cumsum([shard.samples for shard in self.shards])]).astype(np.int64)

    @cached_property
    def labels(self) -> Rows:
        """Label of each sample; -1 for none: int64 [samples]."""
        return np.concatenate([np.asarray(shard.labels, np.int64) for shard in self.shards])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def splits(self) -> dict[str, int]:
        """Number of images of each split."""
        counts: Counter[str] = Counter()
        for shard in self.shards:
            counts[shard.split] += shard.samples
        return dict(counts)

    def select(self, *splits: str) -> "ShardSet":
        """Returns the shards of these splits. Missing splits are ignored.

        Raises:
            UserError: All splits are missing.
        """
        shards = tuple(shard for shard in self.shards if shard.split in splits)
        if not shards:
            raise UserError(f"{self.location}: has no split {' or '.join(splits)}; it has {', '.join(self.splits)}")
        return replace(self, shards=shards)

    def shard_indices(self, rows: Rows) -> Rows:
        """Returns the shard index of each row: int64 [len(rows)]."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def sample_names(self, rows: Rows) -> list[str]:
        """Returns FILE[POSITION] for each row: the file of its shard and its position in the shard."""
        indices = self.shard_indices(rows)
        positions = (rows - self.starts[indices]).tolist()
        return [f"{self.shards[index].url}[{position}]" for index, position in zip(indices.tolist(), positions, strict=True)]

    def location_of(self, shard: Shard) -> str:
        """Returns the location of a shard, without secrets."""
        return redact(shard.url) if is_url(shard.url) else f"{self.location}/{shard.url}"

    def load_images(self, rows: Rows) -> Images:
        """Reads a few samples, shard by shard: uint8 [len(rows), H, W, 3]. `Reader` is faster for many.

        Raises:
            UserError: See `read`.
        """
        images = np.empty((len(rows), *self.image_shape), np.uint8)
        indices = self.shard_indices(rows)
        for index in np.unique(indices).tolist():
            mask = indices == index
            array, source = self.read_or_replace(index)
            images[mask] = array[(rows[mask] - self.starts[index]) % len(array)]
            if source != index:
                self.count_replaced(mask.sum())
        return images

    def read_or_replace(self, index: int) -> tuple[Images, int]:
        """Reads a shard or, if it is unreadable and bad shards are skipped, the next readable shard.

        Row `i` of the shard is replaced by row `i % n` of the images that are returned, so the replacement does not depend on
        the process, the shuffle window or the start of the run.

        Returns:
            The images and the index of the shard that was read.

        Raises:
            UserError: See `read`; or all shards are unreadable.
        """
        count = len(self.shards)
        for candidate in (*range(index, count), *range(index)):
            try:
                return self.read(candidate), candidate
            except ShardReadError as error:
                if self.bad_shards is None:
                    raise
                self.bad_shards.warn_once(self.location_of(self.shards[candidate]), error)
                last = error
        raise UserError(f"{self.location}: none of its {count:,} shards can be read: {last}")

    def count_replaced(self, count: int) -> None:
        """Adds to the number of replaced images."""
        if self.bad_shards:
            self.bad_shards.replaced_images += int(count)

    def read(self, index: int) -> Images:
        """Returns the images of a shard: uint8 [n, H, W, 3], memory-mapped if the encoding is npy, else decoded.

        Raises:
            ShardReadError: The file is missing, damaged or differs from the manifest.
            UserError: Too many files are open, or the cache is full.
        """
        shard = self.shards[index]
        try:
            with self.storage.open(shard) as file:
                if self.encoding == "npy":
                    return map_shard(file, shard.samples, Layout(self.image_shape))
                return decode_shard(file, shard.samples, self.image_shape, self.resize)
        except ValueError as error:
            raise ShardReadError(f"{self.location_of(shard)}: {error}; copy or pack it again") from None
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            advice = "lower data.shuffle_window, or raise ulimit -n"
            raise UserError(f"{self.location}: too many open files for {len(self.shards):,} shards; {advice}") from None


def _parse_manifest(storage: Storage, manifest: Any) -> ShardSet:
    header = manifest["vae_scale"]
    if header["version"] != FORMAT_VERSION:
        versions = f"format version {header['version']!r:.40}, this version of vae_scale reads {FORMAT_VERSION}"
        raise UserError(f"{storage.location}/index.json: {versions}; pack again, or use the version that wrote it")
    if header.get("content") == "latents":
        raise UserError(f"{storage.location}/index.json: contains latents, not images; pass the shards they were encoded from")
    if header["encoding"] not in ENCODINGS:
        raise ValueError(f"unknown encoding {header['encoding']}")
    height, width, channels = (_check_int("image shape", side, 1, MAX_IMAGE_SIDE) for side in header["image_shape"])
    if channels != 3:
        raise ValueError(f"image shape {header['image_shape']}")
    shards = tuple(_parse_shard(entry, header["encoding"], (height, width, channels)) for entry in manifest["shardlist"])
    if not shards:
        raise ValueError("no shards")
    # Characters that cannot be encoded, for example of a folder name that is not UTF-8, are replaced by question marks.
    names = tuple(_check_str("class name", name).encode(errors="replace").decode() for name in header["class_names"])
    resize = bool(header.get("fit", False))
    if resize and (height != width or header["encoding"] == "npy"):
        raise ValueError(f"{header['encoding']} images cannot be resized to {width}x{height}")
    fingerprint = _check_str("fingerprint", header["fingerprint"])
    return ShardSet(storage, header["encoding"], (height, width, channels), names, shards, fingerprint, resize)


def _parse_shard(entry: Any, encoding: str, shape: tuple[int, int, int]) -> Shard:
    url, labels = _check_url(_check_str("url", entry["url"])), tuple(entry["labels"])
    name = f"shard {redact(url)}"
    if set(map(type, labels)) != {int} or min(labels) < -1 or max(labels) > MAX_LABEL:
        raise ValueError(f"{name}: labels must be integers from -1 to {MAX_LABEL:,}")
    samples, size = _check_int("nsamples", entry["nsamples"], 1, 2**40), _check_int("filesize", entry["filesize"], 1, 2**60)
    is_array = encoding == "npy"
    if len(labels) != samples or (is_array and samples * Layout(shape).stride > size):
        raise ValueError(f"{name}: {samples} samples, {len(labels)} labels, {size} bytes")
    if not is_array and samples * math.prod(shape) > MAX_DECODED_BYTES:
        raise ValueError(f"{name}: its images take more than {MAX_DECODED_BYTES / 2**30:g} GiB; make smaller shards")
    split, pixels = _check_str("split", entry["split"]), entry["pixels_sha256"]
    if not (split and split.isprintable()):
        raise ValueError(f"{name}: invalid split name {split!r}")
    # The sha256 is used as a file name.
    hashes = (entry["md5sum"], 32), (entry["sha256"], 64), (pixels if pixels is not None else "0" * 64, 64)
    if not all(re.fullmatch(r"[0-9a-f]*", _check_str("hash", text)) and len(text) == digits for text, digits in hashes):
        raise ValueError(f"{name}: invalid md5sum, sha256 or pixels_sha256")
    return Shard(url, split, samples, size, entry["md5sum"], entry["sha256"], pixels, labels)


def _check_int(name: str, value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} {value!r:.40} is not an integer from {low} to {high}")
    return value


def _check_str(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} {value!r:.40} is not a string")
    return value


def _check_url(url: str) -> str:
    """Raises an error unless `url` is a plain file name or a complete URL: manifests are not trusted."""
    scheme, has_scheme, _ = url.partition("://")
    path = urlsplit(url).path if has_scheme else url
    name = path.rpartition("/")[2]
    is_valid = scheme in SCHEMES and ".." not in path.split("/") if has_scheme else name == url and ":" not in url
    if not (is_valid and name and not name.startswith(".") and url.isprintable()):
        raise ValueError(f"shard {redact(url)!r} is neither a file name nor a URL of {', '.join(SCHEMES)}")
    return url
