"""Where the latents of a set of images lie, and the priors that are fitted to them."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from vae_scale.data.shards import ShardSet
from vae_scale.data.transfer import to_device
from vae_scale.models.flow import AUGMENTATIONS
from vae_scale.models.prior import LARGEST, GaussianMixture
from vae_scale.models.vae import VAE
from vae_scale.randomness import noise_of_each
from vae_scale.training.evaluation import ALONE, Processes, batches
from vae_scale.training.objective import FlowMatching, to_model


@torch.no_grad()
def posteriors(model: VAE, shards: ShardSet, images: int, batch: int, processes: Processes) -> Iterator[tuple[Tensor, Tensor]]:
    """Mean and sigma, each [n, *latent_shape], of `images` images spread evenly over a set, on every process."""
    device = next(model.parameters()).device
    for _, pixels, weights in batches(shards, images, batch, processes, device, spread=True):
        posterior = model.encode(to_model(pixels))
        counted = processes.gather(weights) > 0
        both = processes.gather(torch.stack([posterior.mean, posterior.log_sigma.exp()], 1))[counted]
        yield both[:, 0], both[:, 1]


def fit_prior(
    model: VAE,
    shards: ShardSet,
    images: int,
    batch: int,
    seed: int,
    processes: Processes = ALONE,
) -> GaussianMixture | None:
    """A mixture of Gaussians over the latents of images.

    Args:
        model: In evaluation mode.
        shards: The images it was trained on.
        images: How many, at most.
        batch: Images at a time and rank.
        seed: Keys the fit.
        processes: Those that share the work. Rank 0 alone fits the mixture.

    Returns:
        The mixture; None on other ranks, and where latents are too long for one.
    """
    if math.prod(model.latent_shape) > LARGEST:
        return None
    found = list(posteriors(model, shards, min(images, len(shards)), batch, processes))
    if processes.rank:
        return None
    mean, sigma = (torch.cat(parts).flatten(1) for parts in zip(*found, strict=True))
    return GaussianMixture.fit(mean, sigma, seed)


def measure_latents(
    model: VAE, shards: ShardSet, images: int, batch: int, processes: Processes = ALONE
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of latents, sqrt(var(mean) + E[sigma^2]): [c, 1, 1] each.

    Args:
        model: In evaluation mode.
        shards: The images.
        images: How many, at most.
        batch: Images at a time and rank.
        processes: Those that share the work.
    """
    sums = torch.zeros(3, model.latent_shape[0], dtype=torch.float64, device=next(model.parameters()).device)
    count = 0
    for mean, sigma in posteriors(model, shards, min(images, len(shards)), batch, processes):
        mean, sigma = mean.double(), sigma.double()
        sums += torch.stack([part.sum((0, 2, 3)) for part in (mean, mean.square(), sigma.square())])
        count += mean[:, 0].numel()
    shift, square, spread = sums / count
    scale = (square - shift.square() + spread).clamp(min=1e-12).sqrt()
    return shift.float()[:, None, None], scale.float()[:, None, None]


@torch.no_grad()
def evaluate_flow(
    objective: FlowMatching,
    shards: ShardSet,
    images: int,
    batch: int,
    seed: int,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """`velocity_error` of the flow on the first `images` of a set, without labels, times spread evenly over (0, 1).

    Args:
        objective: Of the model, in evaluation mode.
        shards: The images.
        images: How many, at most.
        batch: Images at a time and rank.
        seed: Keys the noise of each image.
        processes: Those that share the work.
    """
    model, images = objective.model, min(images, len(shards))
    assert model.flow is not None
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for numbers, pixels, weights in batches(shards, images, batch, processes, device):
        draws = {
            "noise": noise_of_each(numbers, model.latent_shape, seed, "evaluation"),
            "start": noise_of_each(numbers, model.latent_shape, seed, "flow evaluation"),
            # multiples of the golden ratio fill (0, 1) evenly, however many there are
            "time": torch.tensor([(number + 0.5) * 0.6180339887 % 1 for number in numbers]),
            "label": torch.full((batch,), model.flow.classes),
            "augmentation": torch.zeros(batch, AUGMENTATIONS),
        }
        error = objective.velocity_error(to_model(pixels), {name: to_device(drawn, device) for name, drawn in draws.items()})
        total += (error.double() * weights).sum()
    return {"velocity_error": (processes.add_up(total) / images).item()}
