"""p(image | latent), in nats.

All work on images in [-1, 1] that hold 256 grey levels, and all but the Bernoulli likelihood count density per grey
level (levels are one unit apart), so that nats and bits/dim of continuous and discrete likelihoods compare.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

LEVELS = 256
LEVELS_PER_UNIT = (LEVELS - 1) / 2  # grey levels per unit of [-1, 1]


class Likelihood(nn.Module):
    """Turns the decoder's output into a distribution over images.

    Attributes:
        channels: Channels that the decoder has to give.
        normalised: It is a density of images, so that bits/dim mean something.
    """

    channels: int = 3
    normalised = True

    def log_prob(self, output: Tensor, images: Tensor) -> Tensor:
        """log p(images | output) in nats per image: [b], from [b, channels, h, w] and images [b, 3, h, w] in [-1, 1]."""
        raise TypeError("a likelihood must define log_prob")

    def mean(self, output: Tensor) -> Tensor:
        """The expected image, [b, 3, h, w] in [-1, 1]."""
        return output.clamp(-1, 1)

    def deviation(self, output: Tensor, images: Tensor) -> Tensor:
        """What `follow` wants, averaged over the batch: a scalar, without gradient."""
        return output.new_zeros(())

    def follow(self, deviation: Tensor, taken: Tensor) -> None:
        """Moves the scale towards its optimum; called after each step with the global batch's `deviation`.

        `taken` is whether the weights moved: a scalar. Where they did not, neither does the scale.
        """


class Scaled(Likelihood):
    """Gaussian (power 2) or Laplace (power 1) with one scale for all pixels, in [-1, 1] units.

    scale = optimal: the scale that maximises the likelihood is the mean deviation itself, so it follows that; the KL
    divergence then needs no weight ("sigma-VAE", Rybkin et al., 2021, eq. 7, where the batch's own deviation is used;
    here a running one, so that held-out images meet a density that does not depend on them).
    """

    log_scale: Tensor
    follow_rate = 0.1

    def __init__(self, power: Literal[1, 2], scale: str | float) -> None:
        super().__init__()
        self.power = power
        self.optimal = scale == "optimal"
        start = torch.tensor(math.log(0.5) if isinstance(scale, str) else math.log(scale))
        if scale == "learned":
            self.log_scale = nn.Parameter(start)
        else:
            self.register_buffer("log_scale", start)

    def log_prob(self, output: Tensor, images: Tensor) -> Tensor:
        """See `Likelihood.log_prob`. Computed in fp32."""
        error = (_channels_last(output) - _channels_last(images)).abs() * torch.exp(-self.log_scale)
        # log of the density's normaliser: sqrt(2 pi) s for the Gaussian, 2 s for Laplace, in grey levels
        unit = 0.5 * math.log(2 * math.pi) if self.power == 2 else math.log(2)
        log_normaliser = unit + self.log_scale + math.log(LEVELS_PER_UNIT)
        energy = 0.5 * error.square() if self.power == 2 else error
        return -(energy + log_normaliser).sum((1, 2, 3))

    def deviation(self, output: Tensor, images: Tensor) -> Tensor:
        """Mean squared (Gaussian) or absolute (Laplace) error."""
        error = (output.detach().float() - images.float()).abs()
        return (error.square() if self.power == 2 else error).mean()

    @torch.no_grad()
    def follow(self, deviation: Tensor, taken: Tensor) -> None:
        """Moves the logarithm of the scale a tenth of the way to the optimum."""
        if self.optimal:
            best = deviation.clamp(min=1e-8).log() / self.power
            self.log_scale.lerp_(torch.where(taken, best, self.log_scale), self.follow_rate)


class Classic(Likelihood):
    """The classic losses of a sigmoid output, summed over the image, with images in [0, 1].

    mse is the density N(x; y, 1/2), whose negative logarithm is the squared error and a constant. bce is the
    cross-entropy; it is a distribution only for black and white images, so its nats are no density of photographs.
    """

    def __init__(self, kind: Literal["mse", "bce"]) -> None:
        super().__init__()
        self.kind = kind
        self.normalised = kind == "mse"

    def log_prob(self, output: Tensor, images: Tensor) -> Tensor:
        """See `Likelihood.log_prob`. Computed in fp32."""
        output, target = _channels_last(output), (_channels_last(images) + 1) / 2
        if self.kind == "bce":
            return -F.binary_cross_entropy_with_logits(output, target, reduction="none").sum((1, 2, 3))
        log_normaliser = 0.5 * math.log(math.pi) + math.log(LEVELS - 1)
        return -((output.sigmoid() - target).square() + log_normaliser).sum((1, 2, 3))

    def mean(self, output: Tensor) -> Tensor:
        """The expected image."""
        return output.sigmoid() * 2 - 1


class LogisticMixture(Likelihood):
    """Discretised logistic mixture with linear dependence between colours (PixelCNN++, Salimans et al., 2017, eq. 2-3).

    A probability of the 256^3 colours of each pixel, so its nats are a true code length.
    """

    components = 10

    def __init__(self, levels: int = LEVELS) -> None:
        super().__init__()
        self.levels = levels
        # per component: a weight; for each of three colours a mean and a log-scale; three coefficients between them
        self.channels = self.components * 10

    def _mixture(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights [b, h, w, k], and means, log-scales, coefficients [b, h, w, 3, k], in fp32."""
        weights, rest = _channels_last(output).split([self.components, 9 * self.components], 3)
        means, log_scales, coefficients = rearrange(rest, "b h w (n c k) -> n b h w c k", n=3, c=3)
        return weights, means, log_scales.clamp(min=-7), coefficients.tanh()

    def log_prob(self, output: Tensor, images: Tensor) -> Tensor:
        """See `Likelihood.log_prob`. Computed in fp32."""
        weights, means, log_scales, coefficients = self._mixture(output)
        x = _channels_last(images)[..., None]
        red, green, _ = x.unbind(3)
        to_green, red_to_blue, green_to_blue = coefficients.unbind(3)
        shift_green = to_green * red
        shift_blue = red_to_blue * red + green_to_blue * green
        means = means + torch.stack([torch.zeros_like(shift_green), shift_green, shift_blue], 3)
        half = 1 / (self.levels - 1)
        centred, inverse = x - means, torch.exp(-log_scales)
        upper, lower = inverse * (centred + half), inverse * (centred - half)
        middle = inverse * centred
        inside = upper.sigmoid() - lower.sigmoid()
        # Where the two sigmoids cannot be told apart in fp32, the density at the middle times the width.
        density = middle - log_scales - 2 * F.softplus(middle) + math.log(2 * half)
        log_inside = torch.where(inside > 1e-5, inside.clamp(min=1e-12).log(), density)
        first, last = x < -1 + half, x > 1 - half
        log_level = torch.where(first, F.logsigmoid(upper), torch.where(last, F.logsigmoid(-lower), log_inside))
        log_pixel = torch.logsumexp(weights.log_softmax(3) + log_level.sum(3), 3)
        return log_pixel.sum((1, 2))

    def mean(self, output: Tensor) -> Tensor:
        """The mixture's mean, each colour given the means of those before it."""
        weights, means, _, coefficients = self._mixture(output)
        to_green, red_to_blue, green_to_blue = coefficients.unbind(3)
        red, green, blue = means.unbind(3)
        green = green + to_green * red
        blue = blue + red_to_blue * red + green_to_blue * green
        mixed = (weights.softmax(3)[..., None, :] * torch.stack([red, green, blue], 3)).sum(4).permute(0, 3, 1, 2)
        return mixed.clamp(-1, 1)


def _channels_last(x: Tensor) -> Tensor:
    """[b, c, h, w] as [b, h, w, c] in fp32: a view, through which gradients come back in channels_last memory."""
    return x.permute(0, 2, 3, 1).float()


def make_likelihood(name: str, scale: str | float) -> Likelihood:
    """The likelihood of a configuration: gaussian, laplace, logistic_mixture, mse or bce."""
    if name in ("gaussian", "laplace"):
        return Scaled(2 if name == "gaussian" else 1, scale)
    if name == "logistic_mixture":
        return LogisticMixture()
    return Classic("mse" if name == "mse" else "bce")
