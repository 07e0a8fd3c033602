"""Likelihoods p(image | latent), in nats.

Images are in [-1, 1] and have 256 grey levels. All are densities per grey level, so nats and bits/dim are comparable.
"""

import math

import torch
from torch import Tensor, nn

LEVELS = 256
LEVELS_PER_UNIT = (LEVELS - 1) / 2  # grey levels per unit of [-1, 1]


class Likelihood(nn.Module):
    """A density of images, with the output of the decoder as its parameters."""

    def log_prob(self, output: Tensor, images: Tensor) -> Tensor:
        """Returns log p(images | output) in nats per image, [b], computed in fp32.

        Args:
            output: [b, 3, h, w].
            images: [b, 3, h, w] in [-1, 1].
        """
        raise TypeError("a likelihood must define log_prob")

    def mean(self, output: Tensor) -> Tensor:
        """Returns the expected image, [b, 3, h, w] in [-1, 1]."""
        return output.clamp(-1, 1)

    def reconstruction_error(self, output: Tensor, images: Tensor) -> Tensor:
        """Returns the error that `update_scale` takes, averaged over the batch: a scalar, without gradient."""
        return output.new_zeros(())

    def update_scale(self, error: Tensor, step_taken: Tensor) -> None:
        """Updates a running scale after an optimizer step.

        Args:
            error: `reconstruction_error` of the global batch.
            step_taken: Whether the step was not skipped, a scalar. The scale changes only if it was taken.
        """


class Gaussian(Likelihood):
    """A Gaussian distribution with one standard deviation for all pixels, whose logarithm `log_scale` is in units of [-1, 1].

    The standard deviation is a running estimate of its maximum-likelihood value, the root mean squared error (sigma-VAE, Rybkin
    et al., 2021, eq. 7). The paper uses the error of the current batch; with a running estimate, the density of held-out images
    does not depend on them.
    """

    log_scale: Tensor
    update_rate = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("log_scale", torch.tensor(math.log(0.5)))

    def log_prob(self, output: Tensor, images: Tensor) -> Tensor:
        """See `Likelihood`."""
        error = (_channels_last(output) - _channels_last(images)) * torch.exp(-self.log_scale)
        log_normalizer = 0.5 * math.log(2 * math.pi) + self.log_scale + math.log(LEVELS_PER_UNIT)
        return -(0.5 * error.square() + log_normalizer).sum((1, 2, 3))

    def reconstruction_error(self, output: Tensor, images: Tensor) -> Tensor:
        """Returns the mean squared error."""
        return (output.detach().float() - images.float()).square().mean()

    @torch.no_grad()
    def update_scale(self, error: Tensor, step_taken: Tensor) -> None:
        """Moves the logarithm of the scale by `update_rate` towards the optimum."""
        optimum = 0.5 * error.clamp(min=1e-8).log()
        self.log_scale.lerp_(torch.where(step_taken, optimum, self.log_scale), self.update_rate)


class SigmoidMSE(Likelihood):
    """The density N(x; y, 1/2) of images in [0, 1] for the sigmoid y of the output.

    Its negative logarithm is the squared error, summed over the image, plus a constant.
    """

    def log_prob(self, output: Tensor, images: Tensor) -> Tensor:
        """See `Likelihood`."""
        output, target = _channels_last(output), (_channels_last(images) + 1) / 2
        log_normalizer = 0.5 * math.log(math.pi) + math.log(LEVELS - 1)
        return -((output.sigmoid() - target).square() + log_normalizer).sum((1, 2, 3))

    def mean(self, output: Tensor) -> Tensor:
        """See `Likelihood`."""
        return output.sigmoid() * 2 - 1


def _channels_last(x: Tensor) -> Tensor:
    """Permutes [b, c, h, w] to [b, h, w, c] in fp32, so that gradients are in channels_last memory."""
    return x.permute(0, 2, 3, 1).float()


def bits_per_dim(nats: float, dimensions: int) -> float:
    """Converts nats per image to bits per value of the image."""
    return nats / (dimensions * math.log(2))
