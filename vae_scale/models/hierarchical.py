"""A hierarchical VAE: stochastic layers at all resolutions, from a 1x1 feature map to the finest one."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_scale.config.options import VAEConfig
from vae_scale.models.blocks import Block, conv, depth_to_space, soft_clamp, space_to_depth
from vae_scale.models.likelihoods import make_likelihood
from vae_scale.models.vae import VAE, ELBOTerms, Posterior


def feature_map_sizes(resolution: int, patch: int) -> list[int]:
    """Returns the sides of the feature maps, fine to coarse: halved while even, then 1.

    A resolution of 96 with patch 4 gives 24, 12, 6, 3, 1.
    """
    sides = [resolution // patch]
    while sides[-1] > 1:
        sides.append(sides[-1] // 2 if sides[-1] % 2 == 0 else 1)
    return sides


class HierarchicalVAE(VAE):
    """A hierarchical VAE (Child, 2021): a bottom-up encoder and a top-down decoder with stochastic layers at each resolution.

    Layer l samples z_l = mu_p + sigma_p * e_l, where mu_p and sigma_p are functions of the layers above. The latents of the
    model are the whitened variables e_l, concatenated to [b, total, 1, 1]: their prior is N(0, I), and all methods of `VAE`
    apply. The posterior of layer l, N(mu_q, sigma_q^2) given the layers above, is N(m, s^2) in these coordinates, with
    m = (mu_q - mu_p) / sigma_p and s = sigma_q / sigma_p. KL(q || p) equals KL(N(m, s^2) || N(0, 1)), since the KL divergence
    is invariant under an affine map. The network outputs m and log s (residual normal, Vahdat & Kautz, 2020, sec. 3.2).

    Args:
        config: Configuration of the network. The last of `channel_mult` applies to all coarser levels, too. `num_res_blocks` is
            the number of stochastic layers and of encoder blocks per level, `latent_channels` the channels of each z_l.
        resolution: Height and width of the images in pixels, a multiple of `patch_size`.

    Attributes:
        layer_sizes: Number of latent values of each stochastic layer, coarse to fine, as they are concatenated.
    """

    decoder: "_TopDown"

    def __init__(self, config: VAEConfig, resolution: int) -> None:
        sides = feature_map_sizes(resolution, config.patch_size)
        multipliers = config.channel_mult + config.channel_mult[-1:] * len(sides)
        widths = [config.width * multiplier for multiplier in multipliers[: len(sides)]]
        encoder = _BottomUp(config, widths, sides)
        decoder = _TopDown(config, widths, sides)
        layer_sizes = [math.prod(shape) for shape in decoder.shapes]
        super().__init__(config, resolution, (sum(layer_sizes), 1, 1), encoder, decoder)
        self.layer_sizes = layer_sizes

    def encode(self, images: Tensor) -> Posterior:
        """Returns the posterior, [b, total, 1, 1]. Each layer is conditioned on the means of the layers above."""
        noise = images.new_zeros(images.shape[0], *self.latent_shape, dtype=torch.float32)
        return self.decoder.infer(self.encoder(images), noise)[0]

    def forward(self, images: Tensor, noise: Tensor) -> ELBOTerms:
        """Returns the terms of the ELBO, estimated with one sample of all layers; `noise` from N(0, I) is [b, total, 1, 1].

        `kl` is [b, layers], coarse to fine, exact for each layer given the sampled layers above.
        """
        posterior, output = self.decoder.infer(self.encoder(images), noise)
        kl = torch.stack([layer_kl.sum(1) for layer_kl in posterior.kl().split(self.layer_sizes, 1)], 1)
        return ELBOTerms(self.likelihood.log_prob(output, images), kl, posterior.log_ratio(noise), output)


class _Bottleneck(Block):
    """1x1, 3x3, 1x1 convolutions each preceded by an activation; the 3x3 becomes a 1x1 on feature maps of side 1 or 2."""

    def __init__(self, c_in: int, c_mid: int, c_out: int, side: int, gain: float) -> None:
        super().__init__()
        self.conv1 = conv(c_in, c_mid, kernel_size=1)
        self.conv2 = conv(c_mid, c_mid, kernel_size=3 if side > 2 else 1)
        self.conv3 = conv(c_mid, c_out, kernel_size=1)
        with torch.no_grad():
            self.conv3.weight *= gain

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b, c_in, h, w] to [b, c_out, h, w]."""
        return self.conv3(F.silu(self.conv2(F.silu(self.conv1(F.silu(x))))))


