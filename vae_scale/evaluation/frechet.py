"""The Frechet distance between two sets of features."""

import torch
from torch import Tensor

from vae_scale.errors import UserError


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Returns |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two sets of features, [n, d] and [m, d].

    See Heusel et al. (2017), eq. 6, and Dowson & Landau (1982). The estimate is biased upwards for small sets: compare only
    distances of equally many images.

    Raises:
        UserError: if a set has fewer than two images.
    """
    if min(len(first), len(second)) < 2:
        raise UserError("the Frechet distance requires at least 2 images in each set; increase --images or --samples")
    first, second = first.double(), second.double()
    mean_term = (first.mean(0) - second.mean(0)).square().sum()
    r1, r2 = _factorize(torch.cov(first.T)), _factorize(torch.cov(second.T))
    # With C = R R^T, the trace of (C1 C2)^(1/2) is the sum of the singular values of R1^T R2. A square root of the product
    # would amplify rounding errors of 1e-16 to 1e-8 in each of the many null directions of covariances of few images.
    cross = torch.linalg.svdvals(r1.T @ r2).sum() if r1.shape[1] and r2.shape[1] else 0.0
    return max(0.0, float(mean_term + r1.square().sum() + r2.square().sum() - 2 * cross))


def _factorize(covariance: Tensor) -> Tensor:
    """Returns R [d, rank] with covariance = R R^T."""
    values, vectors = torch.linalg.eigh(covariance)
    # Smaller eigenvalues are rounding errors (the tolerance of numpy.linalg.matrix_rank).
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()
