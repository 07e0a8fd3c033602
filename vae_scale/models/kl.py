"""The autoencoder of latent diffusion, with the layers and parameter names of diffusers' `AutoencoderKL`.

It does not wrap `AutoencoderKL`, which makes features contiguous in GroupNorm on CUDA, before the shortcut of a residual block
in training, and in upsampling of 64 images or more. The convolutions that follow would have to transpose.
"""

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vae_scale.config.options import VAEConfig
from vae_scale.errors import UserError
from vae_scale.models.blocks import Block, GroupNorm, chunk_channels, conv
from vae_scale.models.likelihoods import GaussianLaplace, make_likelihood
from vae_scale.models.resnet import INITIAL_LOG_SIGMA
from vae_scale.models.vae import VAE, Posterior

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

LOG_VARIANCE_BOUNDS = (-30.0, 20.0)
NORM_EPS = 1e-6


class KLVAE(VAE):
    """A residual encoder and decoder with attention at the coarsest level (Rombach et al., 2022, appendix G).

    The downsampling factor is f = 2 ** (len(channel_mult) - 1). GroupNorm has 32 groups, or the largest power of two with at
    least 4 channels per group at the first level.

    Args:
        config: Configuration of the network. `patch_size` and `attention` are not used.
        resolution: Height and width of the images in pixels, a multiple of f.

    Raises:
        UserError: if `latent` is not spatial, or `resolution` is not a multiple of f.
    """

    def __init__(self, config: VAEConfig, resolution: int) -> None:
        factor = 2 ** (len(config.channel_mult) - 1)
        if config.latent != "spatial":
            raise UserError(f"model.latent is {config.latent}; network kl supports only spatial")
        if resolution % factor:
            raise UserError(f"model.channel_mult: images of {resolution} pixels are not divisible by f = {factor}")
        widths = [config.width * multiplier for multiplier in config.channel_mult]
        groups = next((count for count in (32, 16, 8, 4, 2) if config.width % (4 * count) == 0), 1)
        encoder = _encoder(widths, config.num_res_blocks, config.latent_channels, groups)
        out_channels = make_likelihood(config.likelihood, config.likelihood_scale).channels
        decoder = _decoder(widths, config.num_res_blocks, config.latent_channels, groups, out_channels)
        side = resolution // factor
        super().__init__(config, resolution, (config.latent_channels, side, side), encoder, decoder)
        self.widths, self.groups = widths, groups

    def encode(self, images: Tensor) -> Posterior:
        """Returns the posterior of each image; its log-variance is clamped to [-30, 20]."""
        mean, log_variance = chunk_channels(self.encoder(images).float())
        return Posterior(mean, 0.5 * log_variance.clamp(*LOG_VARIANCE_BOUNDS))

    def to_diffusers(self, scaling_factor: float = 1.0) -> "AutoencoderKL":
        """Returns the same network as an `AutoencoderKL`, in evaluation mode. Its output is not clamped to [-1, 1].

        Args:
            scaling_factor: Factor that scales latents to unit variance, for diffusion models.

        Raises:
            UserError: if the decoder does not output an image, or diffusers is not installed.
        """
        if not isinstance(self.likelihood, GaussianLaplace):
            raise UserError(f"model.likelihood {self.config.likelihood}: AutoencoderKL requires gaussian or laplace")
        try:
            from diffusers import AutoencoderKL
        except ImportError:
            raise UserError('diffusers is not installed: pip install "vae_scale[export]"') from None

        autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(self.widths),
            up_block_types=("UpDecoderBlock2D",) * len(self.widths),
            block_out_channels=tuple(self.widths),
            layers_per_block=self.config.num_res_blocks,
            latent_channels=self.config.latent_channels,
            norm_num_groups=self.groups,
            sample_size=self.resolution,
            scaling_factor=scaling_factor,
        )
        # In AutoencoderKL, the two 1x1 convolutions next to the latents are not part of the encoder and the decoder.
        state = {
            name.replace("encoder.quant_conv.", "quant_conv.").replace("decoder.post_quant_conv.", "post_quant_conv."): tensor
            for name, tensor in self.state_dict().items()
            if name.startswith(("encoder.", "decoder."))
        }
        autoencoder.load_state_dict(state)
        return autoencoder.eval()


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _encoder(widths: list[int], blocks: int, latent_channels: int, groups: int) -> nn.Sequential:
    levels, c = [], widths[0]
    for level, width in enumerate(widths):
        layers = {"resnets": _blocks(c, width, blocks, groups)}
        if level < len(widths) - 1:
            layers["downsamplers"] = nn.Sequential(_Downsample(width))
        levels.append(_named(**layers))
        c = width
    quant_conv = conv(2 * latent_channels, 2 * latent_channels, kernel_size=1)
    assert quant_conv.bias is not None
    nn.init.constant_(quant_conv.bias[latent_channels:], 2 * INITIAL_LOG_SIGMA)
    return _named(
        conv_in=conv(3, widths[0]),
        down_blocks=nn.Sequential(*levels),
        mid_block=_MidBlock(c, groups),
        conv_norm_out=_norm(c, groups),
        conv_act=nn.SiLU(),
        conv_out=conv(c, 2 * latent_channels),
        quant_conv=quant_conv,
    )


def _decoder(widths: list[int], blocks: int, latent_channels: int, groups: int, out_channels: int) -> nn.Sequential:
    levels, c = [], widths[-1]
    for level, width in reversed(list(enumerate(widths))):
        layers = {"resnets": _blocks(c, width, blocks + 1, groups)}
        if level:
            layers["upsamplers"] = nn.Sequential(_named(upsample=nn.Upsample(scale_factor=2), conv=conv(width, width)))
        levels.append(_named(**layers))
        c = width
    return _named(
        post_quant_conv=conv(latent_channels, latent_channels, kernel_size=1),
        conv_in=conv(latent_channels, widths[-1]),
        mid_block=_MidBlock(widths[-1], groups),
        up_blocks=nn.Sequential(*levels),
        conv_norm_out=_norm(c, groups),
        conv_act=nn.SiLU(),
        conv_out=conv(c, out_channels, zero_init=True),
    )


def _norm(channels: int, groups: int) -> GroupNorm:
    return GroupNorm(groups, channels, eps=NORM_EPS)


def _blocks(c_in: int, c_out: int, count: int, groups: int) -> nn.Sequential:
    return nn.Sequential(*[_ResBlock(c_out if index else c_in, c_out, groups) for index in range(count)])


class _ResBlock(Block):
    """A pre-activation residual block of two 3x3 convolutions, with a 1x1 shortcut if the number of channels changes."""

    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(c_in, groups), conv(c_in, c_out)
        self.norm2, self.conv2 = _norm(c_out, groups), conv(c_out, c_out, zero_init=True)
        self.conv_shortcut = nn.Identity() if c_in == c_out else conv(c_in, c_out, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class _Attention(Block):
    """Residual self-attention over positions, with one head."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = _norm(channels, groups)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        out = nn.Linear(channels, channels)
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
        self.to_out = nn.Sequential(out)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        tokens = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        attended = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + rearrange(self.to_out(attended), "b 1 (h w) c -> b c h w", h=height)


class _MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = _blocks(channels, channels, 2, groups)
        self.attentions = nn.Sequential(_Attention(channels, groups))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.resnets
        return second(self.attentions(first(x)))


class _Downsample(nn.Module):
    """A strided convolution with padding at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))