class _ResBlock(_Bottleneck):
    """A bottleneck with a residual connection."""

    def __init__(self, width: int, side: int, gain: float) -> None:
        super().__init__(width, width // 2, width, side, gain)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b, width, h, w] to the same shape."""
        return x + super().forward(x)


class _BottomUp(nn.Module):
    """The encoder: maps images to one feature map per level, fine to coarse."""

    def __init__(self, config: VAEConfig, widths: list[int], sides: list[int]) -> None:
        super().__init__()
        self.patch, self.sides = config.patch_size, sides
        self.stem = conv(3 * config.patch_size**2, widths[0])
        self.proj = nn.ModuleList(conv(fine, coarse, kernel_size=1) for fine, coarse in pairwise(widths))
        gain = (config.num_res_blocks * len(sides)) ** -0.5
        self.levels = nn.ModuleList(
            nn.Sequential(*[_ResBlock(width, side, gain) for _ in range(config.num_res_blocks)])
            for width, side in zip(widths, sides, strict=True)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(space_to_depth(images, self.patch))
        features: list[Tensor] = []
        for level, blocks in enumerate(self.levels):
            if level:
                x = self.proj[level - 1](F.avg_pool2d(x, self.sides[level - 1] // self.sides[level]))
            x = blocks(x)
            features.append(x)
        return features


class _StochasticLayer(nn.Module):
    """A stochastic layer and the residual block after it."""

    def __init__(self, width: int, channels: int, side: int, gain: float) -> None:
        super().__init__()
        self.split_sizes = [channels, channels, width]
        self.prior = _Bottleneck(width, width // 2, 2 * channels + width, side, 0.0)  # initialized to N(0, 1)
        self.posterior = _Bottleneck(2 * width, width // 2, 2 * channels, side, 1.0)
        self.proj = conv(channels, width, kernel_size=1)
        self.block = _ResBlock(width, side, gain)
        with torch.no_grad():
            self.proj.weight *= gain

    def infer(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Returns m and log s of q(e | image, layers above), in fp32, [b, channels, side, side] each."""
        mean, log_sigma = self.posterior(torch.cat([x, features], 1)).float().chunk(2, 1)
        return soft_clamp(mean), soft_clamp(log_sigma)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """Maps the features before this layer, [b, width, side, side], and its e to the features after it."""
        mean, log_sigma, residual = self.prior(x).split(self.split_sizes, 1)
        z = mean + soft_clamp(log_sigma).exp() * e
        return self.block(x + residual + self.proj(z))


class _TopDown(nn.Module):
    """The decoder: maps the latents of all layers, or the features of an image, to the parameters of the likelihood."""

    def __init__(self, config: VAEConfig, widths: list[int], sides: list[int]) -> None:
        super().__init__()
        self.patch, self.num_blocks = config.patch_size, config.num_res_blocks
        widths, sides = widths[::-1], sides[::-1]
        self.proj = nn.ModuleList(conv(coarse, fine, kernel_size=1) for coarse, fine in pairwise(widths))
        self.bias = nn.ParameterList(torch.zeros(1, w, side, side) for w, side in zip(widths, sides, strict=True))
        gain = (config.num_res_blocks * len(sides)) ** -0.5
        self.layers = nn.ModuleList(
            _StochasticLayer(width, config.latent_channels, side, gain)
            for width, side in zip(widths, sides, strict=True)
            for _ in range(config.num_res_blocks)
        )
        # h, w, c of the latents of each layer; this order gives channels_last views.
        self.shapes = [(side, side, config.latent_channels) for side in sides for _ in range(config.num_res_blocks)]
        out_channels = make_likelihood(config.likelihood, config.likelihood_scale).channels
        self.head = conv(widths[-1], out_channels * config.patch_size**2, zero_init=True)

    def forward(self, latents: Tensor) -> Tensor:
        return self._run(latents, None)[1]

    def infer(self, features: list[Tensor], noise: Tensor) -> tuple[Posterior, Tensor]:
        """Returns the posterior given the features of an image, and the output for e = m + s * `noise` in every layer."""
        (mean, log_sigma), output = self._run(noise, features)
        return Posterior(mean[:, :, None, None], log_sigma[:, :, None, None]), output

    def _run(self, latents: Tensor, features: list[Tensor] | None) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Runs all layers. `latents` holds the e of all layers or, with features, the noise of their posteriors."""
        batch, start = latents.shape[0], 0
        means, log_sigmas = [latents.new_zeros(batch, 0)], [latents.new_zeros(batch, 0)]
        x = self.bias[0].expand(batch, -1, -1, -1)
        for index, (layer, shape) in enumerate(zip(self.layers, self.shapes, strict=True)):
            assert isinstance(layer, _StochasticLayer)
            level, position = divmod(index, self.num_blocks)
            if level and not position:
                x = F.interpolate(self.proj[level - 1](x), size=shape[:2]) + self.bias[level]
            e = latents[:, start : start + math.prod(shape), 0, 0].unflatten(1, shape).permute(0, 3, 1, 2)
            start += math.prod(shape)
            if features is not None:
                mean, log_sigma = layer.infer(x, features[-1 - level])
                e = mean + log_sigma.exp() * e
                means.append(_flatten(mean))
                log_sigmas.append(_flatten(log_sigma))
            x = layer(x, e)
        output = depth_to_space(self.head(F.silu(x)), self.patch)
        return (torch.cat(means, 1), torch.cat(log_sigmas, 1)), output


def _flatten(x: Tensor) -> Tensor:
    """Reshapes [b, c, h, w] to [b, h*w*c], a view in channels_last memory."""
    return x.permute(0, 2, 3, 1).flatten(1)
