"""Statistics of the latents of a set of images, and priors fitted to them."""

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from vae_scale.data.shards import ShardSet
from vae_scale.data.transfer import normalize_images, to_device
from vae_scale.errors import UserError
from vae_scale.evaluation.evaluator import iterate_batches
from vae_scale.models.flow import AUGMENTATION_DIM, Flow
from vae_scale.models.mixture import MAX_LATENT_DIM, GaussianMixture, kmeans
from vae_scale.models.vae import VAE
from vae_scale.randomness import per_sample_noise
from vae_scale.runtime.distributed import SINGLE_PROCESS, DistContext

GOLDEN_RATIO = 0.6180339887


@torch.no_grad()
def iterate_posteriors(
    model: VAE, shards: ShardSet, images: int, batch_size: int, dist: DistContext
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields mean and sigma, each [n, *latent_shape], of `images` images spread evenly over a set, on every rank."""
    device = next(model.parameters()).device
    for _, pixels, weights in iterate_batches(shards, images, batch_size, dist, device, spread=True):
        posterior = model.encode(normalize_images(pixels))
        used = dist.gather(weights) > 0
        mean_and_sigma = dist.gather(torch.stack([posterior.mean, posterior.log_sigma.exp()], 1))[used]
        yield mean_and_sigma[:, 0], mean_and_sigma[:, 1]


def fit_prior(
    model: VAE, shards: ShardSet, images: int, batch_size: int, seed: int, dist: DistContext = SINGLE_PROCESS
) -> GaussianMixture | None:
    """Fits a mixture of Gaussians to the latents of at most `images` training images.

    Returns None on ranks other than 0, which only encode images, or if the latents have too many dimensions.
    """
    if math.prod(model.latent_shape) > MAX_LATENT_DIM:
        return None
    posteriors = list(iterate_posteriors(model, shards, min(images, len(shards)), batch_size, dist))
    if dist.rank:
        return None
    mean, sigma = (torch.cat(parts).flatten(1) for parts in zip(*posteriors, strict=True))
    return GaussianMixture.fit(mean, sigma, seed)


def measure_latents(posteriors: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation of each latent channel, [c, 1, 1] each, from means and sigmas [n, c, h, w].

    The standard deviation is sqrt(var(mean) + E[sigma^2]).
    """
    sums, count = torch.zeros(()), 0
    for mean, sigma in posteriors:
        mean, sigma = mean.double(), sigma.double()
        sums = sums + torch.stack([part.sum((0, 2, 3)) for part in (mean, mean.square(), sigma.square())])
        count += mean[:, 0].numel()
    shift, mean_square, variance = sums / count
    scale = (mean_square - shift.square() + variance).clamp(min=1e-12).sqrt()
    return shift.float()[:, None, None], scale.float()[:, None, None]


def fit_clusters(flow: Flow, means: Tensor, seed: int, dist: DistContext = SINGLE_PROCESS) -> None:
    """Sets the cluster centers of a flow prior, and the frequencies of its classes, by k-means of posterior means [n, c, h, w].

    Raises:
        UserError: if there are fewer images than clusters.
    """
    if len(means) < flow.num_classes:
        raise UserError(f"prior.clusters is {flow.num_classes}; it must be at most the number of images used, {len(means):,}")
    clusters, centers = kmeans(flow.normalize(means).flatten(1), flow.num_classes, seed)
    frequencies = torch.bincount(clusters, minlength=flow.num_classes + 1) / len(means)
    # From rank 0, since rounding may differ between GPUs.
    flow.cluster_centers, flow.class_probs = (dist.all_reduce_sum(part * (dist.rank == 0)) for part in (centers, frequencies))


@torch.no_grad()
def evaluate_flow(
    model: VAE,
    velocity_error: Callable[[Tensor, dict[str, Tensor]], Tensor],
    shards: ShardSet,
    images: int,
    batch_size: int,
    seed: int,
    dist: DistContext = SINGLE_PROCESS,
) -> dict[str, float]:
    """Returns the mean `velocity_error` of the flow over the first `images` of a set and times spread evenly over (0, 1).

    `velocity_error` maps images [b, 3, h, w] and random inputs to the error of each image: [b].
    """
    assert model.flow is not None
    images, device = min(images, len(shards)), next(model.parameters()).device
    total, labels = torch.zeros((), dtype=torch.float64, device=device), torch.from_numpy(shards.labels)
    for numbers, pixels, weights in iterate_batches(shards, images, batch_size, dist, device):
        inputs = {
            "noise": per_sample_noise(numbers, model.latent_shape, seed, "evaluation"),
            "start": per_sample_noise(numbers, model.latent_shape, seed, "flow evaluation"),
            "time": torch.tensor([(number + 0.5) * GOLDEN_RATIO % 1 for number in numbers]),  # a low-discrepancy sequence
            "label": labels[np.minimum(numbers, images - 1)],
            "augmentation": torch.zeros(batch_size, AUGMENTATION_DIM),
        }
        error = velocity_error(normalize_images(pixels), {name: to_device(value, device) for name, value in inputs.items()})
        total += (error.double() * weights).sum()
    return {"velocity_error": (dist.all_reduce_sum(total) / images).item()}
