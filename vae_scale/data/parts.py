"""Parts of a set, the journals that make packing resumable, and the manifests of a complete set."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from vae_scale.data.shard_file import shard_name
from vae_scale.errors import UserError
from vae_scale.files import atomic_path, sha256_of

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


@dataclass(frozen=True, order=True)
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
        match = re.fullmatch(r"(\d{1,6})/([1-9]\d{0,5})", text)
        if not match:
            raise UserError(f"--part {text}: expected I/N, for example 2/4 for part 2 of 4")
        part = cls(int(match[1]), int(match[2]))
        if not 1 <= part.number <= part.count:
            raise UserError(f"--part {text}: must be from 1/{part.count} to {part.count}/{part.count}")
        return part

    def select(self, items: Sequence[T]) -> Sequence[T]:
        """Returns the items of this part. They are consecutive, so that a part reads one range of an archive."""
        start, stop = (number * len(items) // self.count for number in (self.number - 1, self.number))
        return items[start:stop]

    @property
    def journal_name(self) -> str:
        """File name of this part's journal."""
        return ".packing.jsonl" if self.count == 1 else f".packing-{self.number}-of-{self.count}.jsonl"


def find_journals(folder: Path) -> dict[Part, Path]:
    """Returns the journals in a folder, sorted by part."""
    journals = {}
    for path in folder.glob(".packing*.jsonl"):
        if match := re.fullmatch(r"\.packing(?:-(\d+)-of-(\d+))?\.jsonl", path.name):
            journals[Part(int(match[1] or 1), int(match[2] or 1))] = path
    return dict(sorted(journals.items()))


def remove_journals(folder: Path) -> None:
    """Removes the journals of a complete set."""
    for path in find_journals(folder).values():
        path.unlink(missing_ok=True)


