"""Parts of a set, the journals that make packing resumable, and the manifests of a complete set."""

import contextlib
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from vae_scale.data.shard_file import shard_name
from vae_scale.errors import UserError
from vae_scale.files import atomic_write, sha256_of

T = TypeVar("T")
ShardRecord = dict[str, Any]  # a shard's entry in the manifest
RECORD_KEYS = {"url", "split", "nsamples", "filesize", "md5sum", "sha256", "pixels_sha256", "labels"}
JournalHeader = dict[str, Any]  # first line of a journal: name, images_per_shard, and vae_scale as in the manifest


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: rows start..stop of a split."""

    url: str
    split: str
    start: int
    stop: int


def list_jobs(name: str, split_sizes: dict[str, int], images_per_shard: int) -> list[ShardJob]:
    """Lists all shards of a set."""
    return [
        ShardJob(shard_name(name, split, number), split, start, min(start + images_per_shard, size))
        for split, size in split_sizes.items()
        for number, start in enumerate(range(0, size, images_per_shard))
    ]


@dataclass(frozen=True)
class Part:
    """Part `number` (from 1) of `count`. A set packed by one process is part 1 of 1."""

    number: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Parses `i/n`.

        Raises:
            UserError: The text is not of this form, or i is out of range.
        """
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        part = cls(int(match[1]), int(match[2])) if match else cls(0)
        if not 1 <= part.number <= part.count:
            raise UserError(f"--part {text}: expected I/N with I from 1 to N, for example 2/4 for part 2 of 4")
        return part

    def select(self, items: Sequence[T]) -> Sequence[T]:
        """Returns the items of this part, which are consecutive."""
        start, stop = (number * len(items) // self.count for number in (self.number - 1, self.number))
        return items[start:stop]

    @property
    def journal_name(self) -> str:
        """File name of this part's journal."""
        return ".packing.jsonl" if self.count == 1 else f".packing-{self.number}-of-{self.count}.jsonl"


@dataclass
class Journal:
    """The journal of one part: a line with the header, then one line per finished shard.

    Attributes:
        path: Created by the first `add`.
        header: Describes the set.
        records: Finished shards by file name.
    """

    path: Path
    header: JournalHeader
    records: dict[str, ShardRecord] = field(default_factory=dict)

    def add(self, record: ShardRecord) -> None:
        """Appends the record of a finished shard."""
        if not self.path.exists():
            atomic_write(self.path, json.dumps(self.header))
        with self.path.open("a") as file:
            file.write("\n" + json.dumps(record))
        self.records[record["url"]] = record


def read_journals(folder: Path, header: JournalHeader | None = None) -> dict[Part, Journal]:
    """Reads the journals of all parts in a folder.

    Raises:
        UserError: A journal is damaged, or of another set than `header` (by default, than the first journal).
    """
    journals = {}
    for path in sorted(folder.glob(".packing*.jsonl")):
        if match := re.fullmatch(r"\.packing(?:-(\d+)-of-(\d+))?\.jsonl", path.name):
            journal = _read_journal(path)
            header = header or journal.header
            if journal.header["vae_scale"]["fingerprint"] != header["vae_scale"]["fingerprint"]:
                raise UserError(f"{path}: is of another source or other options; choose another --out, or remove this file")
            journals[Part(int(match[1] or 1), int(match[2] or 1))] = journal
    return journals


def _read_journal(path: Path) -> Journal:
    lines: list[Any] = []
    for line in path.read_text("utf-8", "replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):  # the last line is incomplete if the process was killed
            lines.append(json.loads(line))
    if not lines or not _is_header(lines[0]):
        raise UserError(f"{path}: not a journal of this version of vae_scale; remove it and run the command again")
    records = [line for line in lines[1:] if isinstance(line, dict) and line.keys() >= RECORD_KEYS]
    return Journal(path, lines[0], {str(record["url"]): record for record in records})


def _is_header(line: Any) -> bool:
    # Validated, because file names and shard counts are derived from it.
    try:
        info, names = line["vae_scale"], [line["name"], *line["vae_scale"]["splits"]]
        has_valid_names = all(re.fullmatch(r"[\w-]+", name) for name in names)
        has_valid_sizes = line["images_per_shard"] > 0 and all(0 < size <= 2**40 for size in info["splits"].values())
        return has_valid_names and has_valid_sizes and isinstance(info["fingerprint"], str)
    except (KeyError, TypeError, AttributeError):
        return False


def find_intact_shards(
    out: Path, journals: Collection[Journal], jobs: Sequence[ShardJob], workers: int
) -> Iterator[ShardRecord]:
    """Yields the records of the shards whose files have the sha256 of a record."""

    def find(job: ShardJob) -> ShardRecord | None:
        path, records = out / job.url, [journal.records[job.url] for journal in journals if job.url in journal.records]
        digest = sha256_of(path) if records and path.is_file() else None
        return next((record for record in records if record["sha256"] == digest), None)

    with ThreadPoolExecutor(workers) as pool:
        yield from filter(None, pool.map(find, jobs))


def merge(out: Path, workers: int) -> None:
    """Merges the parts in `out` into one set, with the same files as if one process had packed it.

    Args:
        out: Folder with the shards and the journals of all parts. A complete set is not changed.
        workers: Threads that check the shards.

    Raises:
        UserError: There are no parts, they are of different sets, or shards are missing or damaged. Nothing is written.
    """
    if (out / "index.json").exists():
        remove_journals(out)
        return
    journals = read_journals(out)
    if not journals:
        raise UserError(
            f"--merge {out}: no parts found; write them with --part and copy their .packing-* files with the shards"
        )
    header = next(iter(journals.values())).header
    jobs = list_jobs(header["name"], header["vae_scale"]["splits"], header["images_per_shard"])
    records = {}
    with tqdm(total=len(jobs), unit=" shards", desc=f"checking {out}") as bar:
        for record in find_intact_shards(out, journals.values(), jobs, workers):
            records[record["url"]] = record
            bar.update()
    if missing := [job for job in jobs if job.url not in records]:
        count = max(part.count for part in journals)
        parts = [Part(number, count) for number in range(1, count + 1)]
        incomplete = [part for part in parts if any(job.url not in records for job in part.select(jobs))]
        raise UserError(
            f"--merge {out}: {len(missing):,} of {len(jobs):,} shards are missing or damaged "
            f"({_abbreviate([job.url for job in missing])}); run --part {_abbreviate(incomplete)} again, "
            "or copy these shards and their .packing-* files again"
        )
    write_manifests(out, header["name"], [records[job.url] for job in jobs], header["vae_scale"])


def _abbreviate(items: Sequence[object]) -> str:
    return ", ".join(map(str, items[:5])) + (", ..." if len(items) > 5 else "")


def is_complete(out: Path, header: JournalHeader) -> bool:
    """Returns whether `out` contains the complete set described by `header`, and removes its journals.

    Raises:
        UserError: `out` contains another set.
    """
    if not (out / "index.json").exists():
        return False
    try:
        fingerprint = json.loads((out / "index.json").read_text())["vae_scale"]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        fingerprint = None
    if fingerprint != header["vae_scale"]["fingerprint"]:
        raise UserError(f"{out}: contains a complete set of another source or other options; choose another --out")
    remove_journals(out)
    return True


def remove_journals(folder: Path) -> None:
    """Removes the journals of a complete set."""
    for path in folder.glob(".packing*.jsonl"):
        path.unlink(missing_ok=True)


def compute_fingerprint(identity: Any) -> str:
    """Returns the sha256 of a JSON value that identifies a set."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def write_manifests(out: Path, name: str, records: list[ShardRecord], info: dict[str, Any]) -> None:
    """Writes sizes.json (for open_clip), _info.json (for timm) and, last, index.json, and removes the journals."""
    splits: dict[str, dict[str, Any]] = {}
    for record in records:
        split = record["split"]
        entry = splits.setdefault(split, {"name": split, "num_samples": 0, "filenames": [], "shard_lengths": []})
        entry["num_samples"] += record["nsamples"]
        entry["filenames"].append(record["url"])
        entry["shard_lengths"].append(record["nsamples"])
    atomic_write(out / "sizes.json", json.dumps({record["url"]: record["nsamples"] for record in records}))
    atomic_write(out / "_info.json", json.dumps({"name": name, "splits": splits}))
    write_index(out, name, records, info)
    remove_journals(out)


def write_index(out: Path, name: str, records: list[ShardRecord], info: dict[str, Any]) -> None:
    """Writes index.json."""
    kind = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": name}
    atomic_write(out / "index.json", json.dumps(kind | {"shardlist": records, "vae_scale": info}))
