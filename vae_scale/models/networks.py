"""Every network by its name."""

from vae_scale.config import VAEConfig
from vae_scale.models.kl import KLVAE
from vae_scale.models.ladder import LadderVAE
from vae_scale.models.notebook import NotebookVAE
from vae_scale.models.resnet import ResNetVAE
from vae_scale.models.vae import VAE

NETWORKS: dict[str, type[ResNetVAE | KLVAE | LadderVAE | NotebookVAE]] = {
    "resnet": ResNetVAE,
    "kl": KLVAE,
    "ladder": LadderVAE,
    "seed_notebook": NotebookVAE,
}


def build(config: VAEConfig, resolution: int) -> VAE:
    """The network of a configuration, freshly initialised, for images of `resolution` pixels a side."""
    return NETWORKS[config.network](config, resolution)
