"""Images of a source to shards: in order, in parallel, complete or absent, and the same bytes every time."""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from vae_scale.data.shard_file import FORMAT_VERSION, Images, Layout, shard_name, write_shard
from vae_scale.data.shards import ShardSet
from vae_scale.errors import UserError

__all__ = ["Images", "Packing", "Source", "Split", "pack"]

JOURNAL = ".packing.jsonl"


class Split(Protocol):
    """The images of one split. `labels` gives their number; -1 stands for no label."""

    name: str
    labels: list[int]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, 3) of every image."""

    def fetch(self, start: int, stop: int) -> Any:
        """What is needed to decode images start..stop. Called in order and by one thread only."""

    def decode(self, raw: Any) -> Images:
        """What `fetch` gave, as uint8 [n, H, W, 3]. Called by any thread."""


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


@dataclass(frozen=True)
class _Job:
    """One shard to be written."""

    split: Split
    number: int
    start: int
    stop: int


def pack(source: Source, out: Path, packing: Packing, workers: int) -> bool:
    """Writes shards and manifest into `out`; goes on where an interrupted call of the same kind stopped.

    Args:
        source: The images.
        out: Made if it is missing.
        packing: How.
        workers: Threads that decode, encode and hash. The bytes written do not depend on it.

    Returns:
        False where `out` was complete already, and so left alone.

    Raises:
        UserError: `out` holds another set, or an image cannot be read.
        OSError: the disk is full. Nothing incomplete stays under a final name.
    """
    wanted = {
        "format_version": FORMAT_VERSION,
        "packing": vars(packing),
        "splits": {split.name: len(split.labels) for split in source.splits},
        "sources": source.hashes(),
    }
    fingerprint = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    if (out / "index.json").exists():
        if ShardSet.open(out).fingerprint == fingerprint:
            return False
        raise UserError(f"{out}: holds a complete set of another source or other options; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    jobs = list(_jobs(source, packing))
    journal = _Journal(out, fingerprint)
    records = {shard_name(packing.name, job.split.name, job.number): job for job in jobs}
    total = sum(job.stop - job.start for job in jobs)
    with tqdm(total=total, unit=" images", unit_scale=True, desc=f"packing {out}", smoothing=0.1) as bar:
        done = {name: record for name, record in journal.done().items() if name in records}
        bar.update(sum(record["nsamples"] for record in done.values()))
        todo = ((name, job) for name, job in records.items() if name not in done)
        for name, record in _parallel(todo, out, packing, workers):
            journal.add(name, record)
            done[name] = record
            bar.update(record["nsamples"])
    _write_manifests(out, source, packing, wanted, fingerprint, [done[name] for name in records])
    journal.remove()
    return True


def _jobs(source: Source, packing: Packing) -> Iterator[_Job]:
    for split in source.splits:
        count = min(len(split.labels), packing.limit or len(split.labels))
        for number, start in enumerate(range(0, count, packing.images_per_shard)):
            yield _Job(split, number, start, min(start + packing.images_per_shard, count))


def _parallel(
    todo: Iterator[tuple[str, _Job]], out: Path, packing: Packing, workers: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Writes shards in `workers` threads, with few fetched ahead; yields their records in order."""
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[tuple[str, Future[dict[str, Any]]]] = deque()
        try:
            for name, job in todo:
                raw = job.split.fetch(job.start, job.stop)
                pending.append((name, pool.submit(_write, out / name, job, raw, packing)))
                if len(pending) > workers:
                    name, future = pending.popleft()
                    yield name, future.result()
            for name, future in pending:
                yield name, future.result()
        finally:
            for _, future in pending:
                future.cancel()


def _write(path: Path, job: _Job, raw: Any, packing: Packing) -> dict[str, Any]:
    images = job.split.decode(raw)
    labels = job.split.labels[job.start : job.stop]
    keys = [f"{job.split.name}-{row:08d}" for row in range(job.start, job.stop)]
    return write_shard(path, keys, labels, images, packing.encoding) | {"split": job.split.name, "labels": labels}


class _Journal:
    """The records of finished shards, kept while the set is incomplete."""

    def __init__(self, out: Path, fingerprint: str) -> None:
        self.path = out / JOURNAL
        self.fingerprint = fingerprint
        if not self.path.exists():
            self.path.write_text(json.dumps({"fingerprint": fingerprint}) + "\n")
        elif self._lines()[:1] != [{"fingerprint": fingerprint}]:
            raise UserError(f"{out}: holds an interrupted pack of another source or other options; choose another --out")
        for leftover in out.glob(".*.tmp"):
            leftover.unlink()

    def _lines(self) -> list[dict[str, Any]]:
        lines = []
        for line in self.path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the line that was being written when the process was stopped
        return lines

    def done(self) -> dict[str, dict[str, Any]]:
        """Records of the finished shards that are there and unharmed."""
        found = {}
        for line in self._lines()[1:]:
            path = self.path.parent / line["url"]
            if path.is_file() and path.stat().st_size == line["filesize"]:
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() == line["sha256"]:
                        found[line["url"]] = line
        return found

    def add(self, name: str, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"url": name} | record) + "\n")

    def remove(self) -> None:
        self.path.unlink()


def _write_manifests(
    out: Path, source: Source, packing: Packing, wanted: dict[str, Any], fingerprint: str, records: list[dict[str, Any]]
) -> None:
    shape = source.splits[0].shape
    rows = {split.name: min(len(split.labels), packing.limit or len(split.labels)) for split in source.splits}
    layout = Layout(packing.encoding, shape)
    ours = {
        "version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "encoding": packing.encoding,
        "image_shape": shape,
        "stride": layout.stride,
        "offset": layout.offset,
        "class_names": source.class_names,
        "sources": wanted["sources"],
        "splits": rows,
    }
    if source.folds and all(row < rows["train"] for fold in source.folds for row in fold):
        ours["folds"] = source.folds
    splits = {}
    for split in rows:
        shards = [record for record in records if record["split"] == split]
        splits[split] = {
            "name": split,
            "num_samples": rows[split],
            "filenames": [record["url"] for record in shards],
            "shard_lengths": [record["nsamples"] for record in shards],
        }
    _write_json(out / "sizes.json", {record["url"]: record["nsamples"] for record in records})
    _write_json(out / "_info.json", {"name": packing.name, "splits": splits})
    # The index comes last: where it is, the set is complete.
    kind = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": packing.name}
    _write_json(out / "index.json", kind | {"shardlist": records, "vae_scale": ours})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file that is there as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
