"""The critic: judges patches of images as real or reconstructed. Only training needs it."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class Critic(nn.Module):
    """A convolutional network whose every output sees a patch of the image (PatchGAN, Isola et al., 2017, sec. 3.2).

    No normalisation: BatchNorm would make the verdict on an image depend on the others of its batch.

    Args:
        width: Channels of the first layer.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width]
        self.layers = nn.ModuleList(nn.Conv2d(fewer, more, 4, stride=2, padding=1) for fewer, more in pairwise(widths))
        self.head = nn.Conv2d(4 * width, 1, 3, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Verdicts [b, h/8, w/8] on images [b, 3, h, w], higher for real ones, and the features of each layer."""
        features = []
        for layer in self.layers:
            images = F.leaky_relu(layer(images), 0.2)
            features.append(images)
        return self.head(images)[:, 0], features
