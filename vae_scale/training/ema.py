"""Averaged weights: what evaluation and sampling use."""

import copy

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vae_scale.models.vae import VAE
from vae_scale.training.sharding import like, share, whole


class EMA:
    """An exponential moving average of a model's weights.

    Attributes:
        model: The model with the averaged weights, in evaluation mode; where weights are sharded or not averaged at all (decay
            0), as `gather` left it.
    """

    def __init__(self, model: VAE, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def follow(self, model: VAE) -> None:
        """Averages the weights of `model` from now on. Where these are sharded, each process averages its share."""
        weights: list[Tensor] = list(model.parameters())
        averaged: list[Tensor] = list(self.model.parameters())
        self._sharded = [
            (mine, like(mine, weight)) for mine, weight in zip(averaged, weights, strict=True) if isinstance(weight, DTensor)
        ]
        self._averaged = [share(part) for _, part in self._sharded] or averaged
        self._weights = [share(weight) for weight in weights]
        self._kept, self._buffers = list(self.model.buffers()), list(model.buffers())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after optimizer step `step` (1, 2, ...). Early on the average is shorter."""
        if not self._decay:
            return
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averaged, self._weights, 1 - decay)
        if self._kept:
            torch._foreach_copy_(self._kept, self._buffers)

    @torch.no_grad()
    def gather(self) -> None:
        """Brings `model` up to date: the shares together, if there are any. All processes must call it."""
        if not self._decay:
            torch._foreach_copy_([*self._averaged, *self._kept], [*self._weights, *self._buffers])
        for mine, part in self._sharded:
            mine.copy_(whole(part))
