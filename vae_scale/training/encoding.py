"""The posteriors of a whole set of images, written as shards of latents."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from vae_scale.data.parts import Job, Record, check, side_manifests, write_json
from vae_scale.data.reader import Reader
from vae_scale.data.shard_file import FORMAT_VERSION, Layout, Shard, shard_name, write_shard
from vae_scale.data.shards import ShardSet
from vae_scale.data.transfer import Uploader
from vae_scale.errors import UserError
from vae_scale.models.vae import VAE
from vae_scale.training import compiling
from vae_scale.training.evaluation import ALONE, Processes
from vae_scale.training.objective import to_model

NAME = "latents"  # first part of every shard's name
NOTES = f".{NAME}-*.json"  # files that note finished shards, one each, while the set is incomplete
PLANES = ["mean", "log_variance"]
HASHERS = 4  # threads that check what an interrupted call wrote

Latents = npt.NDArray[np.float32]


@torch.no_grad()
def encode_shards(
    model: VAE,
    shards: ShardSet,
    out: Path,
    batch: int,
    about: dict[str, Any],
    training: Sequence[str],
    processes: Processes = ALONE,
    compiled: bool = False,
) -> bool:
    """Writes mean and log-variance of the posterior of every image into `out`; goes on where an interrupted call stopped.

    Each shard of images becomes a shard of latents, which one process encodes. So its bytes depend on neither the number of
    processes nor on interruptions.

    Args:
        model: In evaluation mode.
        shards: The images.
        out: Made if it is missing. All processes must see the same folder.
        batch: Images at a time and process.
        about: What else the manifest says of the latents' origin; a set of another origin is not carried on.
        training: Splits over which `shift` and `scale` are measured, as `latents.measure_latents` defines them.
        processes: Those that share the work.
        compiled: Whether to use torch.compile.

    Returns:
        False where nothing was left to do.

    Raises:
        UserError: `out` holds another set, an image cannot be read, or a latent is not finite.
        OSError: the disk is full. Nothing incomplete stays under a final name.
    """
    origin = {"source": shards.fingerprint, **about}
    identity = {"format_version": FORMAT_VERSION, "splits": shards.splits, **origin}
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    if _complete(out, fingerprint):
        _remove_notes(out)
        return False
    jobs, device = _jobs(shards), next(model.parameters()).device
    todo = _todo(jobs, out, fingerprint, processes, device)
    out.mkdir(parents=True, exist_ok=True)
    planes = compiling.compiled(_planes) if compiled else _planes

    batch = min(batch, max(shard.samples for shard in shards.shards))
    uploader = Uploader((batch, *shards.image_shape), device)

    def encode(rows: npt.NDArray[np.int64]) -> Tensor:
        reader.gather(rows, uploader.buffer())
        return planes(model, uploader.upload())

    total = sum(shards.shards[number].samples for number in todo)
    bar = tqdm(total=total, unit=" images", unit_scale=True, desc=f"encoding {out}", disable=processes.rank > 0)
    with Reader(shards) as reader, bar, compiling.shown(bar.set_postfix_str):
        for place, number in enumerate(todo):
            reader.need(todo[place : place + 2])
            rows = np.arange(shards.starts[number], shards.starts[number + 1])
            latents = _encoded(encode, rows, batch, bar)
            if not np.isfinite(latents).all():
                at = shards.place(shards.shards[number])
                raise UserError(f"{at}: a latent is not finite; the model went wrong, or needs --precision fp32")
            record = _write(out, jobs[number], shards.shards[number], latents)
            write_json(out / f".{jobs[number].url}.json", {"fingerprint": fingerprint, **record})
    processes.add_up(torch.zeros((), device=device))  # all shards are written
    if processes.rank == 0:
        layout = Layout("npy", (2, *model.latent_shape), np.dtype(np.float32).str)
        ours = {"class_names": shards.class_names, "splits": shards.splits, "fingerprint": fingerprint, **origin}
        _finish(out, jobs, layout, ours, training)
    return True


def _planes(model: VAE, images: Tensor) -> Tensor:
    """Mean and log-variance of the latents of images, uint8 [b, h, w, 3]: fp32 [b, 2, *latent_shape]."""
    posterior = model.encode(to_model(images))
    return torch.stack([posterior.mean, 2 * posterior.log_sigma], 1)


def _encoded(
    encode: Callable[[npt.NDArray[np.int64]], Tensor], rows: npt.NDArray[np.int64], batch: int, bar: "tqdm[Any]"
) -> Latents:
    """Mean and log-variance of the latents of some images: [len(rows), 2, *latent_shape]."""
    parts = []
    for begin in range(0, len(rows), batch):
        # The last batch is padded: of another size, it would be compiled anew.
        chosen = rows[np.minimum(np.arange(begin, begin + batch), len(rows) - 1)]
        parts.append(encode(chosen))
        bar.update(min(batch, len(rows) - begin))
    found: Latents = torch.cat(parts)[: len(rows)].cpu().numpy()
    return found


def _jobs(shards: ShardSet) -> list[Job]:
    """The shards of latents, one for each shard of images; rows are counted through all shards of a split."""
    jobs: list[Job] = []
    rows, numbers = Counter[str](), Counter[str]()
    for shard in shards.shards:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", shard.split):  # it becomes part of a file name
            raise UserError(
                f"{shards.location}: split {shard.split!r}: a name has letters, digits, - and _, at most 64 of them"
            )
        start, rows[shard.split] = rows[shard.split], rows[shard.split] + shard.samples
        jobs.append(Job(shard_name(NAME, shard.split, numbers[shard.split]), shard.split, start, rows[shard.split]))
        numbers[shard.split] += 1
    return jobs


def _complete(out: Path, fingerprint: str) -> bool:
    """Whether `out` holds the whole set already."""
    if not (out / "index.json").exists():
        return False
    try:
        found = json.loads((out / "index.json").read_text())["vae_scale"]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        found = None
    if found != fingerprint:
        raise UserError(f"{out}: holds a complete set of images, or of another checkpoint or options; choose another --out")
    return True


def _noted(out: Path, fingerprint: str) -> dict[str, Record]:
    """The shards in `out` that are finished, by file name."""
    noted: dict[str, Record] = {}
    for path in out.glob(NOTES):
        try:
            record = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            raise UserError(f"{path}: damaged; remove it, and encode again") from None
        if not isinstance(record, dict) or record.pop("fingerprint", None) != fingerprint:
            raise UserError(f"{out}: holds interrupted work of another checkpoint, source or options; choose another --out")
        noted[record["url"]] = record
    return noted


def _remove_notes(out: Path) -> None:
    """Removes the notes of a set that is complete."""
    for path in out.glob(NOTES):
        path.unlink(missing_ok=True)


def _todo(jobs: list[Job], out: Path, fingerprint: str, processes: Processes, device: torch.device) -> list[int]:
    """Numbers of the shards that this process is to encode. All processes look before the first one writes."""
    noted, places = _noted(out, fingerprint), {job.url: number for number, job in enumerate(jobs)}
    mine = [noted[job.url] for job in jobs[processes.rank :: processes.ranks] if job.url in noted]
    finished = torch.zeros(len(jobs), device=device)
    for record, problem in check(out, mine, HASHERS):
        finished[places[record["url"]]] = problem is None
    left: list[int] = (processes.add_up(finished) == 0).nonzero().flatten().tolist()
    return left[processes.rank :: processes.ranks]


def _write(out: Path, job: Job, shard: Shard, latents: Latents) -> Record:
    """Writes a shard of latents; its entry in the manifest, and the sums over its images that `_normalisation` needs."""
    keys = [f"{job.split}-{row:08d}" for row in range(job.start, job.stop)]
    entry = write_shard(out / job.url, keys, shard.labels, latents, "npy")
    entry["latents_sha256"] = entry.pop("pixels_sha256")
    mean, log_variance = latents[:, 0], latents[:, 1]
    terms = (mean, np.square(mean), np.exp(log_variance))
    sums = [term.sum((0, 2, 3), dtype=np.float64).tolist() for term in terms]
    return {**entry, "split": job.split, "labels": shard.labels, "sums": sums}


def _normalisation(records: list[Record], positions: int) -> dict[str, list[float] | None]:
    """What takes each channel to mean 0 and deviation 1, (latent - shift) / scale: sqrt(var(mean) + E[sigma^2])."""
    if not records:
        return {"shift": None, "scale": None}
    count = positions * sum(record["nsamples"] for record in records)
    shift, square, spread = np.sum([record["sums"] for record in records], 0) / count
    scale = np.sqrt(np.maximum(square - np.square(shift) + spread, 1e-12))
    return {"shift": shift.tolist(), "scale": scale.tolist()}


def _finish(out: Path, jobs: list[Job], layout: Layout, ours: dict[str, Any], training: Sequence[str]) -> None:
    """Writes sizes.json, _info.json and, last, index.json, which makes the set complete."""
    noted = _noted(out, ours["fingerprint"])
    if missing := [job.url for job in jobs if job.url not in noted]:
        raise UserError(f"{out / missing[0]}: not there; all processes need the same folder")
    records = [noted[job.url] for job in jobs]
    measured = [record for record in records if record["split"] in training]
    description = {
        "version": FORMAT_VERSION,
        "content": NAME,
        "encoding": layout.encoding,
        "dtype": layout.dtype,
        "shape": layout.shape,
        "planes": PLANES,
        "stride": layout.stride,
        "offset": layout.offset,
        **_normalisation(measured, layout.shape[2] * layout.shape[3]),
        "measured_on": list(dict.fromkeys(record["split"] for record in measured)),
        **ours,
    }
    entries = [(record["url"], record["split"], record["nsamples"]) for record in records]
    for name, content in side_manifests(NAME, entries).items():
        write_json(out / name, content)
    shardlist = [{key: value for key, value in record.items() if key != "sums"} for record in records]
    kind = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": NAME}
    write_json(out / "index.json", kind | {"shardlist": shardlist, "vae_scale": description})
    _remove_notes(out)
