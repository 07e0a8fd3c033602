"""Writes the manifest of an existing WebDataset in one pass."""

import hashlib
import io
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vae_scale.data.images import FORMATS, center_crop_resize, decode_image, open_image
from vae_scale.data.parts import ShardRecord, compute_fingerprint, write_index
from vae_scale.data.remote import download
from vae_scale.data.shard_file import FORMAT_VERSION, MAX_IMAGE_SIDE, SUFFIXES, iter_members, member_type
from vae_scale.data.shards import MAX_LABEL
from vae_scale.data.storage import is_url
from vae_scale.errors import UserError, one_line, redact

TEST_FRACTION = 10  # one shard in this many is assigned to the test split if no splits are named
TAR_END = bytes(2 * 512)  # last bytes of a complete tar
ImageFormat = tuple[str, tuple[int, ...]]  # encoding and shape


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
    records: list[ShardRecord] = []
    formats = Counter[ImageFormat]()
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(urls), unit=" shards", desc="indexing") as bar:
        try:
            for record, shard_formats in pool.map(lambda item: _read_shard(item[0], item[1], resolution), urls):
                records.append(record)
                formats += shard_formats
                if len(shapes := {shape for _, shape in formats}) > 1:
                    sizes = ", ".join(f"{width}x{height}" for height, width, _ in sorted(shapes))
                    advice = "use --resolution R to crop and resize them when they are read"
                    raise UserError(f"{redact(record['url'])}: images have several sizes ({sizes}); {advice}")
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    ((encoding, shape), _), *_ = formats.most_common()
    info = {
        "version": FORMAT_VERSION,
        "fingerprint": compute_fingerprint([resolution, [(record["sha256"], record["split"]) for record in records]]),
        "encoding": encoding,
        "image_shape": shape,
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
    folders = {Path(url).parent.resolve(): Path(url).parent for url in urls if not is_url(url)}
    if out is None and not folders:
        raise UserError("--out DIR is missing: the folder of index.json")
    if out is not None:
        folders[out.resolve()] = out
    if len(folders) > 1:
        raise UserError("--index: files in several folders; index each folder separately, and omit --out or give their folder")
    return next(iter(folders.values()))


def _read_shard(url: str, split: str, resolution: int | None) -> tuple[ShardRecord, Counter[ImageFormat]]:
    """Decodes all images of a shard. Returns its entry in the manifest, and the number of images of each format."""
    with tempfile.TemporaryDirectory() as folder:
        path = download(url, Path(folder), "it cannot be indexed") if is_url(url) else Path(url)
        try:
            return _scan(path, url if is_url(url) else path.name, split, resolution)
        except (OSError, ValueError) as error:
            raise UserError(f"{redact(url)}: {getattr(error, 'strerror', None) or one_line(error)}") from None


def _scan(path: Path, url: str, split: str, resolution: int | None) -> tuple[ShardRecord, Counter[ImageFormat]]:
    labels: dict[str, int] = {}
    keys: list[str] = []
    formats = Counter[ImageFormat]()
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
                    formats["jpg" if kind == "jpeg" else kind, _decoded_shape(content, resolution)] += 1
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
    record = {
        "url": url,
        "nsamples": len(keys),
        "filesize": size,
        "md5sum": digests["md5"],
        "sha256": digests["sha256"],
        "pixels_sha256": None,
        "split": split,
        "labels": [labels.get(key, -1) for key in keys],
    }
    return record, formats


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
