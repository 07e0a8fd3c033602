"""How close reconstructions are to their images. Images are [b, 3, h, w] in [-1, 1], results [b]."""

import warnings
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vae_scale.errors import UserError
from vae_scale.metrics.weights import checked, downloads, needed

SIGMA, RADIUS = 1.5, 5  # pixels; of the window of SSIM
ALEXNET = "alexnet-owt-7be5be79.pth"
ALEXNET_SHA256 = "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02"


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, at most 106."""
    error = (images.float() - others.float()).square().flatten(1).mean(1)
    return -10 * (error / 4).clamp(min=10**-10.6).log10()


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each image, -1 to 1, over all windows that lie in it (Wang et al., 2004, eq. 13).

    Raises:
        UserError: the images are smaller than the window of 11 pixels.
    """
    if min(images.shape[2:]) < 2 * RADIUS + 1:
        raise UserError(f"SSIM needs images of {2 * RADIUS + 1} pixels a side or more, not {min(images.shape[2:])}")
    x, y = images.double(), others.double()
    first, second = 0.01**2 * 4, 0.03**2 * 4  # C1 and C2: the values range over 2
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x, variance_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    above = (2 * mean_x * mean_y + first) * (2 * covariance + second)
    below = (mean_x**2 + mean_y**2 + first) * (variance_x + variance_y + second)
    return (above / below).flatten(1).mean(1).float()


def _blurred(x: Tensor) -> Tensor:
    """Means of [b, c, h, w] under the Gaussian window."""
    offsets = torch.arange(-RADIUS, RADIUS + 1, dtype=x.dtype, device=x.device)
    window = torch.exp(-0.5 * (offsets / SIGMA) ** 2)
    kernel = (window / window.sum()).expand(x.shape[1], 1, -1)
    across = F.conv2d(x, kernel[:, :, None], groups=x.shape[1])
    return F.conv2d(across, kernel[..., None], groups=x.shape[1])


class Perceptual(Protocol):
    """A perceptual distance."""

    def __call__(self, images: Tensor, others: Tensor) -> Tensor:
        """The distance of each image from its partner, zero or more: [b]."""


def load_lpips(device: torch.device | str = "cpu") -> Perceptual:
    """LPIPS with AlexNet (Zhang et al., 2018), if AlexNet's weights lie in PyTorch's folder of downloads.

    Raises:
        UserError: they do not, are not the ones they should be, or the package is missing.
    """
    path = downloads() / ALEXNET
    if not path.is_file():
        raise UserError(f"needs {path}, torchvision's weights of AlexNet")
    module = needed("lpips")
    checked(path, ALEXNET_SHA256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks torchvision for weights in a way that torchvision finds old
        network = module.LPIPS(net="alex", verbose=False).requires_grad_(False).to(device)

    def distance(images: Tensor, others: Tensor) -> Tensor:
        found: Tensor = network(images.float(), others.float())
        return found.flatten()

    return distance
