"""The autoencoder of latent diffusion: diffusers' `AutoencoderKL`, trained as a VAE."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from vae_scale.config.options import VAEConfig
from vae_scale.errors import UserError
from vae_scale.models.blocks import chunk_channels
from vae_scale.models.likelihoods import Gaussian
from vae_scale.models.resnet import INITIAL_LOG_SIGMA
from vae_scale.models.vae import VAE, Posterior

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

LOG_VARIANCE_BOUNDS = (-30.0, 20.0)


class KLVAE(VAE):
    """Encoder and decoder of an `AutoencoderKL` (Rombach et al., 2022, appendix G).

    The downsampling factor is f = 2 ** (len(channel_mult) - 1).

    Args:
        config: Configuration of the network. `patch_size` and `attention` are not used.
        resolution: Height and width of the images in pixels, a multiple of f.

    Raises:
        UserError: if diffusers is not installed, `latent` is not spatial, or `resolution` is not a multiple of f.
    """

    def __init__(self, config: VAEConfig, resolution: int) -> None:
        factor = 2 ** (len(config.channel_mult) - 1)
        if config.latent != "spatial":
            raise UserError(f"model.latent is {config.latent}; network kl supports only spatial")
        if resolution % factor:
            raise UserError(f"model.channel_mult: images of {resolution} pixels are not divisible by f = {factor}")
        autoencoder = _build_autoencoder(config, resolution)
        nn.init.constant_(autoencoder.encoder.conv_out.bias[config.latent_channels :], 2 * INITIAL_LOG_SIGMA)
        shape = (config.latent_channels, resolution // factor, resolution // factor)
        super().__init__(config, resolution, shape, autoencoder.encoder, autoencoder.decoder)

    def encode(self, images: Tensor) -> Posterior:
        """Returns the posterior of each image; its log-variance is clamped to [-30, 20]."""
        mean, log_variance = chunk_channels(self.encoder(images).float())
        return Posterior(mean, 0.5 * log_variance.clamp(*LOG_VARIANCE_BOUNDS))

    def to_diffusers(self, scaling_factor: float = 1.0) -> "AutoencoderKL":
        """Returns an `AutoencoderKL` that shares the weights. Its output is not clamped to [-1, 1].

        Args:
            scaling_factor: Factor that scales latents to unit variance, for diffusion models.

        Raises:
            UserError: if the decoder does not output an image.
        """
        if not isinstance(self.likelihood, Gaussian):
            raise UserError(f"model.likelihood {self.config.likelihood}: AutoencoderKL requires gaussian")
        autoencoder = _build_autoencoder(self.config, self.resolution, scaling_factor)
        autoencoder.encoder, autoencoder.decoder = self.encoder, self.decoder
        return autoencoder


def _build_autoencoder(config: VAEConfig, resolution: int, scaling_factor: float = 1.0) -> "AutoencoderKL":
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise UserError('model.network kl requires diffusers: pip install "vae_scale[diffusers]"') from None

    levels = len(config.channel_mult)
    groups = next((count for count in (32, 16, 8, 4, 2) if config.width % (4 * count) == 0), 1)  # of at least 4 channels
    return AutoencoderKL(
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.width * multiplier for multiplier in config.channel_mult),
        layers_per_block=config.num_res_blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=groups,
        sample_size=resolution,
        scaling_factor=scaling_factor,
        use_quant_conv=False,  # no 1x1 convolutions next to the latents, as in Stable Diffusion 3
        use_post_quant_conv=False,
    )
