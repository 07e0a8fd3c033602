"""A hierarchical variational autoencoder: many stochastic layers, from one position to the finest feature map."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_scale.config import VAEConfig
from vae_scale.models.blocks import Block, conv, depth_to_space, space_to_depth
from vae_scale.models.likelihoods import make_likelihood
from vae_scale.models.vae import SOFT_CLAMP, VAE, Posterior, Terms


def sides_of(resolution: int, patch: int) -> list[int]:
    """Sides of the feature maps, fine to coarse: halved while even, then one step from the odd side to 1.

    96 pixels with patch 4 give 24, 12, 6, 3, 1.
    """
    sides = [resolution // patch]
    while sides[-1] > 1:
        sides.append(sides[-1] // 2 if sides[-1] % 2 == 0 else 1)
    return sides


class LadderVAE(VAE):
    """A very deep VAE (Child, 2021): an encoder upwards, and downwards `blocks` stochastic layers per side.

    Layer l draws z_l = mu_p + sigma_p * e_l, where mu_p and sigma_p are functions of the layers above it. The model's
    latents are these e_l in one flat vector, [b, total, 1, 1]: their prior is exactly N(0, I), so everything that a `VAE`
    does with latents (sampling, temperature, ways between samples) holds here too. The posterior of layer l,
    N(mu_q, sigma_q^2) given the layers above, is in these coordinates N(m, s^2) with m = (mu_q - mu_p) / sigma_p and
    s = sigma_q / sigma_p, and KL(q || p) = KL(N(m, s^2) || N(0, 1)), since both are seen through one affine map. The
    network emits m and log s themselves, as in the residual normal of Vahdat & Kautz (2020, sec. 3.2).

    Args:
        config: The network: `width` times the last of `multipliers` is the width of all coarser levels too; `blocks` is
            the number of stochastic layers per side on the way down and of residual blocks on the way up;
            `latent_channels` the channels of each layer's z.
        resolution: Side of the images in pixels, a multiple of `patch`.

    Attributes:
        sizes: Latent numbers of each stochastic layer, coarse to fine: their order in the flat vector.
    """

    decoder: "_TopDown"

    def __init__(self, config: VAEConfig, resolution: int) -> None:
        sides = sides_of(resolution, config.patch)
        multipliers = config.multipliers + config.multipliers[-1:] * len(sides)
        widths = [config.width * multiplier for multiplier in multipliers[: len(sides)]]
        encoder = _BottomUp(config, widths, sides)
        decoder = _TopDown(config, widths, sides)
        sizes = [math.prod(shape) for shape in decoder.shapes]
        super().__init__(config, resolution, (sum(sizes), 1, 1), encoder, decoder)
        self.sizes = sizes

    def encode(self, images: Tensor) -> Posterior:
        """The posterior of each image, [b, total, 1, 1]; layers below see the means of those above."""
        noise = images.new_zeros(images.shape[0], *self.latent_shape, dtype=torch.float32)
        return self.decoder.infer(self.encoder(images), noise)[0]

    def forward(self, images: Tensor, noise: Tensor) -> Terms:
        """The terms of the ELBO with one draw of all layers; `noise` is N(0, I) in [b, total, 1, 1].

        `kl` has a column per stochastic layer, coarse to fine: [b, layers]. Each is exact given the layers above.
        """
        posterior, output = self.decoder.infer(self.encoder(images), noise)
        kl = torch.stack([layer.sum(1) for layer in posterior.kl().split(self.sizes, 1)], 1)
        return Terms(self.likelihood.log_prob(output, images), kl, posterior.log_ratio(noise), output)


class _Block(Block):
    """1x1, 3x3, 1x1 convolutions, an activation before each; 1x1 throughout where the map has no neighbours to speak of."""

    def __init__(self, c_in: int, c_mid: int, c_out: int, side: int, gain: float) -> None:
        super().__init__()
        self.enter = conv(c_in, c_mid, size=1)
        self.mix = conv(c_mid, c_mid, size=3 if side > 2 else 1)
        self.leave = conv(c_mid, c_out, size=1)
        with torch.no_grad():
            self.leave.weight *= gain

    def forward(self, x: Tensor) -> Tensor:
        """[b, c_in, h, w] to [b, c_out, h, w]."""
        return self.leave(F.silu(self.mix(F.silu(self.enter(F.silu(x))))))


class _Residual(_Block):
    """x + block(x)."""

    def __init__(self, width: int, side: int, gain: float) -> None:
        super().__init__(width, width // 2, width, side, gain)

    def forward(self, x: Tensor) -> Tensor:
        """[b, width, h, w] to the same shape."""
        return x + super().forward(x)


class _BottomUp(nn.Module):
    """Images to one feature map per side, fine to coarse."""

    def __init__(self, config: VAEConfig, widths: list[int], sides: list[int]) -> None:
        super().__init__()
        self.patch, self.sides = config.patch, sides
        self.stem = conv(3 * config.patch**2, widths[0])
        self.narrow = nn.ModuleList(conv(fine, coarse, size=1) for fine, coarse in pairwise(widths))
        gain = (config.blocks * len(sides)) ** -0.5
        self.levels = nn.ModuleList(
            nn.Sequential(*[_Residual(width, side, gain) for _ in range(config.blocks)])
            for width, side in zip(widths, sides, strict=True)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(space_to_depth(images, self.patch))
        features: list[Tensor] = []
        for level, blocks in enumerate(self.levels):
            if level:
                x = self.narrow[level - 1](F.avg_pool2d(x, self.sides[level - 1] // self.sides[level]))
            x = blocks(x)
            features.append(x)
        return features


class _Stochastic(nn.Module):
    """One stochastic layer and the residual block below it."""

    def __init__(self, width: int, channels: int, side: int, gain: float) -> None:
        super().__init__()
        self.parts = [channels, channels, width]
        self.prior = _Block(width, width // 2, 2 * channels + width, side, 0.0)  # starts as N(0, 1)
        self.posterior = _Block(2 * width, width // 2, 2 * channels, side, 1.0)
        self.project = conv(channels, width, size=1)
        self.block = _Residual(width, side, gain)
        with torch.no_grad():
            self.project.weight *= gain

    def infer(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """m and log s of q(e | image, layers above), in fp32: [b, channels, side, side] each."""
        mean, log_sigma = self.posterior(torch.cat([x, features], 1)).float().chunk(2, 1)
        return _soft_clamp(mean), _soft_clamp(log_sigma)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """The features below this layer, from those above, [b, width, side, side], and its e."""
        mean, log_sigma, residual = self.prior(x).split(self.parts, 1)
        z = mean + _soft_clamp(log_sigma).exp() * e
        x = x + residual + self.project(z)
        return self.block(x)


class _TopDown(nn.Module):
    """From the e of all layers, or from an image's features, to the likelihood's parameters."""

    def __init__(self, config: VAEConfig, widths: list[int], sides: list[int]) -> None:
        super().__init__()
        self.patch, self.blocks = config.patch, config.blocks
        widths, sides = widths[::-1], sides[::-1]
        self.widen = nn.ModuleList(conv(coarse, fine, size=1) for coarse, fine in pairwise(widths))
        self.bias = nn.ParameterList(torch.zeros(1, w, side, side) for w, side in zip(widths, sides, strict=True))
        gain = (config.blocks * len(sides)) ** -0.5
        self.layers = nn.ModuleList(
            _Stochastic(width, config.latent_channels, side, gain)
            for width, side in zip(widths, sides, strict=True)
            for _ in range(config.blocks)
        )
        # h, w, c of each layer's latents: in this order they are channels_last without a copy.
        self.shapes = [(side, side, config.latent_channels) for side in sides for _ in range(config.blocks)]
        outputs = make_likelihood(config.likelihood, config.scale).channels
        self.head = conv(widths[-1], outputs * config.patch**2, zero=True)

    def forward(self, latents: Tensor) -> Tensor:
        return self._run(latents, None)[1]

    def infer(self, features: list[Tensor], noise: Tensor) -> tuple[Posterior, Tensor]:
        """The posterior of an image's `features`, and the output for e = m + s * `noise` in every layer."""
        (mean, log_sigma), output = self._run(noise, features)
        return Posterior(mean[:, :, None, None], log_sigma[:, :, None, None]), output

    def _run(self, given: Tensor, features: list[Tensor] | None) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Downwards from `given`: the e of all layers or, with features, their noise."""
        means, log_sigmas, start = [given.new_zeros(given.shape[0], 0)], [given.new_zeros(given.shape[0], 0)], 0
        x = self.bias[0].expand(given.shape[0], -1, -1, -1)
        for index, (layer, shape) in enumerate(zip(self.layers, self.shapes, strict=True)):
            assert isinstance(layer, _Stochastic)
            level, position = divmod(index, self.blocks)
            if level and not position:
                x = F.interpolate(self.widen[level - 1](x), size=shape[:2]) + self.bias[level]
            e = given[:, start : start + math.prod(shape), 0, 0].unflatten(1, shape).permute(0, 3, 1, 2)
            start += math.prod(shape)
            if features is not None:
                mean, log_sigma = layer.infer(x, features[-1 - level])
                e = mean + log_sigma.exp() * e
                means.append(_flat(mean))
                log_sigmas.append(_flat(log_sigma))
            x = layer(x, e)
        output = depth_to_space(self.head(F.silu(x)), self.patch)
        return (torch.cat(means, 1), torch.cat(log_sigmas, 1)), output


def _flat(x: Tensor) -> Tensor:
    """[b, c, h, w] to [b, h*w*c], without a copy in channels_last memory."""
    return x.permute(0, 2, 3, 1).flatten(1)


def _soft_clamp(x: Tensor) -> Tensor:
    """x within +-SOFT_CLAMP, reached smoothly."""
    return SOFT_CLAMP * torch.tanh(x / SOFT_CLAMP)
