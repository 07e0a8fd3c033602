"""Train convolutional ResNet VAEs that generate realistic images, from WebDataset shards."""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"
__all__ = ["VAE", "ResNetVAE", "__version__"]

if TYPE_CHECKING:
    from vae_scale.models.resnet import ResNetVAE
    from vae_scale.models.vae import VAE


def __getattr__(name: str) -> Any:
    # Lazy, so that `python -m vae_scale.train --help` does not wait for torch.
    if name in ("VAE", "ResNetVAE"):
        from vae_scale.models import resnet

        return getattr(resnet, name)
    raise AttributeError(f"module 'vae_scale' has no attribute {name!r}")
