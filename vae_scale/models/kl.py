"""The autoencoder of latent diffusion, with the names and the meaning of weights that `diffusers.AutoencoderKL` has.

A `ResNetVAE` cannot in general be written as one, for two reasons among others. Nearest upsampling and a 3x3 convolution
tell a pixel from its neighbours only by latents further away, depth-to-space by weights of their own. And a 3x3 convolution of
folded pixels sees 6x6 pixels or more, a 3x3 convolution followed by a strided one 5x5.
"""

from collections import OrderedDict
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vae_scale.config import VAEConfig
from vae_scale.errors import UserError
from vae_scale.models.blocks import Block, GroupNorm, chunk_channels, conv
from vae_scale.models.likelihoods import Scaled, make_likelihood
from vae_scale.models.resnet import FIRST_LOG_SIGMA
from vae_scale.models.vae import VAE, Posterior

LOG_VARIANCE = (-30.0, 20.0)  # bounds of the posterior's logarithm of the variance
EPS = 1e-6  # of GroupNorm


class KLVAE(VAE):
    """A residual encoder and decoder with attention at the coarsest level (Rombach et al., 2022, appendix G).

    f = 2 ** (levels - 1); `patch`, `attention` and `latent` of the configuration do not apply. GroupNorm has 32 groups, or
    the largest power of two that leaves 4 channels of `width` for each.

    Args:
        config: `width`, `multipliers`, `blocks`, `latent_channels`, `likelihood` and `scale` count.
        resolution: Side of the images in pixels, a multiple of f.

    Raises:
        UserError: the configuration asks for a latent vector, or `resolution` is no multiple of f.
    """

    def __init__(self, config: VAEConfig, resolution: int) -> None:
        factor = 2 ** (len(config.multipliers) - 1)
        if config.latent != "spatial":
            raise UserError(f"model.latent is {config.latent}; this network has a map of latents: use spatial")
        if resolution % factor:
            raise UserError(f"model.multipliers: images of {resolution} pixels are not divisible by f = {factor}")
        widths = [config.width * multiplier for multiplier in config.multipliers]
        groups = next((count for count in (32, 16, 8, 4, 2) if config.width % (4 * count) == 0), 1)
        encoder = _encoder(widths, config.blocks, config.latent_channels, groups)
        outputs = make_likelihood(config.likelihood, config.scale).channels
        decoder = _decoder(widths, config.blocks, config.latent_channels, groups, outputs)
        side = resolution // factor
        super().__init__(config, resolution, (config.latent_channels, side, side), encoder, decoder)
        self.widths, self.groups = widths, groups

    def encode(self, images: Tensor) -> Posterior:
        """The posterior of each image, from the network's mean and logarithm of the variance, clamped to [-30, 20]."""
        mean, log_variance = chunk_channels(self.encoder(images).float())
        return Posterior(mean, 0.5 * log_variance.clamp(*LOG_VARIANCE))

    def as_diffusers(self, scaling_factor: float = 1.0) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """`config.json` and the weights of the same network as a `diffusers.AutoencoderKL`.

        Its decoder gives the mean that the likelihood then clamps to [-1, 1].

        Args:
            scaling_factor: What a diffusion model multiplies latents with to bring them to unit variance.

        Raises:
            UserError: the decoder's output is not an image.
        """
        if not isinstance(self.likelihood, Scaled):
            raise UserError(f"model.likelihood {self.config.likelihood}: AutoencoderKL needs gaussian or laplace")
        levels = len(self.widths)
        config = {
            "_class_name": "AutoencoderKL",
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "block_out_channels": self.widths,
            "layers_per_block": self.config.blocks,
            "act_fn": "silu",
            "latent_channels": self.config.latent_channels,
            "norm_num_groups": self.groups,
            "sample_size": self.resolution,
            "scaling_factor": scaling_factor,
        }
        # There the two 1x1 convolutions next to the latent stand beside the encoder and the decoder, not in them.
        weights = {
            name.replace("encoder.quant_conv.", "quant_conv.").replace("decoder.post_quant_conv.", "post_quant_conv."): tensor
            for name, tensor in self.state_dict().items()
            if name.startswith(("encoder.", "decoder."))
        }
        return config, weights


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _encoder(widths: list[int], blocks: int, latent_channels: int, groups: int) -> nn.Sequential:
    levels, c = [], widths[0]
    for level, width in enumerate(widths):
        parts = {"resnets": _blocks(c, width, blocks, groups)}
        if level < len(widths) - 1:
            parts["downsamplers"] = nn.Sequential(_Halve(width))
        levels.append(_named(**parts))
        c = width
    last = conv(2 * latent_channels, 2 * latent_channels, size=1)
    assert last.bias is not None
    nn.init.constant_(last.bias[latent_channels:], 2 * FIRST_LOG_SIGMA)  # posteriors start narrow, as in ResNetVAE
    return _named(
        conv_in=conv(3, widths[0]),
        down_blocks=nn.Sequential(*levels),
        mid_block=_Middle(c, groups),
        conv_norm_out=_norm(c, groups),
        conv_act=nn.SiLU(),
        conv_out=conv(c, 2 * latent_channels),
        quant_conv=last,
    )


def _decoder(widths: list[int], blocks: int, latent_channels: int, groups: int, outputs: int) -> nn.Sequential:
    levels, c = [], widths[-1]
    for level, width in reversed(list(enumerate(widths))):
        parts = {"resnets": _blocks(c, width, blocks + 1, groups)}
        if level:
            parts["upsamplers"] = nn.Sequential(_double(width))
        levels.append(_named(**parts))
        c = width
    return _named(
        post_quant_conv=conv(latent_channels, latent_channels, size=1),
        conv_in=conv(latent_channels, widths[-1]),
        mid_block=_Middle(widths[-1], groups),
        up_blocks=nn.Sequential(*levels),
        conv_norm_out=_norm(c, groups),
        conv_act=nn.SiLU(),
        conv_out=conv(c, outputs, zero=True),
    )


def _norm(channels: int, groups: int) -> GroupNorm:
    return GroupNorm(groups, channels, eps=EPS)


def _blocks(c_in: int, c_out: int, count: int, groups: int) -> nn.Sequential:
    return nn.Sequential(*[_Block(c_out if number else c_in, c_out, groups) for number in range(count)])


class _Block(Block):
    """shortcut(x) + conv(silu(norm(conv(silu(norm(x)))))), where the shortcut is 1x1 if the channels change."""

    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(c_in, groups), conv(c_in, c_out)
        self.norm2, self.conv2 = _norm(c_out, groups), conv(c_out, c_out, zero=True)
        self.conv_shortcut = nn.Identity() if c_in == c_out else conv(c_in, c_out, size=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class _Attention(Block):
    """x + self-attention with one head over the positions of x."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = _norm(channels, groups)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        last = nn.Linear(channels, channels)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.to_out = nn.Sequential(last)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        tokens = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        mixed = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + rearrange(self.to_out(mixed), "b 1 (h w) c -> b c h w", h=height)


class _Middle(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = _blocks(channels, channels, 2, groups)
        self.attentions = nn.Sequential(_Attention(channels, groups))

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.resnets
        return last(self.attentions(first(x)))


class _Halve(nn.Module):
    """A strided convolution; zeros are added to the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def _double(channels: int) -> nn.Sequential:
    return _named(nearest=nn.Upsample(scale_factor=2), conv=conv(channels, channels))
