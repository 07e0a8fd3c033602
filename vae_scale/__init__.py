"""Train convolutional ResNet VAEs that generate realistic images, from WebDataset shards."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vae_scale.models.resnet import ResNetVAE
    from vae_scale.models.vae import VAE

__version__ = "0.2.0.dev0"
__all__ = ["VAE", "ResNetVAE", "__version__", "load"]


def load(name: str | Path, weights: str | None = None) -> "VAE":
    """Loads the newest valid checkpoint of a run, or a checkpoint, a saved model or a model of the Hub.

    See `VAE.from_pretrained`.
    """
    from vae_scale.models.vae import VAE
    from vae_scale.runtime.checkpoint import require_checkpoint

    if (Path(name) / "checkpoints").is_dir():
        name = require_checkpoint(name, "run")
    return VAE.from_pretrained(name, weights)


def __getattr__(name: str) -> Any:
    # Imported lazily, so that `--help` of the commands does not import torch.
    if name in ("VAE", "ResNetVAE"):
        from vae_scale.models import resnet

        return getattr(resnet, name)
    raise AttributeError(f"module 'vae_scale' has no attribute {name!r}")
