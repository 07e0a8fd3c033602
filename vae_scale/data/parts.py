"""A pack's list of shards, shared out between machines: journals of what is finished, and the manifests at the end."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vae_scale.data.shard_file import shard_name
from vae_scale.errors import UserError

Record = dict[str, Any]  # a shard's entry in the manifest
RECORD = {"url", "split", "nsamples", "filesize", "md5sum", "sha256", "pixels_sha256", "labels"}  # its keys
Header = dict[str, Any]  # first line of a journal: all that the manifests say, except for the shards


@dataclass(frozen=True)
class Job:
    """One shard to be written: rows start..stop of a split."""

    url: str
    split: str
    start: int
    stop: int


def list_jobs(name: str, rows: dict[str, int], images_per_shard: int) -> list[Job]:
    """All shards of a set whose splits have `rows` images."""
    return [
        Job(shard_name(name, split, number), split, start, min(start + images_per_shard, count))
        for split, count in rows.items()
        for number, start in enumerate(range(0, count, images_per_shard))
    ]


@dataclass(frozen=True, order=True)
class Part:
    """Part `number` of `count`, from 1. A pack by one process is part 1 of 1."""

    number: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @staticmethod
    def parse(text: str) -> "Part":
        """`i/n` as --part takes it.

        Raises:
            UserError: it is none.
        """
        match = re.fullmatch(r"(\d{1,6})/([1-9]\d{0,5})", text)
        if not match:
            raise UserError(f"--part {text}: write it as i/n, part i of n, for example 2/4")
        part = Part(int(match[1]), int(match[2]))
        if not 1 <= part.number <= part.count:
            raise UserError(f"--part {text}: there are parts 1/{part.count} to {part.count}/{part.count}")
        return part

    def of(self, jobs: list[Job]) -> list[Job]:
        """Its share of the shards: neighbours, so that an archive is read no further than needed."""
        begin, end = (number * len(jobs) // self.count for number in (self.number - 1, self.number))
        return jobs[begin:end]

    @property
    def journal(self) -> str:
        """File name of its journal."""
        return ".packing.jsonl" if self.count == 1 else f".packing-{self.number}-of-{self.count}.jsonl"


WHOLE = Part()


def journals(folder: Path) -> dict[Part, Path]:
    """The journals in a folder, in order of their parts."""
    found = {}
    for path in folder.glob(".packing*.jsonl"):
        if match := re.fullmatch(r"\.packing-(\d+)-of-(\d+)\.jsonl", path.name):
            found[Part(int(match[1]), int(match[2]))] = path
        elif path.name == WHOLE.journal:
            found[WHOLE] = path
    return dict(sorted(found.items()))


def read_journal(path: Path) -> tuple[Header, dict[str, Record]]:
    """A journal's header and its shards' records, by file name.

    Raises:
        UserError: it has no header of this version.
    """
    lines: list[Any] = []
    for line in path.read_text("utf-8", "replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):  # a line that was being written when the process was stopped
            lines.append(json.loads(line))
    if not lines or not _is_header(lines[0]):
        raise UserError(f"{path}: not a journal of this vae_scale; remove it, and pack again")
    records = [line for line in lines[1:] if isinstance(line, dict) and line.keys() >= RECORD]
    return lines[0], {str(record["url"]): record for record in records}


def _is_header(line: Any) -> bool:
    """Whether this may be the first line of a journal, of which file names and numbers of shards are made."""
    try:
        ours, size, plain = line["vae_scale"], line["images_per_shard"], r"[\w-]+"
        counts = all(re.fullmatch(plain, split) and 0 < count <= 2**40 for split, count in ours["splits"].items())
        return counts and bool(re.fullmatch(plain, line["name"])) and size > 0 and isinstance(ours["fingerprint"], str)
    except (KeyError, TypeError, AttributeError):
        return False


class Journal:
    """Notes the finished shards of one part, while the set is incomplete.

    Its header has the hashes of the sources, which may still be computed while the first shards are written; until
    then records wait in memory, and a kill loses them.
    """

    def __init__(self, out: Path, part: Part, header: Future[Header]) -> None:
        self.path = out / part.journal
        self._header = header
        self._waiting: list[Record] = []

    def add(self, record: Record) -> None:
        """Notes a shard that is finished."""
        self._waiting.append(record)
        if self._header.done():
            self.flush()

    def flush(self) -> None:
        """Notes all that waits."""
        if not self.path.exists():
            write_json(self.path, self._header.result())
        with self.path.open("a") as file:
            file.writelines("\n" + json.dumps(record) for record in self._waiting)
        self._waiting.clear()


def check(out: Path, records: Iterable[Record], workers: int) -> Iterator[tuple[Record, str | None]]:
    """Compares shards with their records, in parallel. Yields what is wrong with each, or None."""

    def compare(record: Record) -> tuple[Record, str | None]:
        path = out / record["url"]
        if not path.is_file():
            return record, "is missing"
        if (size := path.stat().st_size) != record["filesize"]:
            return record, f"has {size} bytes, not {record['filesize']}"
        with path.open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == record["sha256"]
        return record, None if same else "is damaged: its sha256 is another"

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(compare, records)


def merge(out: Path, workers: int) -> list[str]:
    """Makes one set of the parts in `out`, the same files as if it had been packed at once. A complete set is left alone.

    Args:
        out: Folder with the shards and the journals of all parts.
        workers: Threads that check the shards.

    Returns:
        What is missing or wrong, one line each, and which part to run again; if there is anything, nothing was written.

    Raises:
        UserError: there are no parts, or those of more than one division.
    """
    found = journals(out)
    if (out / "index.json").exists():
        remove_journals(out)
        return []
    if not found:
        raise UserError(
            f"--merge {out}: no parts there; write them with --part, and copy their .packing-* files with the shards"
        )
    counts = sorted({part.count for part in found})
    if counts == [1]:
        raise UserError(f"--merge {out}: holds an interrupted pack, not parts of one; run its command again")
    if len(counts) > 1:
        kinds = ", ".join(part.journal for part in found)
        raise UserError(f"--merge {out}: holds parts of different divisions ({kinds}); remove the journals that do not belong")

    header, _ = read_journal(next(iter(found.values())))
    parts = [Part(number, counts[0]) for number in range(1, counts[0] + 1)]
    owners = {job.url: part for part in parts for job in part.of(_all_jobs(header))}
    records: dict[str, Record] = {}
    problems = []
    for part in parts:
        finished, problem = _finished(part, found.get(part), header)
        records |= finished
        problems += [problem] if problem else []
    size = sum(record["filesize"] for record in records.values())
    with tqdm(total=size, unit="B", unit_scale=True, desc=f"checking {out}") as bar:
        for record, problem in check(out, records.values(), workers):
            bar.update(record["filesize"])
            if problem:
                problems.append(f"{record['url']} {problem}; run --part {owners[record['url']]} again, or copy it again")
    if not problems:
        write_manifests(out, header, records)
        remove_journals(out)
    return problems


def _finished(part: Part, journal: Path | None, header: Header) -> tuple[dict[str, Record], str | None]:
    """What a part's journal says is finished, and what it lacks of the set that `header` describes."""
    if journal is None:
        return {}, f"part {part} is missing; run --part {part}, or copy {part.journal} and its shards"
    own, records = read_journal(journal)
    if own != header:
        reason = f"part {part} is of another source or other options than the first"
        return {}, f"{reason}; remove {journal.name} and run --part {part} again, with the first part's source and options"
    mine = [job.url for job in part.of(_all_jobs(header))]
    missing = [url for url in mine if url not in records]
    names = " to ".join(dict.fromkeys([missing[0], missing[-1]])) if missing else ""
    problem = f"part {part} lacks {len(missing)} of its {len(mine)} shards ({names}); run --part {part} again"
    return {url: records[url] for url in mine if url in records}, problem if missing else None


