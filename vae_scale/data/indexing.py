"""A manifest for a WebDataset that somebody else made, from reading it once."""

import hashlib
import io
import json
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vae_scale.data.images import FORMATS, decode, opened, square
from vae_scale.data.parts import write_json
from vae_scale.data.shard_file import FORMAT_VERSION, MOST_SIDE, SUFFIXES, kind_of, members
from vae_scale.data.shards import MOST_LABEL
from vae_scale.data.storage import SCHEMES, Cache
from vae_scale.errors import UserError, one_line, shown

HELD_OUT = 10  # of so many shards, one is the test split where none is named
END = bytes(2 * 512)  # of a whole tar


@dataclass
class _Found:
    """What one shard holds: its entry in the manifest, the kinds of its images, and their shapes."""

    entry: dict[str, Any]
    kinds: Counter[str]
    shapes: Counter[tuple[int, int, int]]


def index(sources: list[str], out: Path | None, resolution: int | None, workers: int) -> Path:
    """Writes `index.json` for tars of images (jpg, png, webp), after which they are read like shards of our own.

    Labels are those of `.cls` members, -1 where there is none.

    Args:
        sources: Files or URLs with braces ({000..127}), each as SPLIT=URLS, or without a split: then one shard in ten, from
            the end, is the test split, and the others are the train split.
        out: Where to write. None for the folder that the files are in.
        resolution: Side of the squares to which images are cut and resized when they are read; None where all are of one
            size already.
        workers: Shards that are read at the same time.

    Returns:
        The folder of the manifest.

    Raises:
        UserError: a shard cannot be read, holds no images, or an image cannot be decoded; sizes differ and there is no
            `resolution`; or the manifest cannot be put where its shards would be found.
    """
    urls = _urls(sources)
    folder = _folder([url for url, _ in urls], out)
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(urls), unit=" shards", desc="indexing") as bar:
        found = []
        try:
            for shard in pool.map(lambda place: _read(place[0], place[1], resolution), urls):
                found.append(shard)
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    shapes = sum((shard.shapes for shard in found), Counter[tuple[int, int, int]]())
    if len(shapes) > 1:
        (first, _), (second, _) = shapes.most_common(2)
        place = shown(next(shard.entry["url"] for shard in found if second in shard.shapes))
        sizes = f"images of {second[1]}x{second[0]}, others of {first[1]}x{first[0]}"
        raise UserError(f"{place}: {sizes}; give --resolution R to have all cut to squares and resized as they are read")
    kinds = sum((shard.kinds for shard in found), Counter[str]())
    encoding, shape = kinds.most_common(1)[0][0], next(iter(shapes))
    records = [shard.entry for shard in found]
    identity = json.dumps([resolution, [(record["sha256"], record["split"]) for record in records]])
    ours = {
        "version": FORMAT_VERSION,
        "fingerprint": hashlib.sha256(identity.encode()).hexdigest(),
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
    kind = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": folder.resolve().name}
    write_json(folder / "index.json", kind | {"shardlist": records, "vae_scale": ours})
    return folder


def _urls(sources: list[str]) -> list[tuple[str, str]]:
    """Each shard and its split."""
    from braceexpand import braceexpand

    named: dict[str, list[str]] = {}
    for source in sources:
        split, equals, pattern = source.partition("=")
        if not equals or not split.isidentifier():
            split, pattern = "", source
        try:
            named.setdefault(split, []).extend(braceexpand(pattern))
        except ValueError:  # whose text has the pattern in it, and with it what may be secret
            raise UserError(f"--index {shown(pattern)}: its braces do not match") from None
    if "" in named:
        if len(named) > 1:
            raise UserError("--index: name the split of all sources (train=URLS test=URLS), or of none")
        every = named.pop("")
        held_out = -(-len(every) // HELD_OUT) if len(every) > 1 else 0
        named = {"train": every[: len(every) - held_out], "test": every[len(every) - held_out :]}
    urls = [(url, split) for split, urls in named.items() for url in urls]
    repeated = [url for url, count in Counter(url for url, _ in urls).items() if count > 1]
    if repeated:
        raise UserError(f"--index: {shown(repeated[0])} is named twice")
    return urls


def _folder(urls: list[str], out: Path | None) -> Path:
    """Where the manifest goes. It names local files beside itself, and others by their URL."""
    local = [Path(url) for url in urls if "://" not in url]
    for url in urls:
        scheme, whole, _ = url.partition("://")
        if url.startswith("pipe:") or (whole and scheme not in SCHEMES):
            raise UserError(f"--index {shown(url)}: must be a file, or a URL of {', '.join(SCHEMES)}")
    folders = {path.parent.resolve() for path in local}
    if len(folders) > 1:
        raise UserError("--index: the files are in several folders; a manifest lies beside its shards, so index each folder")
    if folders:
        if out is not None and out.resolve() not in folders:
            raise UserError(f"--out {out}: a manifest lies beside its shards, in {local[0].parent}; leave --out away")
        return local[0].parent
    if out is None:
        raise UserError("--out DIR is missing: the folder for index.json")
    return out


def _read(url: str, split: str, resolution: int | None) -> _Found:
    if "://" not in url:
        return _scan(Path(url), Path(url).name, url, split, resolution)
    from vae_scale.data.remote import Remote

    with tempfile.TemporaryDirectory() as folder:
        remote = Remote(url.rpartition("/")[0], Cache())
        return _scan(remote.fetch(url, Path(folder)), url, shown(url), split, resolution)


def _check_end(path: Path) -> None:
    """Refuses a tar that is cut off, even where it is cut between two members.

    Raises:
        ValueError: it is.
    """
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - len(END)))
        if size < len(END) or file.read() != END:
            raise ValueError("it does not end as a tar does; it is cut off, or compressed")


