"""Whether a set of shards is what its manifest says: every file, hash, name, label and image."""

import hashlib
import io
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vae_scale.data.images import Images, decode, square
from vae_scale.data.parts import side_manifests
from vae_scale.data.shard_file import SUFFIXES, Layout, Shard, kind_of, members
from vae_scale.data.shards import ShardSet
from vae_scale.errors import UserError, one_line

MOST = 10  # problems that are told of one shard
LOSSLESS = ("npy", "png")


def verify(shards: ShardSet, workers: int) -> int:
    """Reads a whole set and prints all that is wrong with it, one line for each problem, and what should not be there.

    Args:
        shards: The set, in a folder or elsewhere.
        workers: Shards that are read at the same time.

    Returns:
        Number of problems.
    """
    problems = 0
    with (
        ThreadPoolExecutor(workers, "verifying") as pool,
        tqdm(total=len(shards), unit=" images", unit_scale=True, desc=f"verifying {shards.location}") as bar,
    ):
        try:
            for shard, found in zip(
                shards.shards, pool.map(lambda job: list(_problems(shards, *job)), _jobs(shards)), strict=True
            ):
                for line in found[:MOST]:
                    tqdm.write(line)
                if len(found) > MOST:
                    tqdm.write(f"{shards.place(shard)}: and {len(found) - MOST:,} problems more")
                problems += len(found)
                bar.update(shard.samples)
        finally:
            pool.shutdown(cancel_futures=True)
    for line in _beside(shards):
        problems += not line.startswith("note: ")
        print(line)
    return problems


def _jobs(shards: ShardSet) -> list[tuple[Shard, int]]:
    """Each shard and the number of its first sample in its split."""
    seen: dict[str, int] = {}
    jobs = []
    for shard in shards.shards:
        jobs.append((shard, seen.get(shard.split, 0)))
        seen[shard.split] = jobs[-1][1] + shard.samples
    return jobs


def _problems(shards: ShardSet, shard: Shard, first: int) -> Iterator[str]:
    place = shards.place(shard)
    try:
        with shards.storage.open(shard) as file:
            md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
            while block := file.read(1 << 20):
                md5.update(block)
                sha256.update(block)
            for name, found, wanted in (("md5", md5, shard.md5), ("sha256", sha256, shard.sha256)):
                if found.hexdigest() != wanted:
                    yield f"{place}: its {name} is {found.hexdigest()}, the manifest says {wanted}"
            file.seek(0)
            for problem in _wrong_samples(file, shards, shard, first):
                yield one_line(ValueError(f"{place}: {problem}"))
    except UserError as error:
        yield one_line(error)
    except ValueError as error:
        yield f"{place}: {one_line(error)}"


def _wrong_samples(file: BufferedReader, shards: ShardSet, shard: Shard, first: int) -> Iterator[str]:
    """Compares each sample with the manifest. Of what others packed, names and the pixels' hash are not known."""
    ours = shard.pixels_sha256 is not None
    names = _names(shard, first, shards.encoding) if ours else iter(())
    pixels = hashlib.sha256() if ours and shards.encoding in LOSSLESS else None
    image = np.empty(shards.image_shape, np.uint8)
    keys: list[str] = []
    labels: dict[str, str] = {}
    for member, content in members(file):
        expected = next(names, member)
        if member != expected:
            yield f"{member} is where {expected} should be"
            names = iter(())  # one that is missing shifts all that follow
        kind = kind_of(member)
        key = member[: len(member) - len(kind)]
        if kind == "cls":
            labels[key] = content.decode(errors="replace")
        elif kind == shards.encoding or f".{kind}" in SUFFIXES:
            keys.append(key)
            try:
                _decode(content, shards, image)
            except ValueError as error:
                yield f"{member} cannot be decoded ({one_line(error)})"
                pixels = None
            if pixels:
                pixels.update(image.data)
    if len(keys) != shard.samples:
        yield f"holds {len(keys):,} images, the manifest says {shard.samples:,}"
    elif pixels and pixels.hexdigest() != shard.pixels_sha256:
        yield f"the sha256 of its images is {pixels.hexdigest()}, the manifest says {shard.pixels_sha256}"
    for key, label in zip(keys, shard.labels, strict=False):
        found = labels.get(key, "none" if ours else "-1")
        if found.strip() != str(label):
            yield f"{key}cls says {found[:20]!r}, the manifest says {label}"


def _names(shard: Shard, first: int, encoding: str) -> Iterator[str]:
    return (f"{shard.split}-{row:08d}.{kind}" for row in range(first, first + shard.samples) for kind in ("cls", encoding))


def _decode(content: bytes, shards: ShardSet, out: Images) -> None:
    if shards.encoding == "npy":
        header = Layout("npy", shards.image_shape).npy_header
        if not content.startswith(header) or len(content) != len(header) + out.size:
            raise ValueError(f"it is no array uint8 {list(out.shape)} as numpy.save writes it")
        out[:] = np.frombuffer(content, np.uint8, offset=len(header)).reshape(out.shape)
    elif shards.fit:
        out[:] = square(io.BytesIO(content), out.shape[0])
    else:
        decode(content, out)


def _beside(shards: ShardSet) -> Iterator[str]:
    """What is wrong with the other files of a folder, and notes on those that do not belong to the set."""
    if not shards.storage.local:
        return
    folder = Path(shards.location)
    first = shards.shards[0]
    name = re.sub(rf"-{re.escape(first.split)}-\d+\.tar$", "", first.url)
    entries = [(shard.url, shard.split, shard.samples) for shard in shards.shards]
    wanted = side_manifests(name, entries) if first.pixels_sha256 else {}  # others' files of that name are their own
    known = {"index.json", *wanted, *(shard.url for shard in shards.shards)}
    for path in sorted(folder.iterdir()):
        if path.name in wanted:
            try:
                same = json.loads(path.read_text("utf-8")) == wanted[path.name]
            except (OSError, ValueError, RecursionError):
                same = False
            if not same:
                yield f"{path}: does not say what index.json says; pack again"
        elif path.name not in known and (path.suffix in (".tar", ".tmp") or path.name.startswith(".packing")):
            yield f"note: {path}: does not belong to the set; it can be removed"
