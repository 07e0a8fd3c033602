"""Writes the manifest of an existing WebDataset in one pass."""

import hashlib
import io
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vae_scale.data.cache import Cache
from vae_scale.data.images import FORMATS, center_crop_resize, decode_image, open_image
from vae_scale.data.parts import fingerprint, write_index
from vae_scale.data.shard_file import FORMAT_VERSION, MAX_IMAGE_SIDE, SUFFIXES, iter_members, member_type
from vae_scale.data.shards import MAX_LABEL
from vae_scale.data.storage import SCHEMES
from vae_scale.errors import UserError, one_line, redact

TEST_FRACTION = 10  # one shard in this many is assigned to the test split if no splits are named
TAR_END = bytes(2 * 512)  # last bytes of a complete tar


@dataclass
class _ShardStats:
    """A shard's entry in the manifest, and counts of its image types and shapes."""

    record: dict[str, Any] = field(default_factory=dict)
    types: Counter[str] = field(default_factory=Counter)
    shapes: Counter[tuple[int, ...]] = field(default_factory=Counter)


def index(sources: list[str], out: Path | None, resolution: int | None, workers: int) -> Path:
    """Writes `index.json` for tars of images (jpg, png, webp), which can then be read like packed shards.

    Labels are read from `.cls` members; samples without one have label -1.

    Args:
        sources: Files or URLs with braces ({000..127}), either all as SPLIT=URLS or all without a split. Without splits, the
            last tenth of the shards is the test split and the rest the train split.
        out: Folder of the manifest; None for the folder of the files.
        resolution: Size to which images are cropped and resized when they are read; None if all images have the same size.
        workers: Shards read in parallel.

    Returns:
        The folder of the manifest.

    Raises:
        UserError: A shard cannot be read or contains no images; an image cannot be decoded; sizes differ and `resolution` is
            None; or `out` is not the folder of the files.
    """
    urls = _expand(sources)
    folder = _manifest_folder([url for url, _ in urls], out)
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(urls), unit=" shards", desc="indexing") as bar:
        shards = []
        try:
            for stats in pool.map(lambda item: _read_shard(item[0], item[1], resolution), urls):
                shards.append(stats)
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    shapes = sum((stats.shapes for stats in shards), Counter[tuple[int, ...]]())
    if len(shapes) > 1:
        (first, _), (second, _) = shapes.most_common(2)
        url = redact(next(stats.record["url"] for stats in shards if second in stats.shapes))
        sizes = f"image size is {second[1]}x{second[0]}, but most images are {first[1]}x{first[0]}"
        raise UserError(f"{url}: {sizes}; use --resolution R to crop and resize them when they are read")
    records = [stats.record for stats in shards]
    info = {
        "version": FORMAT_VERSION,
        "fingerprint": fingerprint([resolution, [(record["sha256"], record["split"]) for record in records]]),
        "encoding": sum((stats.types for stats in shards), Counter[str]()).most_common(1)[0][0],
        "image_shape": next(iter(shapes)),
        "stride": None,
        "offset": None,
        "fit": resolution is not None,
        "class_names": [],
        "sources": {},
        "splits": {split: sum(r["nsamples"] for r in records if r["split"] == split) for _, split in urls},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_index(folder, folder.resolve().name, records, info)
    return folder


def _expand(sources: list[str]) -> list[tuple[str, str]]:
    """Returns the URL and split of each shard."""
    from braceexpand import braceexpand

    splits: dict[str, list[str]] = {}
    for source in sources:
        split, equals, pattern = source.partition("=")
        if not equals or not split.isidentifier():
            split, pattern = "", source
        try:
            splits.setdefault(split, []).extend(braceexpand(pattern))
        except ValueError:  # its message contains the pattern, which may contain secrets
            raise UserError(f"--index {redact(pattern)}: unbalanced braces") from None
    if "" in splits:
        if len(splits) > 1:
            raise UserError("--index: give a split for all sources (train=URLS test=URLS) or for none")
        urls = splits.pop("")
        num_train = len(urls) - (-(-len(urls) // TEST_FRACTION) if len(urls) > 1 else 0)
        splits = {"train": urls[:num_train], "test": urls[num_train:]}
    pairs = [(url, split) for split, urls in splits.items() for url in urls]
    if repeated := [url for url, count in Counter(url for url, _ in pairs).items() if count > 1]:
        raise UserError(f"--index: {redact(repeated[0])} is listed twice")
    return pairs


def _manifest_folder(urls: list[str], out: Path | None) -> Path:
    """Returns the folder of the manifest, which refers to local files by name and to remote files by URL."""
    for url in urls:
        scheme, separator, _ = url.partition("://")
        if url.startswith("pipe:") or (separator and scheme not in SCHEMES):
            raise UserError(f"--index {redact(url)}: must be a file, or a URL of {', '.join(SCHEMES)}")
    folders = {Path(url).parent.resolve(): Path(url).parent for url in urls if "://" not in url}
    if len(folders) > 1:
        raise UserError("--index: the files are in several folders; index each folder separately")
    if folders:
        ((resolved, folder),) = folders.items()
        if out is not None and out.resolve() != resolved:
            raise UserError(f"--out {out}: index.json must be in the folder of the shards, {folder}; omit --out")
        return folder
    if out is None:
        raise UserError("--out DIR is missing: the folder of index.json")
    return out


def _read_shard(url: str, split: str, resolution: int | None) -> _ShardStats:
    """Reads a shard and decodes all of its images."""
    if "://" not in url:
        path = Path(url)
        try:
            return _scan(path, path.name, split, resolution)
        except (OSError, ValueError) as error:
            raise UserError(f"{url}: {getattr(error, 'strerror', None) or one_line(error)}") from None
    from vae_scale.data.remote import RemoteStorage

    with tempfile.TemporaryDirectory() as folder:
        path = RemoteStorage(url.rpartition("/")[0], Cache()).download(url, Path(folder))
        try:
            return _scan(path, url, split, resolution)
        except ValueError as error:
            raise UserError(f"{redact(url)}: {one_line(error)}") from None


def _scan(path: Path, url: str, split: str, resolution: int | None) -> _ShardStats:
    labels: dict[str, int] = {}
    keys: list[str] = []
    stats = _ShardStats()
    if path.exists() and not path.is_file():
        raise ValueError("not a file")
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - len(TAR_END)))
        if size < len(TAR_END) or file.read() != TAR_END:  # also detects a tar that is cut between two members
            raise ValueError("has no end-of-archive marker; it is truncated or compressed")
        for member, content in iter_members(file):
            kind = member_type(member)
            key = member[: len(member) - len(kind)]
            try:
                if kind == "cls":
                    labels[key] = int(content)
                    if not -1 <= labels[key] <= MAX_LABEL:
                        raise ValueError(f"a label must be from -1 to {MAX_LABEL:,}")
                elif f".{kind}" in SUFFIXES:
                    keys.append(key)
                    stats.types["jpg" if kind == "jpeg" else kind] += 1
                    stats.shapes[_decoded_shape(content, resolution)] += 1
            except ValueError as error:
                raise ValueError(f"{member} cannot be read ({error}); repair or remove it") from None
        if not keys:
            raise ValueError(f"contains no images ({', '.join(SUFFIXES)})")
        if len(set(keys)) < len(keys):
            raise ValueError("a sample has several images, or two samples have the same key")
        digests = {}
        for algorithm in ("md5", "sha256"):
            file.seek(0)
            digests[algorithm] = hashlib.file_digest(file, algorithm).hexdigest()
    stats.record = {
        "url": url,
        "nsamples": len(keys),
        "filesize": size,
        "md5sum": digests["md5"],
        "sha256": digests["sha256"],
        "pixels_sha256": None,
        "split": split,
        "labels": [labels.get(key, -1) for key in keys],
    }
    return stats


def _decoded_shape(content: bytes, resolution: int | None) -> tuple[int, ...]:
    """Decodes an image, to detect damage before training, and returns the shape it will have when it is read."""
    if resolution is not None:
        return center_crop_resize(io.BytesIO(content), resolution).shape
    with open_image(io.BytesIO(content), FORMATS) as image:
        height, width = image.height, image.width
    if max(height, width) > MAX_IMAGE_SIDE:
        raise ValueError(f"it is {width}x{height}, more than {MAX_IMAGE_SIDE} pixels per side; use --resolution R to resize it")
    pixels = np.empty((height, width, 3), np.uint8)
    decode_image(content, pixels)
    return pixels.shape
