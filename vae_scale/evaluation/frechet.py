"""The Frechet distance between two sets of features."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from vae_scale.errors import UserError


class Moments:
    """Mean and covariance of features from fp64 sums: count, sum [d], and sum of outer products [d, d].

    The result does not depend on batch size or number of ranks. (Averaging per-rank covariances would omit the variance between
    the ranks' means.)
    """

    def __init__(self, dimensions: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(dimensions, dtype=torch.float64, device=device)
        self.products = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=device)

    @classmethod
    def from_features(cls, features: Tensor) -> Self:
        """Returns the moments of features [n, d]."""
        moments = cls(features.shape[1], features.device)
        moments.update(features)
        return moments

    def update(self, features: Tensor, weights: Tensor | None = None) -> None:
        """Adds features [b, d] with weights [b] (1, or 0 for padding)."""
        x = features.double()
        weighted = x if weights is None else x * weights.double()[:, None]
        self.count += len(x) if weights is None else weights.double().sum()
        self.total += weighted.sum(0)
        self.products += weighted.T @ x

    def all_reduce(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Sums the moments over all ranks."""
        self.count, self.total, self.products = (all_reduce_sum(x) for x in (self.count, self.total, self.products))

    @property
    def mean(self) -> Tensor:
        """[d]."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance: [d, d]."""
        return (self.products - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(first: Moments, second: Moments) -> float:
    """Returns |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al., 2017, eq. 6; Dowson & Landau, 1982).

    The estimate is biased upwards for small sets: compare only distances of equally many images.

    Raises:
        UserError: if a set has fewer than two images.
    """
    if min(first.count, second.count) < 2:
        raise UserError("the Frechet distance requires at least 2 images in each set; increase --images or --samples")
    mean_term = (first.mean - second.mean).square().sum()
    r1, r2 = _factorize(first.covariance), _factorize(second.covariance)
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
