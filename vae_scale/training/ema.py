"""Averaged weights: what evaluation and sampling use."""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vae_scale.models.vae import VAE
from vae_scale.training.sharding import like, share, whole


class EMA:
    """An exponential moving average of a model's weights.

    Attributes:
        model: The model with the averaged weights, in evaluation mode; up to date within `gathered` only. Where weights are
            sharded, it has none outside of it.
    """

    def __init__(self, model: VAE, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def follow(self, model: VAE) -> None:
        """Averages the weights of `model` from now on. Where these are sharded, each process averages its share."""
        weights: list[Tensor] = list(model.parameters())
        self._own: list[Tensor] = list(self.model.parameters())
        self._is_sharded = any(isinstance(weight, DTensor) for weight in weights)
        # Each as the weight that it follows: a share where that is one.
        self._parts = [like(mine, weight) for mine, weight in zip(self._own, weights, strict=True)] if self._is_sharded else []
        self._averaged = [share(part) for part in self._parts] or self._own
        self._weights = [share(weight) for weight in weights]
        self._kept, self._buffers = list(self.model.buffers()), list(model.buffers())
        self._release()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after optimizer step `step` (1, 2, ...). Early on the average is shorter."""
        if not self._decay:
            return
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averaged, self._weights, 1 - decay)
        if self._kept:
            torch._foreach_copy_(self._kept, self._buffers)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[VAE]:
        """Within it `model` holds all averaged weights, on every process. All processes must call it."""
        self._bring_up_to_date()
        with torch.no_grad():
            for mine, part in zip(self._own, self._parts, strict=False):
                mine.data = whole(part).to(memory_format=_format_of(part))
        try:
            yield self.model
        finally:
            self._release()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The averaged weights and the buffers by their names; sharded ones as DTensors."""
        self._bring_up_to_date()
        sharded = dict(zip((name for name, _ in self.model.named_parameters()), self._parts, strict=False))
        for name, value in self.model.state_dict().items():
            yield name, sharded.get(name, value)

    @torch.no_grad()
    def _bring_up_to_date(self) -> None:
        if not self._decay:  # then nothing was copied step by step
            torch._foreach_copy_([*self._averaged, *self._kept], [*self._weights, *self._buffers])

    def _release(self) -> None:
        """Gives back the memory of whole weights where each process has its share."""
        if self._is_sharded:
            for mine in self._own:
                mine.data = mine.new_empty(0)


def _format_of(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