def remove_journals(out: Path) -> None:
    """Removes the journals of a set that is complete."""
    for path in journals(out).values():
        path.unlink(missing_ok=True)


def write_manifests(out: Path, header: Header, records: dict[str, Record]) -> None:
    """Writes sizes.json, _info.json and, last, index.json, which makes the set complete."""
    ordered = [records[job.url] for job in _all_jobs(header)]
    entries = [(record["url"], record["split"], record["nsamples"]) for record in ordered]
    for name, content in side_manifests(header["name"], entries).items():
        write_json(out / name, content)
    kind = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": header["name"]}
    write_json(out / "index.json", kind | {"shardlist": ordered, "vae_scale": header["vae_scale"]})


def side_manifests(name: str, shards: list[tuple[str, str, int]]) -> dict[str, Any]:
    """What sizes.json (for open_clip) and _info.json (for timm) hold, given file name, split and images of each shard."""
    splits = {
        split: {
            "name": split,
            "num_samples": sum(samples for _, other, samples in shards if other == split),
            "filenames": [url for url, other, _ in shards if other == split],
            "shard_lengths": [samples for _, other, samples in shards if other == split],
        }
        for split in dict.fromkeys(split for _, split, _ in shards)
    }
    return {"sizes.json": {url: samples for url, _, samples in shards}, "_info.json": {"name": name, "splits": splits}}


def _all_jobs(header: Header) -> list[Job]:
    return list_jobs(header["name"], header["vae_scale"]["splits"], header["images_per_shard"])


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes one line of JSON, as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # it may be a link to somewhere else
    with temporary.open("w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
