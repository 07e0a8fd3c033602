"""Packs images into shards: resumable, in parallel, with reproducible bytes."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
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
    check_shards,
    fingerprint,
    is_complete,
    list_jobs,
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
        splits: In the most efficient order for reading.
        class_names: Names of labels 0, 1, ...; may be empty.
        hashes: Computes the sha256 of each source file, or a digest that identifies the source.
        folds: The ten folds of STL-10, as rows of the train split.
    """

    splits: list[Split]
    class_names: list[str]
    hashes: Callable[[], dict[str, str]]
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
    jobs = list_jobs(options.name, sizes, options.images_per_shard)
    with ThreadPoolExecutor(1, "hashing") as pool:
        # Hashing reads all sources. The first shards are written at the same time, unless `out` contains a set or a journal,
        # which must be compared with the hashes.
        header = pool.submit(_make_header, source, sizes, options)
        if is_complete(out, header):
            return False
        total = sum(job.stop - job.start for job in part.select(jobs))
        with tqdm(total=total, unit=" images", unit_scale=True, desc=f"packing {out}", smoothing=0.1) as bar:
            journal = Journal(out, part, header)
            records, written = write_shards(source.splits, jobs, journal, options.encoding, workers, bar)
        if part.count == 1:
            write_manifests(out, options.name, [records[job.url] for job in jobs], header.result()["vae_scale"])
    return written > 0 or part.count == 1


def _make_header(source: Source, sizes: dict[str, int], options: PackOptions) -> JournalHeader:
    sources = source.hashes()
    identity = {
        "format_version": FORMAT_VERSION,
        "packing": vars(options),
        "splits": {split.name: len(split.labels) for split in source.splits},
        "sources": sources,
    }
    layout = Layout(options.encoding, source.splits[0].shape)
    info = {
        "version": FORMAT_VERSION,
        "fingerprint": fingerprint(identity),
        "encoding": options.encoding,
        "image_shape": layout.shape,
        "stride": layout.stride,
        "offset": layout.offset,
        "class_names": source.class_names,
        "sources": sources,
        "splits": sizes,
    }
    if source.folds and all(row < sizes["train"] for fold in source.folds for row in fold):
        info["folds"] = source.folds
    return {"name": options.name, "images_per_shard": options.images_per_shard, "vae_scale": info}


def write_shards(
    splits: Sequence[Split],
    jobs: Sequence[ShardJob],
    journal: Journal,
    encoding: str,
    workers: int,
    bar: "tqdm[Any]",
    any_division: bool = False,
    extra_fields: Callable[[Arrays], ShardRecord] = lambda samples: {},
) -> tuple[dict[str, ShardRecord], int]:
    """Writes the unfinished shards of the journal's part.

    Args:
        splits: The samples.
        jobs: All shards of the set.
        journal: Records finished shards. Shards are written to its folder.
        encoding: One of `ENCODINGS`.
        workers: Threads that decode, encode and hash.
        bar: Progress bar in samples.
        any_division: Whether to reuse shards of an interrupted call that divided the set into another number of parts.
        extra_fields: Computes fields that are added to a shard's record.

    Returns:
        The records of all shards of the part by file name, and the number of shards that were written.

    Raises:
        UserError: See `pack`.
    """
    journal.out.mkdir(parents=True, exist_ok=True)
    jobs = journal.part.select(jobs)
    urls = {job.url for job in jobs}
    recorded = [(part, record) for part, record in journal.read(any_division) if record["url"] in urls]
    checked = check_shards(journal.out, [record for _, record in recorded], workers)
    finished: dict[str, ShardRecord] = {}
    for (part, _), (record, problem) in zip(recorded, checked, strict=True):
        if problem is None and record["url"] not in finished:
            finished[record["url"]] = record
            bar.update(record["nsamples"])
            if part != journal.part:
                journal.add(record)
    remaining = [job for job in jobs if job.url not in finished]
    for record in _write_all(remaining, splits, journal.out, encoding, workers, extra_fields):
        journal.add(record)
        finished[record["url"]] = record
        bar.update(record["nsamples"])
    journal.flush()
    return finished, len(remaining)


def _write_all(
    jobs: list[ShardJob],
    splits: Sequence[Split],
    out: Path,
    encoding: str,
    workers: int,
    extra_fields: Callable[[Arrays], ShardRecord],
) -> Iterator[ShardRecord]:
    """Writes shards in `workers` threads. Yields the records of finished shards."""
    by_name = {split.name: split for split in splits}

    def write(job: ShardJob, raw: list[Any]) -> ShardRecord:
        split = by_name[job.split]
        samples = split.decode(raw.pop())  # drops the last reference: two copies per worker instead of three
        keys = [f"{job.split}-{row:08d}" for row in range(job.start, job.stop)]
        labels = split.labels[job.start : job.stop]
        record = write_shard(out / job.url, keys, labels, samples, encoding)
        return record | {"split": job.split, "labels": labels} | extra_fields(samples)

    pending: set[Future[ShardRecord]] = set()
    with ThreadPoolExecutor(workers, "packing") as pool:
        try:
            for job in jobs:
                if len(pending) == workers:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
                pending.add(pool.submit(write, job, [by_name[job.split].fetch(job.start, job.stop)]))
            yield from (future.result() for future in as_completed(pending))
        finally:
            pool.shutdown(cancel_futures=True)
