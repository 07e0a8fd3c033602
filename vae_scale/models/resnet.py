"""The residual VAE: around a map of latents, or around one latent vector."""

import torch.nn.functional as F
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from vae_scale.config import VAEConfig
from vae_scale.models.blocks import (
    Attention,
    Downsample,
    ResBlock,
    Upsample,
    VectorToMap,
    conv,
    depth_to_space,
    map_to_vector,
    norm,
    space_to_depth,
)
from vae_scale.models.likelihoods import make_likelihood
from vae_scale.models.vae import VAE

FIRST_LOG_SIGMA = -2.0


class ResNetVAE(VAE):
    """A residual encoder and decoder around a map of latents, or around one latent vector.

    The first layer folds `patch` x `patch` pixels into channels, so that no convolution works at full resolution,
    where most time would go for little.
    """

    def __init__(self, config: VAEConfig, resolution: int) -> None:
        side = resolution // config.factor
        vector = config.latent == "vector"
        widths = [config.width * multiplier for multiplier in config.multipliers]
        encoder = _Encoder(config, widths, side)
        outputs = make_likelihood(config.likelihood, config.scale).channels
        decoder = _Decoder(config, widths, side, outputs)
        shape = (config.latent_channels, 1, 1) if vector else (config.latent_channels, side, side)
        super().__init__(config, resolution, shape, encoder, decoder)


class _Encoder(nn.Module):
    def __init__(self, config: VAEConfig, widths: list[int], side: int) -> None:
        super().__init__()
        self.patch = config.patch
        self.stem = conv(3 * config.patch**2, widths[0])
        layers: list[nn.Module] = []
        for level, width in enumerate(widths):
            if level:
                layers.append(Downsample(widths[level - 1], width))
            layers += [ResBlock(width) for _ in range(config.blocks)]
        if config.attention:
            layers.append(Attention(widths[-1]))
        self.layers = nn.Sequential(*layers)
        self.norm = norm(widths[-1])
        outputs = 2 * config.latent_channels
        last: nn.Linear | nn.Conv2d
        if config.latent == "vector":
            last = nn.Linear(widths[-1] * side**2, outputs)
            self.head: nn.Module = nn.Sequential(map_to_vector(), last, Rearrange("b c -> b c 1 1"))
        else:
            self.head = last = conv(widths[-1], outputs, size=1)
        # Posteriors start narrow. With a map of latents the first hundred steps went further so (a single run: 0.4% fewer
        # nats); with a vector it made no difference.
        assert last.bias is not None
        nn.init.constant_(last.bias[config.latent_channels :], FIRST_LOG_SIGMA)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.layers(self.stem(space_to_depth(images, self.patch)))
        return self.head(F.silu(self.norm(hidden)))


class _Decoder(nn.Module):
    def __init__(self, config: VAEConfig, widths: list[int], side: int, outputs: int) -> None:
        super().__init__()
        self.patch = config.patch
        if config.latent == "vector":
            expand = nn.Linear(config.latent_channels, widths[-1] * side**2)
            self.stem: nn.Module = nn.Sequential(Rearrange("b c 1 1 -> b c"), expand, VectorToMap(side))
        else:
            self.stem = conv(config.latent_channels, widths[-1])
        layers: list[nn.Module] = [Attention(widths[-1])] if config.attention else []
        for level, width in reversed(list(enumerate(widths))):
            layers += [ResBlock(width) for _ in range(config.blocks + 1)]
            if level:
                layers.append(Upsample(width, widths[level - 1]))
        self.layers = nn.Sequential(*layers)
        self.norm = norm(widths[0])
        self.head = conv(widths[0], outputs * config.patch**2, zero=True)

    def forward(self, latents: Tensor) -> Tensor:
        hidden = self.layers(self.stem(latents))
        return depth_to_space(self.head(F.silu(self.norm(hidden))), self.patch)
