"""The VAE of the seed notebook, the baseline."""

from einops.layers.torch import Rearrange
from torch import nn

from vae_scale.config.options import VAEConfig
from vae_scale.models.vae import VAE


class NotebookVAE(VAE):
    """A VAE with three convolutions, a latent vector and transposed convolutions, without normalization.

    The sigmoid of the output is part of the likelihood mse.
    """

    def __init__(self, config: VAEConfig, resolution: int) -> None:
        side = resolution // config.downsampling_factor
        features = 128 * side * side
        encoder = nn.Sequential(
            nn.Conv2d(3, 32, 7, padding=3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 7, padding=3),
            nn.ReLU(),
            Rearrange("b c h w -> b (h w c)"),
            nn.Linear(features, 512),
            nn.ReLU(),
            nn.Linear(512, 256),
            nn.ReLU(),
            nn.Linear(256, 2 * config.latent_channels),
            Rearrange("b c -> b c 1 1"),
        )
        decoder = nn.Sequential(
            Rearrange("b c 1 1 -> b c"),
            nn.Linear(config.latent_channels, 256),
            nn.ReLU(),
            nn.Linear(256, 512),
            nn.ReLU(),
            nn.Linear(512, features),
            nn.ReLU(),
            Rearrange("b (h w c) -> b c h w", h=side, w=side),
            nn.ConvTranspose2d(128, 64, 5, stride=2, padding=2, output_padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 7, stride=2, padding=3, output_padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 3, 7, padding=3),
        )
        super().__init__(config, resolution, (config.latent_channels, 1, 1), encoder, decoder)
