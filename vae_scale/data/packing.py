"""Packs images into shards: resumable, in parallel, with reproducible bytes."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt
from tqdm import tqdm

from vae_scale.data.parts import (
    Journal,
    JournalHeader,
    Part,
    ShardJob,
    ShardRecord,
    compute_fingerprint,
    find_intact_shards,
    is_complete,
    list_jobs,
    read_journals,
    write_manifests,
)
from vae_scale.data.shard_file import FORMAT_VERSION, Layout, write_shard

Arrays = npt.NDArray[Any]


class Split(Protocol):
    """The samples of one split. `labels` has one entry per sample; -1 means no label."""

    name: str
    labels: list[int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of every sample: (H, W, 3) for images."""

    def fetch(self, start: int, stop: int) -> Any:
        """Reads samples start..stop without decoding them. Called in order, from one thread."""

    def decode(self, raw: Any) -> Arrays:
        """Decodes the result of `fetch`: contiguous, uint8 [n, H, W, 3] for images. Called from any thread."""


@dataclass
class Source:
    """The images to pack.

    Attributes:
        splits: In the order of the set.
        class_names: Names of labels 0, 1, ...; may be empty.
        hashes: The sha256 of each source file, or a digest that identifies the source.
        folds: The ten folds of STL-10, as rows of the train split.
    """

    splits: Sequence[Split]
    class_names: list[str]
    hashes: dict[str, str]
    folds: list[list[int]] | None = None


@dataclass(frozen=True)
class PackOptions:
    """Options of `pack`.

    Attributes:
        name: Prefix of the file names of shards.
        encoding: npy, png, jpg or webp.
        images_per_shard: The last shard of a split may contain fewer.
        limit: Maximum number of images per split.
    """

    name: str
    encoding: str = "npy"
    images_per_shard: int = 1000
    limit: int | None = None


def pack(source: Source, out: Path, options: PackOptions, workers: int, part: Part | None = None) -> bool:
    """Writes the shards of a part, and the manifests if there is only one part. Resumes an interrupted pack.

    Args:
        source: The images.
        out: Created if missing. Other parts may be written to it at the same time.
        options: Name, encoding and size of the shards.
        workers: Threads that decode, encode and hash. Shards do not depend on this number.
        part: Part to write; by default everything.

    Returns:
        Whether anything was written.

    Raises:
        UserError: `out` contains another set, or an image cannot be read.
        OSError: The disk is full. No incomplete shard is left.
    """
    part = part or Part()
    sizes = {split.name: min(len(split.labels), options.limit or len(split.labels)) for split in source.splits}
    header = _make_header(source, sizes, options)
    if is_complete(out, header):
        return False
    jobs = list_jobs(options.name, sizes, options.images_per_shard)
    total = sum(job.stop - job.start for job in part.select(jobs))
    with tqdm(total=total, unit=" images", unit_scale=True, desc=f"packing {out}", smoothing=0.1) as bar:
        records, written = write_shards(source.splits, jobs, out, part, header, workers, bar)
    if part.count == 1:
        write_manifests(out, options.name, records, header["vae_scale"])
    return written > 0 or part.count == 1


def _make_header(source: Source, sizes: dict[str, int], options: PackOptions) -> JournalHeader:
    identity = {
        "format_version": FORMAT_VERSION,
        "packing": vars(options),
        "splits": {split.name: len(split.labels) for split in source.splits},
        "sources": source.hashes,
    }
    layout, is_array = Layout(source.splits[0].shape), options.encoding == "npy"
    info = {
        "version": FORMAT_VERSION,
        "fingerprint": compute_fingerprint(identity),
        "encoding": options.encoding,
        "image_shape": layout.shape,
        "stride": layout.stride if is_array else None,
        "offset": layout.offset if is_array else None,
        "class_names": source.class_names,
        "sources": source.hashes,
        "splits": sizes,
    }
    if source.folds and all(row < sizes["train"] for fold in source.folds for row in fold):
        info["folds"] = source.folds
    return {"name": options.name, "images_per_shard": options.images_per_shard, "vae_scale": info}


def write_shards(
    splits: Sequence[Split],
    jobs: Sequence[ShardJob],
    out: Path,
    part: Part,
    header: JournalHeader,
    workers: int,
    bar: "tqdm[Any]",
) -> tuple[list[ShardRecord], int]:
    """Writes the unfinished shards of a part, and records them in its journal.

    Args:
        splits: The samples.
        jobs: All shards of the set.
        out: Created if missing. Intact shards in it are kept if a journal records them, also one of another division.
        part: Part to write.
        header: Header of the journal.
        workers: Threads that decode, encode and hash.
        bar: Progress bar in samples.

    Returns:
        The records of all shards of the part, and the number of shards that were written.

    Raises:
        UserError: See `pack`.
    """
    out.mkdir(parents=True, exist_ok=True)
    jobs = part.select(jobs)
    journals = read_journals(out, header)
    journal = journals.get(part) or Journal(out / part.journal_name, header)
    finished = set()
    for record in find_intact_shards(out, journals.values(), jobs, workers):
        if journal.records.get(record["url"]) != record:
            journal.add(record)
        finished.add(record["url"])
        bar.update(record["nsamples"])
    remaining = [job for job in jobs if job.url not in finished]
    for record in _write_all(remaining, splits, out, header["vae_scale"]["encoding"], workers):
        journal.add(record)
        bar.update(record["nsamples"])
    return [journal.records[job.url] for job in jobs], len(remaining)


def _write_all(jobs: list[ShardJob], splits: Sequence[Split], out: Path, encoding: str, workers: int) -> Iterator[ShardRecord]:
    """Writes shards in `workers` threads. Yields their records in order."""
    by_name = {split.name: split for split in splits}

    def write(job: ShardJob, raw: list[Any]) -> ShardRecord:
        split = by_name[job.split]
        samples = split.decode(raw.pop())  # drops the last reference: two copies per worker instead of three
        keys = [f"{job.split}-{row:08d}" for row in range(job.start, job.stop)]
        labels = split.labels[job.start : job.stop]
        record = write_shard(out / job.url, keys, labels, samples, encoding)
        return record | {"split": job.split, "labels": labels}

    pending: deque[Future[ShardRecord]] = deque()
    with ThreadPoolExecutor(workers, "packing") as pool:
        try:
            for job in jobs:
                if len(pending) > workers:  # one more than workers, so that none is idle while the first is collected
                    yield pending.popleft().result()
                pending.append(pool.submit(write, job, [by_name[job.split].fetch(job.start, job.stop)]))
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
