"""The networks by name."""

from vae_scale.config.options import VAEConfig
from vae_scale.models.kl import KLVAE
from vae_scale.models.notebook import NotebookVAE
from vae_scale.models.resnet import ResNetVAE
from vae_scale.models.vae import VAE

VAE.networks |= {"resnet": ResNetVAE, "kl": KLVAE, "seed_notebook": NotebookVAE}


def build_model(config: VAEConfig, resolution: int) -> VAE:
    """Builds the untrained network of a configuration for images of `resolution` x `resolution` pixels."""
    return VAE.networks[config.network](config, resolution)
