"""How well a model describes images it was not trained on."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vae_scale.data.plan import evaluation_rows
from vae_scale.data.reader import Reader
from vae_scale.data.shards import ShardSet
from vae_scale.data.transfer import Uploader, to_device
from vae_scale.errors import UserError
from vae_scale.metrics.reconstruction import psnr
from vae_scale.models.vae import VAE
from vae_scale.randomness import noise_of_each
from vae_scale.training import checkpoint
from vae_scale.training.objective import bits_per_dim, to_model

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work; by default it is alone.

    Attributes:
        rank: This process.
        ranks: All processes.
        add_up: Adds a tensor up over all processes.
        gather: Brings the rows of all processes together, one process after the other.
        mark: Told where this process is, now and then, at the same places by all.
    """

    rank: int = 0
    ranks: int = 1
    add_up: Callable[[Tensor], Tensor] = lambda sums: sums
    gather: Callable[[Tensor], Tensor] = lambda rows: rows
    mark: Callable[[str], None] = lambda place: None

    @staticmethod
    def of(accelerator: "Accelerator") -> "Processes":
        """Those that were launched together."""
        return Processes(
            accelerator.process_index,
            accelerator.num_processes,
            lambda sums: accelerator.reduce(sums, "sum"),
            accelerator.gather,
        )


ALONE = Processes()


def newest_for_all(run: Path, option: str, processes: Processes, device: torch.device) -> Path:
    """The newest whole checkpoint of the run that `option` names, the same for all processes.

    Raises:
        UserError: it has none.
    """
    found = 0 if processes.rank else checkpoint.images_of(checkpoint.newest_of(run, option))
    return checkpoint.folder_of(run, int(processes.add_up(torch.tensor(found, device=device))))  # rank 0 decides


def open_images(place: str | None, data: Mapping[str, Any], side: int) -> ShardSet:
    """The images at `place`, or by default those that a run was trained on, for a model of this resolution.

    Args:
        place: What the user gave; None for the run's own.
        data: The `data` options of the run.
        side: Of the model's images, in pixels.

    Raises:
        UserError: they cannot be read, or are of another size; or the run, which may be anybody's, names a command.
    """
    shards = ShardSet.open(place or data["shards"], commands=place is not None)
    height, width = shards.image_shape[:2]
    if (height, width) != (side, side):
        raise UserError(f"--shards {shards.location}: images of {width}x{height}, the model's are {side} a side")
    return shards


def batches(
    shards: ShardSet, images: int, batch: int, processes: Processes, device: torch.device, spread: bool = False, bar: str = ""
) -> Iterator[tuple[range, Tensor, Tensor]]:
    """This process's share of `images` images of a set: its first ones, or with `spread` those spread evenly over it.

    Yields:
        For each batch the numbers of its images, 0..images-1 and beyond for the padding of the tail; the images, uint8
        [batch, h, w, 3], valid until the batch after the next is asked for; and their weights [batch]: 1, or 0 for padding.
        With `bar`, rank 0 shows a progress bar so named.
    """
    chosen = np.linspace(0, len(shards) - 1, images).astype(np.int64) if spread else np.arange(images)
    uploader = Uploader((batch, *shards.image_shape), device)
    plan = evaluation_rows(images, batch, processes.rank, processes.ranks)
    with Reader(shards) as reader:
        for number, (rows, weights) in enumerate(tqdm(plan, bar, unit=" batches", disable=not bar or processes.rank > 0)):
            processes.mark(f"batch {number} of {images:,} images")
            soon = np.concatenate([rows for rows, _ in plan[number : number + 2]])
            reader.need(np.unique(shards.numbers(chosen[soon])).tolist())
            reader.gather(chosen[rows], uploader.buffer())
            numbers = range(int(rows[0]), int(rows[0]) + batch)
            yield numbers, uploader.upload(), to_device(weights, device)


@torch.no_grad()
def evaluate(
    model: VAE,
    shards: ShardSet,
    images: int,
    batch: int,
    seed: int,
    processes: Processes = ALONE,
) -> dict[str, float | list[float]]:
    """The ELBO of the first `images` of a set, each counted once whatever the batch and the number of ranks.

    Args:
        model: In evaluation mode.
        shards: The images.
        images: How many, at most.
        batch: Images at a time and rank.
        seed: Keys the noise of each image.
        processes: Those that share the work.

    Returns:
        Means over images: `nats` (the negative ELBO), its terms `reconstruction_nats` and `kl_nats`, `psnr_db` of the
        reconstruction from one latent, `bits_per_dim` where the likelihood is a density of images, and `kl_nats_per_channel`
        of the latents, or per layer of a hierarchy.
    """
    images, device = min(images, len(shards)), next(model.parameters()).device
    sums = torch.zeros((), dtype=torch.float64, device=device)
    for numbers, pixels, weights in batches(shards, images, batch, processes, device):
        x = to_model(pixels)
        noise = noise_of_each(numbers, model.latent_shape, seed, "evaluation")
        terms = model(x, to_device(noise, device))
        each = torch.stack([-terms.log_prob, psnr(x, model.likelihood.mean(terms.output)), *terms.kl.unbind(1)]).double()
        sums = sums + (each * weights).sum(1)
    reconstruction, psnr_db, *channels = (processes.add_up(sums) / images).tolist()
    kl = sum(channels)
    nats = reconstruction + kl
    found: dict[str, float | list[float]] = {
        "nats": nats,
        "reconstruction_nats": reconstruction,
        "kl_nats": kl,
        "kl_nats_per_channel": channels,
        "psnr_db": psnr_db,
    }
    if model.likelihood.normalised:
        found["bits_per_dim"] = bits_per_dim(nats, model.dimensions)
    return found
