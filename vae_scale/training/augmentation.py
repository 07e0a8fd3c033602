"""Image augmentation on the device, parametrized by six numbers per image; zeros leave an image unchanged.

The flow is conditioned on these parameters in training and on zeros in sampling, so augmentations do not leak into its
samples (Karras et al., 2022, appendix F.2). The mixture is fitted to images without augmentation. Horizontal flips are not
conditioned on, so samples may be flipped.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vae_scale.config.options import DataConfig
from vae_scale.models.flow import AUGMENTATION_DIM


def random_parameters(config: DataConfig, count: int, generator: torch.Generator) -> Tensor:
    """Returns augmentation parameters [count, 6]: zoom in [0, 1]; x and y shift, brightness, contrast, saturation in [-1, 1].

    Parameters of disabled augmentations are 0.
    """
    parameters = torch.rand(count, AUGMENTATION_DIM, generator=generator, device=generator.device)
    parameters[:, 1:] = 2 * parameters[:, 1:] - 1
    parameters[:, :3] *= config.random_crop > 0
    parameters[:, 3:] *= config.color_jitter > 0
    return parameters


def augment(images: Tensor, parameters: Tensor, random_crop: float, color_jitter: float) -> Tensor:
    """Returns augmented images.

    Args:
        images: [b, 3, h, w] in [-1, 1].
        parameters: Augmentation parameters [b, 6] of `random_parameters`.
        random_crop: Maximum fraction of a side that is cropped.
        color_jitter: Maximum relative change of brightness, contrast and saturation.
    """
    zoom, shift_x, shift_y, brightness, contrast, saturation = parameters.to(images)[:, :, None, None, None].unbind(1)
    if random_crop:
        size = 1 - random_crop * zoom.flatten()
        theta = images.new_zeros(len(images), 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = size
        theta[:, 0, 2], theta[:, 1, 2] = (1 - size) * shift_x.flatten(), (1 - size) * shift_y.flatten()
        with torch.autocast(images.device.type, enabled=False):  # bf16 coordinates are off by up to 0.1 pixel
            grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
        images = images.contiguous(memory_format=torch.channels_last)
    if color_jitter:
        gray = images.mean(1, keepdim=True)
        images = gray + (1 + color_jitter * saturation) * (images - gray)
        mean = images.mean((1, 2, 3), keepdim=True)
        images = mean + (1 + color_jitter * contrast) * (images - mean) + color_jitter * brightness
        images = images.clamp(-1, 1)
    return images
