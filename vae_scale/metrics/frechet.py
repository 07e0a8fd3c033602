"""The Frechet distance between two sets of features."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from vae_scale.errors import UserError


class Moments:
    """Mean and covariance of features, from sums in fp64 that can be added up batch by batch and rank by rank.

    So they depend on the features alone, not on batches or the number of ranks. (An average of ranks' covariances would
    leave out how their means differ.)

    Attributes:
        count: Features added so far, a scalar.
        total: Their sum: [d].
        products: The sum of their outer products: [d, d].
    """

    def __init__(self, dimensions: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(dimensions, dtype=torch.float64, device=device)
        self.products = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """The moments of features [n, d]."""
        moments = cls(features.shape[1], features.device)
        moments.add(features)
        return moments

    def add(self, features: Tensor, weights: Tensor | None = None) -> None:
        """Counts features [b, d], each as often as its weight [b] says (1, or 0 for padding)."""
        x = features.double()
        weighted = x if weights is None else x * weights.double()[:, None]
        self.count += len(x) if weights is None else weights.double().sum()
        self.total += weighted.sum(0)
        self.products += weighted.T @ x

    def pooled(self, add_up: Callable[[Tensor], Tensor]) -> Self:
        """The moments of all ranks together; `add_up` adds a tensor up over them."""
        moments = type(self)(len(self.total), self.total.device)
        moments.count, moments.total, moments.products = (add_up(x) for x in (self.count, self.total, self.products))
        return moments

    @property
    def mean(self) -> Tensor:
        """[d]."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance: [d, d]."""
        return (self.products - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), zero or more (Heusel et al., 2017, eq. 6; Dowson & Landau, 1982).

    It is biased upwards for few images, the more so the fewer: compare only distances of equal numbers of images.

    Raises:
        UserError: one of the sets has fewer than two images.
    """
    if min(first.count, second.count) < 2:
        raise UserError("a Frechet distance needs at least 2 images in each set; give more --images or --samples")
    between = (first.mean - second.mean).square().sum()
    one, other = _root(first.covariance), _root(second.covariance)
    # With C = R R^T the trace of (C1 C2)^(1/2) is the sum of the singular values of R1^T R2. It needs no root of a product,
    # which would turn rounding errors of 1e-16 into 1e-8 in each of the many directions where covariances of few images vanish.
    shared = torch.linalg.svdvals(one.T @ other).sum() if one.shape[1] and other.shape[1] else 0.0
    return max(0.0, float(between + one.square().sum() + other.square().sum() - 2 * shared))


def _root(covariance: Tensor) -> Tensor:
    """R [d, rank] such that the covariance is R R^T."""
    values, vectors = torch.linalg.eigh(covariance)
    # What is below is rounding (the tolerance of numpy.linalg.matrix_rank).
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()
