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
from vae_scale.models.vae import VAE, Posterior
from vae_scale.randomness import per_sample_noise
from vae_scale.runtime.distributed import SINGLE_PROCESS, DistContext

GOLDEN_RATIO = 0.6180339887


@torch.no_grad()
def iterate_posteriors(
    model: VAE, shards: ShardSet, images: int, batch_size: int, dist: DistContext, flipped: bool = False, progress: str = ""
) -> Iterator[Posterior]:
    """Yields the posteriors of `images` images spread evenly over a set, on every rank.

    Args:
        model: The VAE.
        shards: The set.
        images: Number of images, at most that of the set.
        batch_size: Images per batch and rank.
        dist: The ranks that share the work.
        flipped: Whether the images are flipped horizontally.
        progress: Name of the progress bar that rank 0 displays; empty for none.
    """
    device = next(model.parameters()).device
    flips = torch.ones(batch_size, dtype=torch.bool, device=device) if flipped else None
    for _, pixels, weights in iterate_batches(shards, images, batch_size, dist, device, spread=True, progress=progress):
        posterior = model.encode(normalize_images(pixels, flips))
        used = dist.gather(weights) > 0
        yield Posterior(*dist.gather(torch.stack([posterior.mean, posterior.log_sigma], 1))[used].unbind(1))


def encode_images(model: VAE, shards: ShardSet, flips: bool, batch_size: int, dist: DistContext, progress: str = "") -> Tensor:
    """Encodes all images of a set, on every rank. See `iterate_posteriors`.

    Returns:
        Mean and log sigma of the posteriors, fp16 [images, k, 2, h, w, c]: channels last in memory. With `flips`, k is 2, for
        each image and the flipped image; otherwise 1.
    """
    channels, height, width = model.latent_shape
    shape = (len(shards), 1 + flips, 2, height, width, channels)
    encoded = torch.empty(shape, dtype=torch.float16, device=next(model.parameters()).device)
    for flipped in range(1 + flips):
        start = 0
        for posterior in iterate_posteriors(model, shards, len(shards), batch_size, dist, bool(flipped), progress):
            stop = start + len(posterior.mean)
            encoded[start:stop, flipped] = torch.stack([posterior.mean, posterior.log_sigma], 1).permute(0, 1, 3, 4, 2)
            start = stop
    return encoded


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
    mean = torch.cat([posterior.mean for posterior in posteriors]).flatten(1)
    sigma = torch.cat([posterior.log_sigma for posterior in posteriors]).exp().flatten(1)
    return GaussianMixture.fit(mean, sigma, seed)


def measure_latents(posteriors: Iterable[Posterior]) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation of each latent channel, [c, 1, 1] each.

    The standard deviation is sqrt(var(mean) + E[sigma^2]).
    """
    sums, count = torch.zeros(()), 0
    for posterior in posteriors:
        mean, sigma = posterior.mean.double(), posterior.log_sigma.double().exp()
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
    velocity_error: Callable[[Posterior, dict[str, Tensor]], Tensor],
    shards: ShardSet,
    images: int,
    batch_size: int,
    seed: int,
    dist: DistContext = SINGLE_PROCESS,
) -> dict[str, float]:
    """Returns the mean `velocity_error` of the flow over the first `images` of a set and times spread evenly over (0, 1).

    `velocity_error` maps posteriors and random inputs to the error of each image: [b].
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
        posterior = model.encode(normalize_images(pixels))
        error = velocity_error(posterior, {name: to_device(value, device) for name, value in inputs.items()})
        total += (error.double() * weights).sum()
    return {"velocity_error": (dist.all_reduce_sum(total) / images).item()}
