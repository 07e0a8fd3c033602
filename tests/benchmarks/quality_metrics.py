"""The metrics with which `quality.py` compares sets of features."""

import torch
from torch import Tensor

from vae_scale.evaluation.frechet import frechet_distance
from vae_scale.evaluation.neighbours import CHUNK, compute_prdc

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # (Binkowski et al., 2018, sec. 4)


def squared_mmd(first: Tensor, second: Tensor) -> float:
    """Returns the unbiased estimate of the squared MMD of two sets of features, [n, d] each, with the cubic polynomial kernel.

    See Binkowski et al. (2018), eq. 4, and Gretton et al. (2012), eq. 4. The kernel is (x y / d + 1)^3.
    """
    n, dimensions = first.shape

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return ((x @ y.T).double() / dimensions + 1) ** 3

    within = sum(k.sum() - k.trace() for k in (kernel(first, first), kernel(second, second)))
    return float(within / (n * (n - 1)) - 2 * kernel(first, second).mean())


def kernel_distance(first: Tensor, second: Tensor, seed: int = 0) -> tuple[float, float]:
    """Returns the Kernel Inception Distance of two sets of features, [n, d] and [m, d], and its standard error.

    Both are computed from random subsets of at most 1,000 and at most half of the features (Binkowski et al., 2018, sec. 4).
    """
    size = max(2, min(KID_SUBSET_SIZE, len(first) // 2, len(second) // 2))
    generator = torch.Generator().manual_seed(seed)

    def subset(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:size].to(features.device)]

    values = torch.tensor([squared_mmd(subset(first), subset(second)) for _ in range(KID_SUBSETS)], dtype=torch.float64)
    return float(values.mean()), float(values.std() / KID_SUBSETS**0.5)


def nearest_distances(features: Tensor, reference: Tensor) -> Tensor:
    """Returns the distance of each of the features [n, d] to the nearest of the reference [m, d]: [n]."""
    mean = reference.double().mean(0)
    features, reference = features.double() - mean, reference.double() - mean
    near = [torch.cdist(part, reference).min(1).indices for part in features.split(CHUNK)]
    # The matrix products of cdist have rounding errors, which exceed the distances of copies.
    return (features - reference[torch.cat(near)]).norm(dim=1)


def probability_nearer(distances: Tensor, held_out_distances: Tensor) -> float:
    """Returns the probability that a random sample is nearer to the training images than a random held-out image.

    Args:
        distances: Distance of each sample to its nearest training image, [n].
        held_out_distances: Distance of each held-out image to its nearest training image, [m].

    Returns:
        The Mann-Whitney statistic divided by n m, in which a tie counts one half: 0.5 for new images of the same
        distribution, towards 1 for copies.
    """
    ordered = held_out_distances.sort().values
    smaller = torch.searchsorted(ordered, distances)  # held-out images that are nearer than the sample
    not_larger = torch.searchsorted(ordered, distances, right=True)
    return 1 - float((smaller + not_larger).double().mean()) / (2 * len(ordered))


def compare(features: Tensor, held_out: Tensor) -> dict[str, float]:
    """Returns the metrics of features against those of held-out images, [n, d] and [m, d]."""
    kid, error = kernel_distance(features, held_out)
    values = {"gfd": frechet_distance(features, held_out), "kid": 1000 * kid, "kid_error": 1000 * error}
    return values | compute_prdc(held_out, features)
