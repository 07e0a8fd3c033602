"""Encodes a set of images into shards of latents."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from vae_scale.data.packing import write_shards
from vae_scale.data.parts import (
    JournalHeader,
    Part,
    ShardJob,
    ShardRecord,
    compute_fingerprint,
    is_complete,
    read_journals,
    write_manifests,
)
from vae_scale.data.reader import Reader
from vae_scale.data.shard_file import FORMAT_VERSION, Layout, map_shard, shard_name
from vae_scale.data.shards import ShardSet
from vae_scale.data.transfer import normalize_images, to_device
from vae_scale.errors import UserError
from vae_scale.models.vae import VAE
from vae_scale.runtime import compiling
from vae_scale.runtime.distributed import SINGLE_PROCESS, DistContext

NAME = "latents"  # prefix of the shard names
PLANES = ["mean", "log_variance"]
WORKERS = 2  # threads that write shards, and verify existing ones when resuming

Latents = npt.NDArray[np.float32]


@torch.no_grad()
def encode_shards(
    model: VAE,
    shards: ShardSet,
    out: Path,
    batch_size: int,
    provenance: dict[str, Any],
    norm_splits: Sequence[str],
    dist: DistContext = SINGLE_PROCESS,
    compiled: bool = False,
) -> bool:
    """Writes mean and log-variance of the posterior of every image to `out`. Resumes an interrupted call.

    Each shard of images is encoded by one process into one shard of latents, so its bytes depend neither on the number of
    processes nor on interruptions.

    Args:
        model: In evaluation mode.
        shards: The images.
        out: Created if missing. All processes must see the same folder.
        batch_size: Images per batch and process.
        provenance: Further entries of the manifest that identify the origin of the latents.
        norm_splits: Splits over which `shift` and `scale` are computed, as defined by `latents.measure_latents`.
        dist: The processes that share the work.
        compiled: Whether to use torch.compile.

    Returns:
        Whether anything was written.

    Raises:
        UserError: `out` holds another set, an image cannot be read, or a latent is not finite.
        OSError: the disk is full. No incomplete file is left under a final name.
    """
    origin = {"source": shards.fingerprint, **provenance}
    identity = {"format_version": FORMAT_VERSION, "splits": shards.splits, **origin}
    largest = max(shard.samples for shard in shards.shards)
    info = {"class_names": shards.class_names, "splits": shards.splits, "fingerprint": compute_fingerprint(identity), **origin}
    header: JournalHeader = {"name": NAME, "images_per_shard": largest, "vae_scale": info | {"encoding": "npy"}}
    if is_complete(out, header):
        return False

    device = next(model.parameters()).device
    part = Part(dist.rank + 1, dist.world_size)
    numbers = part.select(range(len(shards.shards)))
    batch_size = min(batch_size, largest)
    encode_batch = compiling.compile_function(_encode_batch) if compiled else _encode_batch

    def encode_shard(number: int) -> Latents:
        reader.prefetch([shard for shard in (number, number + 1) if shard in numbers])
        rows, batches = np.arange(shards.starts[number], shards.starts[number + 1]), []
        for begin in range(0, len(rows), batch_size):
            # The last batch is padded, since another batch size would trigger a recompilation.
            images = reader.gather(rows[np.minimum(np.arange(begin, begin + batch_size), len(rows) - 1)])
            batches.append(encode_batch(model, to_device(images, device)))
        latents: Latents = torch.cat(batches)[: len(rows)].cpu().numpy()
        if not np.isfinite(latents).all():
            location = shards.location_of(shards.shards[number])
            raise UserError(f"{location}: a latent is not finite; the model has diverged, or needs --precision fp32")
        return latents

    layout = Layout((2, *model.latent_shape), np.dtype(np.float32).str)
    splits, jobs = _list_splits(shards, layout.shape, encode_shard)
    total = sum(shards.shards[number].samples for number in numbers)
    bar = tqdm(total=total, unit=" images", unit_scale=True, desc=f"encoding {out}", disable=dist.rank > 0)
    with Reader(shards) as reader, bar, compiling.report_compilation(bar.set_postfix_str):
        write_shards(splits, jobs, out, part, header, WORKERS, bar)
    dist.all_reduce_sum(torch.zeros((), device=device))  # waits until all shards are written
    if dist.rank == 0:
        _write_manifests(out, jobs, dist.world_size, header, layout, norm_splits)
    return True


def _encode_batch(model: VAE, images: Tensor) -> Tensor:
    """Encodes images, uint8 [b, h, w, 3], to mean and log-variance: fp32 [b, 2, *latent_shape]."""
    posterior = model.encode(normalize_images(images))
    return torch.stack([posterior.mean, 2 * posterior.log_sigma], 1)


@dataclass
class _LatentSplit:
    """The latents of one split as a `packing.Split`, whose shards are those of the images. `fetch` runs the encoder."""

    name: str
    shape: tuple[int, ...]
    encode_shard: Callable[[int], Latents]
    labels: list[int] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)  # shard number by its first row

    def fetch(self, start: int, stop: int) -> Latents:
        return self.encode_shard(self.numbers[start])

    def decode(self, raw: Latents) -> Latents:
        return raw


def _list_splits(
    shards: ShardSet, shape: tuple[int, ...], encode_shard: Callable[[int], Latents]
) -> tuple[list[_LatentSplit], list[ShardJob]]:
    """Returns the splits of latents, and one job for each shard of images."""
    splits: dict[str, _LatentSplit] = {}
    jobs = []
    for number, shard in enumerate(shards.shards):
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", shard.split):  # it becomes part of a file name
            raise UserError(f"{shards.location}: split {shard.split!r}: a name consists of at most 64 letters, digits, - and _")
        split = splits.setdefault(shard.split, _LatentSplit(shard.split, shape, encode_shard))
        start, index = len(split.labels), len(split.numbers)
        split.labels += shard.labels
        split.numbers[start] = number
        jobs.append(ShardJob(shard_name(NAME, shard.split, index), shard.split, start, len(split.labels)))
    return list(splits.values()), jobs


def _normalization(out: Path, records: list[ShardRecord], layout: Layout) -> dict[str, list[float] | None]:
    """Returns shift and scale = sqrt(var(mean) + E[sigma^2]) of each channel, over all latents of shards."""
    if not records:
        return {"shift": None, "scale": None}
    sums, count = np.zeros((3, layout.shape[1])), 0
    for record in records:
        with (out / record["url"]).open("rb") as file:
            mean, log_variance = map_shard(file, record["nsamples"], layout).swapaxes(0, 1)
        sums += [term.sum((0, 2, 3), dtype=np.float64) for term in (mean, np.square(mean), np.exp(log_variance))]
        count += mean[:, 0].size
    shift, mean_square, variance = sums / count
    scale = np.sqrt(np.maximum(mean_square - np.square(shift) + variance, 1e-12))
    return {"shift": shift.tolist(), "scale": scale.tolist()}


def _write_manifests(
    out: Path, jobs: list[ShardJob], parts: int, header: JournalHeader, layout: Layout, norm_splits: Sequence[str]
) -> None:
    """Combines the journals of all processes into the manifests."""
    by_url: dict[str, ShardRecord] = {}
    for part, journal in read_journals(out, header).items():
        if part.count == parts:
            by_url |= journal.records
    if missing := [job.url for job in jobs if job.url not in by_url]:
        raise UserError(f"{out / missing[0]}: missing; all processes must use the same folder")
    records = [by_url[job.url] for job in jobs]
    norm_records = [record for record in records if record["split"] in norm_splits]
    description: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "content": NAME,
        "encoding": "npy",
        "dtype": layout.dtype,
        "shape": layout.shape,
        "planes": PLANES,
        "stride": layout.stride,
        "offset": layout.offset,
        **_normalization(out, norm_records, layout),
        "measured_on": list(dict.fromkeys(record["split"] for record in norm_records)),
        **header["vae_scale"],
    }
    keys = {"pixels_sha256": "latents_sha256"}
    entries = [{keys.get(key, key): value for key, value in record.items()} for record in records]
    write_manifests(out, NAME, entries, description)
