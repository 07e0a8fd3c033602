"""The whole loss path in one module, so that DDP, autocast and torch.compile see all of it."""

import math

import torch
from torch import Tensor, nn

from vae_scale.models.vae import VAE


def to_model(images: Tensor, flips: Tensor | None = None) -> Tensor:
    """uint8 [b, h, w, 3] to [-1, 1], [b, 3, h, w] in channels_last memory; those with `flips` [b] are mirrored."""
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return x if flips is None else torch.where(flips[:, None, None, None], x.flip(3), x)


def bits_per_dim(nats: float, dimensions: int) -> float:
    """Nats per image in bits per number of the image."""
    return nats / (dimensions * math.log(2))


class Objective(nn.Module):
    """-log p(image | latent) + beta KL(q || p), in nats per image.

    Args:
        model: The VAE.
        free_bits: Nats per latent channel and image below which the KL divergence is not pressed
            (Kingma et al., 2016, appendix C.8).
    """

    def __init__(self, model: VAE, free_bits: float) -> None:
        super().__init__()
        self.model = model
        self.free_bits = free_bits

    def forward(self, images: Tensor, flips: Tensor, noise: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """The loss to minimise and what was measured.

        Args:
            images: uint8 [b, h, w, 3].
            flips: bool [b], the images to be mirrored.
            noise: N(0, I) in the latents' shape.
            beta: Weight of the KL divergence, a scalar.

        Returns:
            The loss in nats per image and dimension, so that gradients stay in fp16's range; and, in nats per image
            and without gradient: loss, -log p(image | latent), KL divergence; and the likelihood's deviation: [4].
        """
        x = to_model(images, flips)
        terms = self.model(x, noise)
        pressed = terms.kl.clamp(min=self.free_bits) if self.free_bits else terms.kl
        loss = (beta * pressed.sum(1) - terms.log_prob).mean()
        deviation = self.model.likelihood.deviation(terms.output, x)
        kl = terms.kl.detach().sum(1).mean()
        measured = torch.stack([loss.detach(), -terms.log_prob.detach().mean(), kl, deviation])
        return loss / self.model.dimensions, measured
