"""Precision, recall, density and coverage of samples, from nearest neighbours in feature space."""

import torch
from torch import Tensor

from vae_scale.errors import UserError

PRECISION_K = 3  # neighbours for precision and recall (Kynkaanniemi et al., 2019, sec. 3)
DENSITY_K = 5  # neighbours for density and coverage (Naeem et al., 2020, sec. 3.3)
CHUNK = 1024  # rows of a distance matrix computed at a time


def compute_prdc(reference: Tensor, samples: Tensor) -> dict[str, float]:
    """Compares samples with real images. The ball of an image has the distance to its k-th nearest neighbour as its radius.

    Args:
        reference: Features of real images: [n, d].
        samples: Features of samples: [m, d].

    Returns:
        `precision`: fraction of samples inside a ball of the reference. `recall`: fraction of the reference inside a ball of
        the samples (Kynkaanniemi et al., 2019, eq. 1 and 2). `density`: mean number of reference balls that contain a sample,
        divided by k; 0 or more, 1 on average for equal distributions. `coverage`: fraction of the reference whose ball
        contains a sample (Naeem et al., 2020, eq. 4 and 5).

    Raises:
        UserError: if a set is too small.
    """
    check_set_sizes(len(reference), len(samples))
    reference, samples = _center(reference, samples)
    real_radii = kth_neighbour_distances(reference, PRECISION_K, DENSITY_K)
    sample_radii = kth_neighbour_distances(samples, PRECISION_K)[:, 0]
    precise = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    recalled = covered = balls = 0
    for start in range(0, len(reference), CHUNK):
        distance, radii = torch.cdist(reference[start : start + CHUNK], samples), real_radii[start : start + CHUNK]
        precise |= (distance <= radii[:, :1]).any(0)
        inside = distance <= radii[:, 1:]
        balls += int(inside.sum())
        covered += int(inside.any(1).sum())
        recalled += int((distance <= sample_radii).any(1).sum())
    return {
        "precision": int(precise.sum()) / len(samples),
        "recall": recalled / len(reference),
        "density": balls / (DENSITY_K * len(samples)),
        "coverage": covered / len(reference),
    }


def check_set_sizes(reference: int, samples: int) -> None:
    """Raises UserError if sets of these sizes are too small for a k-th neighbour."""
    if reference <= DENSITY_K or samples <= PRECISION_K:
        raise UserError(
            f"precision, recall, density and coverage require more than {DENSITY_K} images and {PRECISION_K} samples, "
            f"got {reference} and {samples}; increase --images and --samples, or use --features none"
        )


def kth_neighbour_distances(features: Tensor, *ks: int) -> Tensor:
    """Returns the distance of each of the features [n, d] to its k-th nearest neighbour, for every k: [n, len(ks)]."""
    # Index 0 is the point itself, at distance 0.
    parts = [torch.cdist(part, features).topk(max(ks) + 1, largest=False).values for part in features.split(CHUNK)]
    return torch.cat(parts)[:, list(ks)]


def nearest_neighbours(features: Tensor, reference: Tensor, k: int = 1) -> Tensor:
    """Returns the rows of the k nearest of reference [m, d] for each of the features [n, d], nearest first: int64 [n, k]."""
    reference, features = _center(reference, features)
    return torch.cat([torch.cdist(part, reference).topk(k, largest=False).indices for part in features.split(CHUNK)])


def _center(reference: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Subtracts the mean of the reference from both, in fp64: distances of small vectors have smaller rounding errors."""
    mean = reference.double().mean(0)
    return reference.double() - mean, other.double() - mean
