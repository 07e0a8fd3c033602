"""The discriminator of adversarial training."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class Discriminator(nn.Module):
    """A PatchGAN discriminator, which classifies patches of images as real or reconstructed (Isola et al., 2017, sec. 3.2).

    It has no normalization layers: with BatchNorm, the output for an image would depend on the other images of the batch.

    Args:
        width: Channels of the first layer.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width]
        self.layers = nn.ModuleList(nn.Conv2d(c_in, c_out, 4, stride=2, padding=1) for c_in, c_out in pairwise(widths))
        self.head = nn.Conv2d(4 * width, 1, 3, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns the logits of images [b, 3, h, w], higher for real ones, [b, h/8, w/8], and the features of each layer."""
        features = []
        for layer in self.layers:
            images = F.leaky_relu(layer(images), 0.2)
            features.append(images)
        return self.head(images)[:, 0], features
