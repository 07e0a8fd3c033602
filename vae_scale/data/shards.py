"""A set of shards, and the manifest that says what they hold."""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vae_scale.data.shard_file import ENCODINGS, FORMAT_VERSION, Images, Layout, Shard, decode_shard, map_shard
from vae_scale.data.storage import Folder, Storage
from vae_scale.errors import UserError


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
    """

    storage: Storage
    encoding: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    shards: tuple[Shard, ...]
    fingerprint: str

    @staticmethod
    def open(location: str | Path) -> "ShardSet":
        """Reads the manifest at `location`. No shard is touched.

        Raises:
            UserError: there is no manifest, it is damaged, or of an unknown version.
        """
        storage = Folder(Path(location))
        try:
            return _from_manifest(storage, json.loads(storage.manifest()))
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

    def read(self, number: int) -> Images:
        """Images of shard `number`: uint8 [n, H, W, 3]. Mapped, not read, where the encoding is npy; else decoded.

        Raises:
            UserError: the file is missing, damaged or not what the manifest says.
        """
        shard = self.shards[number]
        with self.storage.open(shard) as file:
            if self.encoding == "npy":
                return map_shard(file, shard.samples, self.image_shape)
            return decode_shard(file, shard.samples, self.image_shape, self.encoding)

    def verify(self, number: int) -> None:
        """Reads shard `number` as a whole and compares it with its hashes.

        Raises:
            UserError: it is not what was packed.
        """
        shard = self.shards[number]
        images = self.read(number)
        with self.storage.open(shard) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                raise UserError(f"{file.name}: its sha256 is not the manifest's; the file is damaged, pack it again")
        lossless = self.encoding in ("npy", "png")
        if lossless and hashlib.sha256(images.tobytes()).hexdigest() != shard.pixels_sha256:
            raise UserError(f"{shard.name}: its pixels are not the manifest's; pack it again")


def _from_manifest(storage: Storage, content: Any) -> ShardSet:
    ours = content["vae_scale"]
    if ours["version"] != FORMAT_VERSION:
        raise UserError(
            f"{storage.location}/index.json: format version {ours['version']}, this vae_scale reads {FORMAT_VERSION}; "
            "pack again, or use the vae_scale that wrote it"
        )
    if ours["encoding"] not in ENCODINGS:
        raise ValueError(f"unknown encoding {ours['encoding']}")
    height, width, channels = (int(side) for side in ours["image_shape"])
    if not (0 < height <= 4096 and 0 < width <= 4096 and channels == 3):
        raise ValueError(f"image shape {ours['image_shape']}")
    shards = tuple(_shard(entry, ours["encoding"], (height, width, channels)) for entry in content["shardlist"])
    if not shards:
        raise ValueError("no shards")
    names = tuple(str(name) for name in ours["class_names"])
    return ShardSet(storage, ours["encoding"], (height, width, channels), names, shards, str(ours["fingerprint"]))


def _shard(entry: Any, encoding: str, shape: tuple[int, int, int]) -> Shard:
    url, labels = str(entry["url"]), tuple(int(label) for label in entry["labels"])
    # A manifest is not trusted with paths: shards lie beside it.
    if Path(url).name != url or url.startswith("."):
        raise ValueError(f"shard {url!r} is not a file name")
    samples, size = int(entry["nsamples"]), int(entry["filesize"])
    stride = Layout(encoding, shape).stride
    if samples <= 0 or len(labels) != samples or (stride and samples * stride > size):
        raise ValueError(f"shard {url}: {samples} samples, {len(labels)} labels, {size} bytes")
    hashes = str(entry["md5sum"]), str(entry["sha256"]), entry["pixels_sha256"]
    return Shard(url, str(entry["split"]), samples, size, *hashes, labels)
