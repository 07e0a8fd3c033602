"""Whether samples lie among real images, and real images among samples, by nearest neighbours of their features."""

import torch
from torch import Tensor

from vae_scale.errors import UserError

PRECISION_NEIGHBOUR = 3  # k of precision and recall (Kynkaanniemi et al., 2019, sec. 3)
DENSITY_NEIGHBOUR = 5  # k of density and coverage (Naeem et al., 2020, sec. 3.3)
CHUNK = 1024  # rows of distances at a time


def compare(reference: Tensor, samples: Tensor) -> dict[str, float]:
    """How samples cover a reference. Each image is the centre of a ball that reaches to its k-th neighbour in its own set.

    Args:
        reference: Features of real images: [n, d].
        samples: Features of samples: [m, d].

    Returns:
        `precision`, the share of samples in a ball of the reference, and `recall`, the share of the reference in a ball
        of the samples, 0 to 1 (Kynkaanniemi et al., 2019, eq. 1 and 2); `density`, the mean number of the reference's balls
        that a sample is in, over k, 0 or more and 1 on average where both sets are alike; and `coverage`, the share of the
        reference's balls that hold a sample, 0 to 1 (Naeem et al., 2020, eq. 4 and 5).

    Raises:
        UserError: a set has too few images to have a k-th neighbour.
    """
    small, large = PRECISION_NEIGHBOUR, DENSITY_NEIGHBOUR
    require(len(reference), len(samples))
    reference, samples = _centred(reference, samples)
    real = radii(reference, small, large)
    reach = radii(samples, small)[:, 0]
    inside = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    recalled = covered = balls = 0
    for begin in range(0, len(reference), CHUNK):
        distance = torch.cdist(reference[begin : begin + CHUNK], samples)
        inside |= (distance <= real[begin : begin + CHUNK, :1]).any(0)
        within = distance <= real[begin : begin + CHUNK, 1:]
        balls += int(within.sum())
        covered += int(within.any(1).sum())
        recalled += int((distance <= reach).any(1).sum())
    return {
        "precision": int(inside.sum()) / len(samples),
        "recall": recalled / len(reference),
        "density": balls / (large * len(samples)),
        "coverage": covered / len(reference),
    }


def require(reference: int, samples: int) -> None:
    """Checks that a k-th neighbour exists in sets of these sizes.

    Raises:
        UserError: it does not.
    """
    if reference <= DENSITY_NEIGHBOUR or samples <= PRECISION_NEIGHBOUR:
        raise UserError(
            f"precision, recall, density and coverage need more than {DENSITY_NEIGHBOUR} images and {PRECISION_NEIGHBOUR} "
            f"samples, not {reference} and {samples}; give more --images and --samples, or --features none"
        )


def radii(features: Tensor, *ks: int) -> Tensor:
    """Distance of each of the features [n, d] to its k-th neighbour among the others, for every k: [n, len(ks)]."""
    # Each is its own nearest, at distance 0, so that the k-th other one is number k counted from 0.
    parts = [torch.cdist(part, features).topk(max(ks) + 1, largest=False).values for part in features.split(CHUNK)]
    return torch.cat(parts)[:, list(ks)]


def nearest(features: Tensor, reference: Tensor, count: int = 1) -> Tensor:
    """For each of the features [n, d] the rows of its nearest in the reference [m, d], nearest first: int64 [n, count]."""
    reference, features = _centred(reference, features)
    parts = [torch.cdist(part, reference).topk(count, largest=False).indices for part in features.split(CHUNK)]
    return torch.cat(parts)


def _centred(reference: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Both in fp64, moved so that the reference's mean is 0: distances are differences, and lose less so."""
    centre = reference.double().mean(0)
    return reference.double() - centre, others.double() - centre
