"""Averaged weights: what evaluation and sampling use."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from vae_scale.models.vae import VAE


class EMA:
    """An exponential moving average of a model's weights.

    Attributes:
        model: The model with the averaged weights, in evaluation mode.
    """

    def __init__(self, model: VAE, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay
        self._averaged, self._weights = _tensors(self.model.parameters()), _tensors(model.parameters())
        self._kept, self._buffers = _tensors(self.model.buffers()), _tensors(model.buffers())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after optimizer step `step` (1, 2, ...). Early on the average is shorter."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averaged, self._weights, 1 - decay)
        if self._kept:
            torch._foreach_copy_(self._kept, self._buffers)


def _tensors(parts: Iterable[Tensor]) -> list[Tensor]:
    return list(parts)
