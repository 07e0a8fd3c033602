"""The networks of vae_scale in layers of torch.nn, as other training loops use them, and their loss."""

import copy
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vae_scale.models.blocks import Downsample, Upsample
from vae_scale.models.vae import VAE


def plain(model: VAE) -> VAE:
    """Returns an equivalent copy with layers of torch.nn (GroupNorm, PixelShuffle, PixelUnshuffle), in contiguous memory."""
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.GroupNorm):
                norm = nn.GroupNorm(layer.num_groups, layer.num_channels, layer.eps)
                norm.load_state_dict(layer.state_dict())
                setattr(parent, name, norm.to(layer.weight.device))
            elif isinstance(layer, Downsample):
                setattr(parent, name, _fold(layer.proj, 2))
            elif isinstance(layer, Upsample):
                setattr(parent, name, _unfold(layer.proj, 2))
    if model.config.network == "resnet":
        encoder: Any = model.encoder
        decoder: Any = model.decoder
        encoder.stem, decoder.head = _fold(encoder.stem, encoder.patch), _unfold(decoder.head, decoder.patch)
        encoder.patch = decoder.patch = 1  # disables folding in the networks
    return model


def _fold(layer: nn.Conv2d, side: int) -> nn.Module:
    """Prepends PixelUnshuffle, which orders channels by color, then position; space_to_depth orders by position, then color."""
    weight = rearrange(layer.weight.detach(), "o (p q c) h w -> o (c p q) h w", p=side, q=side)
    layer.weight = nn.Parameter(weight.contiguous())
    return nn.Sequential(nn.PixelUnshuffle(side), layer)


def _unfold(layer: nn.Conv2d, side: int) -> nn.Module:
    assert layer.bias is not None
    weight = rearrange(layer.weight.detach(), "(p q c) i h w -> (c p q) i h w", p=side, q=side)
    bias = rearrange(layer.bias.detach(), "(p q c) -> (c p q)", p=side, q=side)
    layer.weight, layer.bias = nn.Parameter(weight.contiguous()), nn.Parameter(bias.contiguous())
    return nn.Sequential(layer, nn.PixelShuffle(side))


class Loss(nn.Module):
    """The negative ELBO in nats per image."""

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Maps images [b, 3, h, w] in [0, 1] to a scalar. `noise`, [b, *latent_shape], is drawn from N(0, I) by default."""
        if noise is None:
            noise = torch.randn(len(images), *self.model.latent_shape, device=images.device)
        terms: Tensor = self.model(2 * images - 1, noise).elbo
        return -terms.mean()
