"""Verification of a set of shards against its manifest: files, hashes, labels and images."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader

import numpy as np
from tqdm import tqdm

from vae_scale.data.shard_file import SUFFIXES, Shard, iter_members, member_type
from vae_scale.data.shards import ShardSet
from vae_scale.errors import UserError, one_line

MAX_PROBLEMS = 10  # printed per shard
LOSSLESS = ("npy", "png")


def verify(shards: ShardSet, workers: int) -> int:
    """Reads all shards and prints one line for each problem.

    Args:
        shards: The set, local or remote.
        workers: Shards read in parallel.

    Returns:
        Number of problems.
    """
    num_problems = 0
    with (
        ThreadPoolExecutor(workers, "verifying") as pool,
        tqdm(total=len(shards), unit=" images", unit_scale=True, desc=f"verifying {shards.location}") as bar,
    ):
        try:
            results = pool.map(lambda number: list(_check_shard(shards, number)), range(len(shards.shards)))
            for shard, problems in zip(shards.shards, results, strict=True):
                for problem in problems[:MAX_PROBLEMS]:
                    tqdm.write(problem)
                if len(problems) > MAX_PROBLEMS:
                    tqdm.write(f"{shards.location_of(shard)}: and {len(problems) - MAX_PROBLEMS:,} more problems")
                num_problems += len(problems)
                bar.update(shard.samples)
        finally:
            pool.shutdown(cancel_futures=True)
    return num_problems


def _check_shard(shards: ShardSet, number: int) -> Iterator[str]:
    shard = shards.shards[number]
    location = shards.location_of(shard)
    try:
        with shards.storage.open(shard) as file:
            for name, expected in (("md5", shard.md5), ("sha256", shard.sha256)):
                file.seek(0)
                if (digest := hashlib.file_digest(file, name).hexdigest()) != expected:
                    yield f"{location}: its {name} is {digest}, expected {expected}"
            file.seek(0)
            for problem in _check_members(file, shard, shards.encoding):
                yield one_line(ValueError(f"{location}: {problem}"))
        images = shards.read(number)
        digest = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()
        if shards.encoding in LOSSLESS and shard.pixels_sha256 not in (None, digest):
            yield f"{location}: the sha256 of its pixels is {digest}, expected {shard.pixels_sha256}"
    except UserError as error:
        yield one_line(error)
    except ValueError as error:
        yield f"{location}: {one_line(error)}"


def _check_members(file: BufferedReader, shard: Shard, encoding: str) -> Iterator[str]:
    keys: list[str] = []
    labels: dict[str, str] = {}
    for member, content in iter_members(file):
        kind = member_type(member)
        key = member[: len(member) - len(kind)]
        if kind == "cls":
            labels[key] = content.decode(errors="replace")
        elif kind == encoding or f".{kind}" in SUFFIXES:
            keys.append(key)
    if len(keys) != shard.samples:
        yield f"contains {len(keys):,} images, expected {shard.samples:,}"
    for key, expected_label in zip(keys, shard.labels, strict=False):
        label = labels.get(key, "-1")
        if label.strip() != str(expected_label):
            yield f"{key}cls is {label[:20]!r}, expected {expected_label}"