def read_journal(path: Path) -> tuple[JournalHeader, dict[str, ShardRecord]]:
    """Returns a journal's header and the records of its finished shards by file name.

    Raises:
        UserError: The first line is not a valid header.
    """
    lines: list[Any] = []
    for line in path.read_text("utf-8", "replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):  # the last line is incomplete if the process was killed
            lines.append(json.loads(line))
    if not lines or not _is_header(lines[0]):
        raise UserError(f"{path}: not a journal of this version of vae_scale; remove it and run the command again")
    records = [line for line in lines[1:] if isinstance(line, dict) and line.keys() >= RECORD_KEYS]
    return lines[0], {str(record["url"]): record for record in records}


def _is_header(line: Any) -> bool:
    # Validated, because file names and shard counts are derived from it.
    try:
        info, names = line["vae_scale"], [line["name"], *line["vae_scale"]["splits"]]
        has_valid_names = all(re.fullmatch(r"[\w-]+", name) for name in names)
        has_valid_sizes = line["images_per_shard"] > 0 and all(0 < size <= 2**40 for size in info["splits"].values())
        return has_valid_names and has_valid_sizes and isinstance(info["fingerprint"], str)
    except (KeyError, TypeError, AttributeError):
        return False


class Journal:
    """The journal of one part: a header, then one record per finished shard.

    The header contains the hashes of the sources, which may still be computed while the first shards are written. Records are
    kept in memory until it is available.
    """

    def __init__(self, out: Path, part: Part, header: Future[JournalHeader]) -> None:
        self.out, self.part, self._header = out, part, header
        self._pending: list[ShardRecord] = []

    def read(self, any_division: bool) -> Iterator[tuple[Part, ShardRecord]]:
        """Yields the records of all journals in the folder, each with the part that wrote it.

        Raises:
            UserError: A journal belongs to another set or, unless `any_division`, to another number of parts.
        """
        for part, path in find_journals(self.out).items():
            header, records = read_journal(path)
            if header["vae_scale"]["fingerprint"] != self._header.result()["vae_scale"]["fingerprint"]:
                raise UserError(
                    f"{self.out}: contains an interrupted set of another source or other options; choose another --out"
                )
            if part.count != self.part.count and not any_division:
                raise UserError(
                    f"{self.out}: contains part {part} of a set, not of {self.part.count} parts; choose another --out"
                )
            yield from ((part, record) for record in records.values())

    def add(self, record: ShardRecord) -> None:
        """Appends the record of a finished shard."""
        self._pending.append(record)
        if self._header.done():
            self.flush()

    def flush(self) -> None:
        """Writes all pending records."""
        path = self.out / self.part.journal_name
        if not path.exists():
            _write_line(path, self._header.result())
        with path.open("a") as file:
            file.writelines("\n" + json.dumps(record) for record in self._pending)
        self._pending.clear()


def check_shards(out: Path, records: Iterable[ShardRecord], workers: int) -> Iterator[tuple[ShardRecord, str | None]]:
    """Compares the size and sha256 of shards with their records. Yields each record and its problem, or None."""

    def check(record: ShardRecord) -> tuple[ShardRecord, str | None]:
        path = out / record["url"]
        if not path.is_file():
            return record, "is missing"
        if (size := path.stat().st_size) != record["filesize"]:
            return record, f"has {size} bytes, expected {record['filesize']}"
        return record, None if sha256_of(path) == record["sha256"] else "is damaged (its sha256 differs)"

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(check, records)


def merge(out: Path, workers: int) -> list[str]:
    """Merges the parts in `out` into one set, with the same files as if one process had packed it.

    Args:
        out: Folder with the shards and the journals of all parts. A complete set is not changed.
        workers: Threads that check the shards.

    Returns:
        Problems, one line each, with the part to run again. Nothing is written unless the list is empty.

    Raises:
        UserError: There are no parts, or their numbers of parts differ.
    """
    journals = find_journals(out)
    if (out / "index.json").exists():
        remove_journals(out)
        return []
    if not journals:
        raise UserError(
            f"--merge {out}: no parts found; write them with --part and copy their .packing-* files with the shards"
        )
    counts = sorted({part.count for part in journals})
    if counts == [1]:
        raise UserError(f"--merge {out}: contains an interrupted pack, not parts; run the same command again")
    if len(counts) > 1:
        names = ", ".join(part.journal_name for part in journals)
        raise UserError(
            f"--merge {out}: contains parts of different divisions ({names}); remove the journals of other divisions"
        )

    header, _ = read_journal(next(iter(journals.values())))
    jobs = list_jobs(header["name"], header["vae_scale"]["splits"], header["images_per_shard"])
    parts = [Part(number, counts[0]) for number in range(1, counts[0] + 1)]
    owners = {job.url: part for part in parts for job in part.select(jobs)}
    records: dict[str, ShardRecord] = {}
    problems = []
    for part in parts:
        urls = [job.url for job in part.select(jobs)]
        part_records, problem = _read_part(part, journals.get(part), header, urls)
        records |= part_records
        problems += [problem] if problem else []
    size = sum(record["filesize"] for record in records.values())
    with tqdm(total=size, unit="B", unit_scale=True, desc=f"checking {out}") as bar:
        for record, problem in check_shards(out, records.values(), workers):
            bar.update(record["filesize"])
            if problem:
                problems.append(f"{record['url']} {problem}; run --part {owners[record['url']]} again, or copy the file again")
    if not problems:
        write_manifests(out, header["name"], [records[job.url] for job in jobs], header["vae_scale"])
    return problems


def _read_part(
    part: Part, journal: Path | None, header: JournalHeader, urls: list[str]
) -> tuple[dict[str, ShardRecord], str | None]:
    """Returns the records of a part's shards, and its problem, or None."""
    if journal is None:
        return {}, f"part {part} is missing; run --part {part}, or copy {part.journal_name} and its shards"
    part_header, records = read_journal(journal)
    if part_header != header:
        problem = f"part {part} is of another source or other options than the first part"
        return {}, f"{problem}; remove {journal.name} and run --part {part} again, with the first part's source and options"
    missing = [url for url in urls if url not in records]
    names = " to ".join(dict.fromkeys([missing[0], missing[-1]])) if missing else ""
    problem = f"part {part} is missing {len(missing)} of its {len(urls)} shards ({names}); run --part {part} again"
    return {url: records[url] for url in urls if url in records}, problem if missing else None


def is_complete(out: Path, header: Future[JournalHeader]) -> bool:
    """Returns whether `out` contains the complete set described by `header`, and removes its journals.

    Raises:
        UserError: `out` contains another set.
    """
    if not (out / "index.json").exists():
        return False
    try:
        existing = json.loads((out / "index.json").read_text())["vae_scale"]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        existing = None
    if existing != header.result()["vae_scale"]["fingerprint"]:
        raise UserError(f"{out}: contains a complete set of another source or other options; choose another --out")
    remove_journals(out)
    return True


def fingerprint(identity: Any) -> str:
    """Returns the sha256 of a JSON value that identifies a set."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def write_manifests(out: Path, name: str, records: list[ShardRecord], info: dict[str, Any]) -> None:
    """Writes sizes.json, _info.json and, last, index.json, which marks the set as complete; then removes the journals."""
    for file_name, content in side_manifests(name, [(r["url"], r["split"], r["nsamples"]) for r in records]).items():
        _write_line(out / file_name, content)
    write_index(out, name, records, info)
    remove_journals(out)


def write_index(out: Path, name: str, records: list[ShardRecord], info: dict[str, Any]) -> None:
    """Writes index.json."""
    kind = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": name}
    _write_line(out / "index.json", kind | {"shardlist": records, "vae_scale": info})


def side_manifests(name: str, shards: list[tuple[str, str, int]]) -> dict[str, Any]:
    """Returns the content of sizes.json (for open_clip) and _info.json (for timm).

    Args:
        name: Name of the set.
        shards: File name, split and number of images of each shard.
    """
    splits: dict[str, dict[str, Any]] = {}
    for url, split, samples in shards:
        entry = splits.setdefault(split, {"name": split, "num_samples": 0, "filenames": [], "shard_lengths": []})
        entry["num_samples"] += samples
        entry["filenames"].append(url)
        entry["shard_lengths"].append(samples)
    return {"sizes.json": {url: samples for url, _, samples in shards}, "_info.json": {"name": name, "splits": splits}}


def _write_line(path: Path, content: dict[str, Any]) -> None:
    """Writes one line of JSON atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content))
