"""Verification of a set of shards against its manifest: files, hashes, names, labels and images."""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vae_scale.data.images import Images, center_crop_resize, decode_image
from vae_scale.data.parts import side_manifests
from vae_scale.data.shard_file import SUFFIXES, Layout, Shard, iter_members, member_type
from vae_scale.data.shards import ShardSet
from vae_scale.errors import UserError, one_line

MAX_PROBLEMS = 10  # printed per shard
LOSSLESS = ("npy", "png")


def verify(shards: ShardSet, workers: int) -> int:
    """Reads all shards and prints one line for each problem, and a note for each file that does not belong to the set.

    Args:
        shards: The set, local or remote.
        workers: Shards read in parallel.

    Returns:
        Number of problems.
    """
    first_rows, sizes = [], Counter[str]()  # index of each shard's first sample in its split
    for shard in shards.shards:
        first_rows.append(sizes[shard.split])
        sizes[shard.split] += shard.samples
    num_problems = 0
    with (
        ThreadPoolExecutor(workers, "verifying") as pool,
        tqdm(total=len(shards), unit=" images", unit_scale=True, desc=f"verifying {shards.location}") as bar,
    ):
        try:
            results = pool.map(lambda shard, first: list(_check_shard(shards, shard, first)), shards.shards, first_rows)
            for shard, problems in zip(shards.shards, results, strict=True):
                for problem in problems[:MAX_PROBLEMS]:
                    tqdm.write(problem)
                if len(problems) > MAX_PROBLEMS:
                    tqdm.write(f"{shards.location_of(shard)}: and {len(problems) - MAX_PROBLEMS:,} more problems")
                num_problems += len(problems)
                bar.update(shard.samples)
        finally:
            pool.shutdown(cancel_futures=True)
    for line in _check_other_files(shards):
        num_problems += not line.startswith("note: ")
        print(line)
    return num_problems


def _check_shard(shards: ShardSet, shard: Shard, first_row: int) -> Iterator[str]:
    location = shards.location_of(shard)
    try:
        with shards.storage.open(shard) as file:
            for name, expected in (("md5", shard.md5), ("sha256", shard.sha256)):
                file.seek(0)
                if (digest := hashlib.file_digest(file, name).hexdigest()) != expected:
                    yield f"{location}: its {name} is {digest}, expected {expected}"
            file.seek(0)
            for problem in _check_samples(file, shards, shard, first_row):
                yield one_line(ValueError(f"{location}: {problem}"))
    except UserError as error:
        yield one_line(error)
    except ValueError as error:
        yield f"{location}: {one_line(error)}"


def _check_samples(file: BufferedReader, shards: ShardSet, shard: Shard, first_row: int) -> Iterator[str]:
    is_packed = shard.pixels_sha256 is not None  # by vae_scale, so that member names and the hash of the pixels are known
    rows = range(first_row, first_row + shard.samples) if is_packed else range(0)
    names = (f"{shard.split}-{row:08d}.{kind}" for row in rows for kind in ("cls", shards.encoding))
    pixels = hashlib.sha256() if is_packed and shards.encoding in LOSSLESS else None
    image = np.empty(shards.image_shape, np.uint8)
    keys: list[str] = []
    labels: dict[str, str] = {}
    for member, content in iter_members(file):
        expected = next(names, member)
        if member != expected:
            yield f"found member {member}, expected {expected}"
            names.close()  # report only the first: a missing member shifts all others
        kind = member_type(member)
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
        yield f"contains {len(keys):,} images, expected {shard.samples:,}"
    elif pixels and pixels.hexdigest() != shard.pixels_sha256:
        yield f"the sha256 of its pixels is {pixels.hexdigest()}, expected {shard.pixels_sha256}"
    for key, expected_label in zip(keys, shard.labels, strict=False):
        label = labels.get(key, "none" if is_packed else "-1")
        if label.strip() != str(expected_label):
            yield f"{key}cls is {label[:20]!r}, expected {expected_label}"


def _decode(content: bytes, shards: ShardSet, out: Images) -> None:
    if shards.encoding == "npy":
        header = Layout("npy", shards.image_shape).npy_header
        if not content.startswith(header) or len(content) != len(header) + out.size:
            raise ValueError(f"not a uint8 array {list(out.shape)} as written by numpy.save")
        out[:] = np.frombuffer(content, np.uint8, offset=len(header)).reshape(out.shape)
    elif shards.resize:
        out[:] = center_crop_resize(io.BytesIO(content), out.shape[0])
    else:
        decode_image(content, out)


def _check_other_files(shards: ShardSet) -> Iterator[str]:
    """Yields problems of the other manifests in a folder, and notes on files that do not belong to the set."""
    if not shards.storage.is_local:
        return
    first = shards.shards[0]
    name = re.sub(rf"-{re.escape(first.split)}-\d+\.tar$", "", first.url)
    entries = [(shard.url, shard.split, shard.samples) for shard in shards.shards]
    manifests = side_manifests(name, entries) if first.pixels_sha256 else {}  # other WebDatasets may have different ones
    known_names = {"index.json", *manifests, *(shard.url for shard in shards.shards)}
    for path in sorted(Path(shards.location).iterdir()):
        if path.name in manifests:
            try:
                content = json.loads(path.read_text("utf-8"))
            except (OSError, ValueError, RecursionError):
                content = None
            if content != manifests[path.name]:
                yield f"{path}: does not match index.json; pack again"
        elif path.name not in known_names and (path.suffix in (".tar", ".tmp") or path.name.startswith(".packing")):
            yield f"note: {path}: does not belong to the set and can be removed"
