"""Augmentation on the device, as a function of six numbers that are all 0 for an image left as it is.

A flow is told these numbers in training and given zeros in sampling, so it does not learn to draw augmented images
("non-leaking", Karras et al., 2022, appendix F.2); the mixture is fitted to images that were not augmented. Mirroring is
not among the numbers: mirrored images may be drawn.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vae_scale.config import DataConfig
from vae_scale.models.flow import AUGMENTATIONS


def draw(config: DataConfig, count: int, source: torch.Generator) -> Tensor:
    """How each of `count` images is augmented, [count, 6]: zoom 0..1; shift in x and y, brightness, contrast, saturation -1..1.

    All numbers of what is switched off are 0.
    """
    numbers = torch.rand(count, AUGMENTATIONS, generator=source, device=source.device)
    numbers[:, 1:] = 2 * numbers[:, 1:] - 1
    numbers[:, :3] *= config.crop > 0
    numbers[:, 3:] *= config.colour > 0
    return numbers


def augment(images: Tensor, numbers: Tensor, crop: float, colour: float) -> Tensor:
    """Images [b, 3, h, w] in [-1, 1] with up to `crop` of a side cut off and up to `colour` of their colours changed."""
    zoom, across, down, brightness, contrast, saturation = numbers.to(images)[:, :, None, None, None].unbind(1)
    if crop:
        size = 1 - crop * zoom.flatten()
        theta = images.new_zeros(len(images), 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = size
        theta[:, 0, 2], theta[:, 1, 2] = (1 - size) * across.flatten(), (1 - size) * down.flatten()
        with torch.autocast(images.device.type, enabled=False):  # coordinates in bf16 are off by up to 0.1 pixel
            grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
        images = images.contiguous(memory_format=torch.channels_last)
    if colour:
        grey = images.mean(1, keepdim=True)
        images = grey + (1 + colour * saturation) * (images - grey)
        middle = images.mean((1, 2, 3), keepdim=True)
        images = middle + (1 + colour * contrast) * (images - middle) + colour * brightness
        images = images.clamp(-1, 1)
    return images
