"""How well a model describes images it was not trained on."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vae_scale.data.plan import evaluation_rows
from vae_scale.data.shards import ShardSet
from vae_scale.data.stream import Reader
from vae_scale.models.vae import VAE
from vae_scale.randomness import noise_of_each
from vae_scale.training.objective import bits_per_dim, to_model


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work; by default it is alone.

    Attributes:
        rank: This process.
        ranks: All processes.
        add_up: Adds a tensor up over all processes.
        gather: Brings the rows of all processes together, one process after the other.
    """

    rank: int = 0
    ranks: int = 1
    add_up: Callable[[Tensor], Tensor] = lambda sums: sums
    gather: Callable[[Tensor], Tensor] = lambda rows: rows


ALONE = Processes()


def read_images(reader: Reader, rows: range) -> Tensor:
    """Samples `rows` of a set: uint8 [n, h, w, 3]."""
    images = np.empty((len(rows), *reader.shards.image_shape), np.uint8)
    reader.gather(np.arange(rows.start, rows.stop), images)
    return torch.from_numpy(images)


@torch.no_grad()
def evaluate(
    model: VAE,
    shards: ShardSet,
    images: int,
    batch: int,
    seed: int,
    processes: Processes = ALONE,
) -> dict[str, float]:
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
        reconstruction from one latent, and `bits_per_dim` where the likelihood is a density of images.
    """
    images, device = min(images, len(shards)), next(model.parameters()).device
    reader = Reader(shards, keep=1)
    buffer = np.empty((batch, *shards.image_shape), np.uint8)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for rows, weights in evaluation_rows(images, batch, processes.rank, processes.ranks):
        reader.gather(rows, buffer)
        x = to_model(torch.from_numpy(buffer).to(device))
        noise = noise_of_each(range(int(rows[0]), int(rows[0]) + batch), model.latent_shape, seed, "evaluation")
        terms = model(x, noise.to(device))
        error = (model.likelihood.mean(terms.output).float() - x).square().flatten(1).mean(1)
        psnr = -10 * (error / 4).clamp(min=1e-10).log10()
        each = torch.stack([-terms.log_prob, terms.kl.sum(1), psnr]).double()
        sums += (each * torch.from_numpy(weights).to(device)).sum(1)
    reconstruction, kl, psnr_db = (processes.add_up(sums) / images).tolist()
    nats = reconstruction + kl
    found = {"nats": nats, "reconstruction_nats": reconstruction, "kl_nats": kl, "psnr_db": psnr_db}
    if model.likelihood.normalised:
        found["bits_per_dim"] = bits_per_dim(nats, model.dimensions)
    return found