def _scan(path: Path, url: str, name: str, split: str, resolution: int | None) -> _Found:
    """Reads a shard and decodes all of its images. `name` is how it is called in messages."""
    labels: dict[str, int] = {}
    images: list[str] = []
    kinds, shapes = Counter[str](), Counter[tuple[int, int, int]]()
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a file")
        _check_end(path)
        file = path.open("rb")
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    with file:
        try:
            for member, content in members(file):
                kind = kind_of(member)
                key = member[: len(member) - len(kind)]
                try:
                    if kind == "cls":
                        labels[key] = _label(content)
                    elif f".{kind}" in SUFFIXES:
                        images.append(key)
                        kinds["jpg" if kind == "jpeg" else kind] += 1
                        shapes[_shape(content, resolution)] += 1
                except ValueError as error:
                    raise ValueError(f"{member} cannot be read ({error}); mend it or take it out") from None
        except ValueError as error:
            raise UserError(f"{name}: {one_line(error)}") from None
        if not images:
            raise UserError(f"{name}: holds no image ({', '.join(SUFFIXES)})")
        if len(set(images)) < len(images):
            raise UserError(f"{name}: a sample holds several images, or two samples have one name")
        entry = {
            "url": url,
            "nsamples": len(images),
            "filesize": path.stat().st_size,
            "md5sum": _digest(file, "md5"),
            "sha256": _digest(file, "sha256"),
            "pixels_sha256": None,
            "split": split,
            "labels": [labels.get(key, -1) for key in images],
        }
    return _Found(entry, kinds, shapes)


def _label(content: bytes) -> int:
    label = int(content)
    if not -1 <= label <= MOST_LABEL:
        raise ValueError(f"a label is a number from -1 to {MOST_LABEL:,}")
    return label


def _shape(content: bytes, resolution: int | None) -> tuple[int, int, int]:
    """Shape of an image as it will be read. It is decoded, so that training does not stumble over it.

    Raises:
        ValueError: it cannot be decoded.
    """
    if resolution is not None:
        return square(io.BytesIO(content), resolution).shape
    with opened(io.BytesIO(content), FORMATS) as image:
        height, width = image.height, image.width
    if max(height, width) > MOST_SIDE:
        raise ValueError(f"it is {width}x{height}, more than {MOST_SIDE} a side; give --resolution R to have it resized")
    pixels = np.empty((height, width, 3), np.uint8)
    decode(content, pixels)
    return pixels.shape


def _digest(file: BufferedReader, algorithm: str) -> str:
    file.seek(0)
    return hashlib.file_digest(file, algorithm).hexdigest()
