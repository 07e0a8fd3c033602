"""Reconstruction metrics per image. Images are [b, 3, h, w] in [-1, 1], results [b]."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from vae_scale.errors import UserError
from vae_scale.evaluation.pretrained_weights import import_optional, verify_sha256

SSIM_SIGMA, SSIM_WINDOW = 1.5, 11  # Gaussian window, in pixels
ALEXNET_FILE = "alexnet-owt-7be5be79.pth"
ALEXNET_SHA256 = "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02"

ImageDistance = Callable[[Tensor, Tensor], Tensor]  # of two batches: [b], zero or more


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, at most 106."""
    mse = (images.float() - others.float()).square().flatten(1).mean(1)
    return -10 * (mse / 4).clamp(min=10**-10.6).log10()


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity, -1 to 1, without padding (Wang et al., 2004, eq. 13).

    Raises:
        UserError: if the images are smaller than the window of 11 pixels.
    """
    if min(images.shape[2:]) < SSIM_WINDOW:
        raise UserError(f"SSIM requires images of at least {SSIM_WINDOW} pixels a side, got {min(images.shape[2:])}")
    x, y = images.double(), others.double()
    c1, c2 = 0.01**2 * 4, 0.03**2 * 4  # the range of the values is 2
    mean_x, mean_y = _gaussian_blur(x), _gaussian_blur(y)
    variance_x, variance_y = _gaussian_blur(x * x) - mean_x**2, _gaussian_blur(y * y) - mean_y**2
    covariance = _gaussian_blur(x * y) - mean_x * mean_y
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    denominator = (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return (numerator / denominator).flatten(1).mean(1).float()


def _gaussian_blur(x: Tensor) -> Tensor:
    """Blurs without padding."""
    blurred: Tensor = gaussian_blur(x, [SSIM_WINDOW, SSIM_WINDOW], [SSIM_SIGMA, SSIM_SIGMA])
    margin = SSIM_WINDOW // 2
    return blurred[..., margin:-margin, margin:-margin]


def load_lpips(device: torch.device | str = "cpu") -> ImageDistance:
    """Loads LPIPS with AlexNet (Zhang et al., 2018).

    Raises:
        UserError: if the package or AlexNet's weights in PyTorch's download folder are missing, or the weights differ.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", ALEXNET_FILE)
    if not path.is_file():
        raise UserError(f"requires {path}, torchvision's weights of AlexNet")
    module = import_optional("lpips")
    verify_sha256(path, ALEXNET_SHA256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips uses deprecated arguments of torchvision
        network = module.LPIPS(net="alex", verbose=False).requires_grad_(False).to(device)
    return lambda images, others: network(images.float(), others.float()).flatten()
