"""Images of a source to shards: in order, in parallel, complete or absent, and the same bytes every time."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from vae_scale.data.images import Images
from vae_scale.data.parts import (
    WHOLE,
    Header,
    Job,
    Journal,
    Part,
    Record,
    check,
    journals,
    list_jobs,
    read_journal,
    remove_journals,
    write_manifests,
)
from vae_scale.data.shard_file import FORMAT_VERSION, Layout, write_shard
from vae_scale.data.shards import ShardSet
from vae_scale.errors import UserError


class Split(Protocol):
    """The images of one split. `labels` gives their number; -1 stands for no label."""

    name: str
    labels: list[int]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, 3) of every image."""

    def fetch(self, start: int, stop: int) -> Any:
        """What is needed to decode images start..stop. Called in order and by one thread at a time."""

    def decode(self, raw: Any) -> Images:
        """What `fetch` gave, as contiguous uint8 [n, H, W, 3]. Called by any thread."""


@dataclass
class Source:
    """What there is to pack.

    Attributes:
        splits: In the order in which they are read best.
        class_names: Of labels 0, 1, ...; may be empty.
        hashes: Computes the sha256 of each source file, or of what identifies the source.
        folds: STL-10's ten folds: rows of the train split.
    """

    splits: list[Split]
    class_names: list[str]
    hashes: Callable[[], dict[str, str]]
    folds: list[list[int]] | None = None


@dataclass(frozen=True)
class Packing:
    """How to pack.

    Attributes:
        name: First part of every shard's name.
        encoding: npy, png, jpg or webp.
        images_per_shard: The last shard of a split may hold fewer.
        limit: Images of each split, at most.
    """

    name: str
    encoding: str = "npy"
    images_per_shard: int = 1000
    limit: int | None = None


def pack(source: Source, out: Path, packing: Packing, workers: int, part: Part = WHOLE) -> bool:
    """Writes shards into `out`, and their manifests where it writes all; goes on where an interrupted call stopped.

    Args:
        source: The images.
        out: Made if it is missing. Other parts may be written into it at the same time.
        packing: How.
        workers: Threads that decode, encode and hash. The bytes written do not depend on it.
        part: Which of the shards.

    Returns:
        False where nothing was left to do.

    Raises:
        UserError: `out` holds another set, or an image cannot be read.
        OSError: the disk is full. Nothing incomplete stays under a final name.
    """
    rows = _rows(source, packing)
    jobs = part.of(list_jobs(packing.name, rows, packing.images_per_shard))
    with ThreadPoolExecutor(1, "hashing") as pool:
        # The hashes of the sources take a pass over all of them. The first shards are written meanwhile, except where
        # there is something that must be of the same sources.
        header = pool.submit(_header, source, packing)
        if (out / "index.json").exists():
            if ShardSet.open(out).fingerprint != header.result()["vae_scale"]["fingerprint"]:
                raise UserError(f"{out}: holds a complete set of another source or other options; choose another --out")
            remove_journals(out)
            return False
        out.mkdir(parents=True, exist_ok=True)
        noted = _noted(out, part, header)
        journal, done = Journal(out, part, header), {}
        total = sum(job.stop - job.start for job in jobs)
        with tqdm(total=total, unit=" images", unit_scale=True, desc=f"packing {out}", smoothing=0.1) as bar:
            for record, problem in check(out, [noted[job.url] for job in jobs if job.url in noted], workers):
                if problem is None:
                    done[record["url"]] = record
                    bar.update(record["nsamples"])
            todo = [job for job in jobs if job.url not in done]
            for record in _write_all(todo, source, out, packing.encoding, workers):
                journal.add(record)
                done[record["url"]] = record
                bar.update(record["nsamples"])
        journal.flush()
        if part == WHOLE:
            write_manifests(out, header.result(), done)
            remove_journals(out)
    return bool(todo) or part == WHOLE


def _rows(source: Source, packing: Packing) -> dict[str, int]:
    """Images of each split that are packed."""
    return {split.name: min(len(split.labels), packing.limit or len(split.labels)) for split in source.splits}


def _header(source: Source, packing: Packing) -> Header:
    rows, sources = _rows(source, packing), source.hashes()
    wanted = {
        "format_version": FORMAT_VERSION,
        "packing": vars(packing),
        "splits": {split.name: len(split.labels) for split in source.splits},
        "sources": sources,
    }
    layout = Layout(packing.encoding, source.splits[0].shape)
    ours = {
        "version": FORMAT_VERSION,
        "fingerprint": hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest(),
        "encoding": packing.encoding,
        "image_shape": layout.shape,
        "stride": layout.stride,
        "offset": layout.offset,
        "class_names": source.class_names,
        "sources": sources,
        "splits": rows,
    }
    if source.folds and all(row < rows["train"] for fold in source.folds for row in fold):
        ours["folds"] = source.folds
    return {"name": packing.name, "images_per_shard": packing.images_per_shard, "vae_scale": ours}


def _noted(out: Path, part: Part, header: Future[Header]) -> dict[str, Record]:
    """The shards that an interrupted call noted. What others noted in `out` must be of the same set."""
    noted: dict[str, Record] = {}
    for other, path in journals(out).items():
        theirs, records = read_journal(path)
        if theirs["vae_scale"]["fingerprint"] != header.result()["vae_scale"]["fingerprint"]:
            raise UserError(f"{out}: holds an interrupted pack of another source or other options; choose another --out")
        if other.count != part.count:
            raise UserError(f"{out}: holds part {other} of an interrupted pack, not of {part.count}; choose another --out")
        if other == part:
            noted = records
    return noted


def _write_all(todo: list[Job], source: Source, out: Path, encoding: str, workers: int) -> Iterator[Record]:
    """Writes shards in `workers` threads; yields their records as they are finished."""
    splits = {split.name: split for split in source.splits}
    jobs, reading = iter(todo), threading.Lock()

    def write_next() -> Record:
        with reading:
            job = next(jobs)
            split = splits[job.split]
            raw = split.fetch(job.start, job.stop)
        images = split.decode(raw)
        del raw  # a worker holds images twice, not three times
        keys = [f"{job.split}-{row:08d}" for row in range(job.start, job.stop)]
        labels = split.labels[job.start : job.stop]
        return write_shard(out / job.url, keys, labels, images, encoding) | {"split": job.split, "labels": labels}

    with ThreadPoolExecutor(workers, "packing") as pool:
        try:
            for future in as_completed([pool.submit(write_next) for _ in todo]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
