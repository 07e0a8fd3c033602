"""Learned priors: where the latents of real images really lie.

A VAE's decoder has only seen latents of images, and those fill little of N(0, I); samples of N(0, I) are then mixtures
of everything. A density fitted to the latents after training puts that right (Ghosh et al., 2020, sec. 4: "ex-post
density estimation").
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from vae_scale.randomness import generator, noise_of_each

LARGEST = 1536  # latent numbers for which full covariances are still small and quickly factored
MOST_COMPONENTS = 128
ROUNDS = 15  # of expectation maximisation


@dataclass
class GaussianMixture:
    """A mixture of Gaussians with full covariances over flattened latents of length d.

    Attributes:
        weights: [k], adding up to one.
        means: [k, d].
        factors: [k, d, d], lower Cholesky factors of the covariances.
    """

    weights: Tensor
    means: Tensor
    factors: Tensor

    @classmethod
    def fit(cls, mean: Tensor, sigma: Tensor, seed: int) -> Self:
        """Expectation maximisation over posteriors N(mean, sigma^2), each counted with its own spread.

        The number of components follows from the data: about d images for each, at most 128. On the demonstration's
        held-out latents 64 and 128 were likelier than 26, 52 and 200.

        Args:
            mean: [n, d].
            sigma: [n, d].
            seed: Keys the choice of the first centres.
        """
        count, length = mean.shape
        components = max(1, min(MOST_COMPONENTS, count // length))
        mean, variance = mean.double(), sigma.double().square()
        shares = torch.nn.functional.one_hot(_clusters(mean, components, seed), components).double()
        mixture = cls._maximise(mean, variance, shares)
        for _ in range(ROUNDS if components > 1 else 0):
            shares = mixture._joint(mean).softmax(1)
            mixture = cls._maximise(mean, variance, shares)
        return cls(mixture.weights.float().cpu(), mixture.means.float().cpu(), mixture.factors.float().cpu())

    def check(self, length: int) -> None:
        """Refuses tensors that are no mixture over latents of `length` numbers.

        Raises:
            ValueError: naming them.
        """
        count = len(self.weights) if self.weights.ndim else 0
        shapes = {"weights": (count,), "means": (count, length), "factors": (count, length, length)}
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if not count or tensor.shape != shape or not tensor.is_floating_point():
                raise ValueError(f"the mixture's {name} are {tensor.dtype} {list(tensor.shape)}, not numbers {list(shape)}")

    @classmethod
    def _maximise(cls, mean: Tensor, variance: Tensor, shares: Tensor) -> Self:
        totals = shares.sum(0).clamp(min=1e-6)
        means = shares.T @ mean / totals[:, None]
        spread = shares.T @ variance / totals[:, None]
        factors = []
        for k, (centre, diagonal) in enumerate(zip(means, spread, strict=True)):
            apart = (mean - centre) * shares[:, k : k + 1].sqrt()
            covariance = apart.T @ apart / totals[k] + torch.diag(diagonal + 1e-6)
            factors.append(torch.linalg.cholesky(covariance))
        return cls(totals / totals.sum(), means, torch.stack(factors))

    def _joint(self, points: Tensor) -> Tensor:
        """log of weight times density of each component: [n, k]."""
        parts = []
        for weight, centre, factor in zip(self.weights, self.means, self.factors, strict=True):
            away = torch.linalg.solve_triangular(factor, (points - centre).T, upper=False)
            log_normaliser = factor.diagonal().log().sum() + 0.5 * len(centre) * math.log(2 * math.pi)
            parts.append(weight.log() - 0.5 * away.square().sum(0) - log_normaliser)
        return torch.stack(parts, 1)

    def log_prob(self, points: Tensor) -> Tensor:
        """Log-density in nats: [n] from [n, d]."""
        return self._joint(points).logsumexp(1)

    def draw(self, numbers: range, seed: int, temperature: float) -> Tensor:
        """Latents [len(numbers), d]; that of number i depends on `seed` and i alone. `temperature` scales the spread."""
        noise = noise_of_each(numbers, (self.means.shape[1] + 1,), seed, "mixture")
        which = torch.special.ndtr(noise[:, 0].double())
        chosen = torch.searchsorted(self.weights.double().cumsum(0), which).clamp(max=len(self.weights) - 1)
        spread = torch.einsum("nij,nj->ni", self.factors[chosen], noise[:, 1:])
        return self.means[chosen] + temperature * spread


def _clusters(points: Tensor, count: int, seed: int) -> Tensor:
    """k-means from k-means++ centres (Arthur & Vassilvitskii, 2007): the cluster of each point, [n]."""
    source = generator("cpu", seed, "mixture centres")
    first = torch.randint(len(points), (1,), generator=source)
    centres = points[first.to(points.device)]
    while len(centres) < count:
        distance = torch.cdist(points, centres).square().amin(1) + 1e-12
        chosen = torch.multinomial(distance.cpu(), 1, generator=source)
        centres = torch.cat([centres, points[chosen.to(points.device)]])
    for _ in range(10):
        nearest = torch.cdist(points, centres).argmin(1)
        members = torch.nn.functional.one_hot(nearest, count).to(points)
        sizes = members.sum(0)[:, None]
        centres = torch.where(sizes > 0, members.T @ points / sizes.clamp(min=1), centres)
    return torch.cdist(points, centres).argmin(1)
