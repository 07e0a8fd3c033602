"""Exponential moving average of the weights, used by evaluation and sampling."""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vae_scale.models.vae import VAE
from vae_scale.runtime.sharding import full_tensor, local_shard, shard_like


class EMA:
    """An exponential moving average of a model's weights. With a decay of 0 it is the model itself.

    Attributes:
        decay: The decay per step.
        model: The averaged model in evaluation mode; up to date only within `gathered`. If weights are sharded, its parameters
            are empty outside of it.
    """

    def __init__(self, model: VAE, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def attach(self, model: VAE) -> None:
        """Averages the weights of `model` from now on. If they are sharded, each process averages its local shards."""
        parameters: list[Tensor] = list(model.parameters())
        self._parameters: list[Tensor] = list(self.model.parameters())
        self._is_sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
        self._shards = (
            [shard_like(*pair) for pair in zip(self._parameters, parameters, strict=True)] if self._is_sharded else []
        )
        self._averaged = [local_shard(shard) for shard in self._shards] or self._parameters
        self._sources = [local_shard(parameter) for parameter in parameters]
        self._buffers, self._source_buffers = list(self.model.buffers()), list(model.buffers())
        self._free_full_parameters()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Updates the average after optimizer step `step` (1, 2, ...). The decay is smaller in the first steps."""
        if not self.decay:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averaged, self._sources, 1 - decay)
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._source_buffers)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[VAE]:
        """Yields `model` with full averaged weights on every process. All processes must call it."""
        self._copy_if_no_decay()
        with torch.no_grad():
            for parameter, shard in zip(self._parameters, self._shards, strict=False):
                memory_format = torch.channels_last if shard.ndim == 4 else torch.contiguous_format
                parameter.data = full_tensor(shard).to(memory_format=memory_format)
        try:
            yield self.model
        finally:
            self._free_full_parameters()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields names and values of the averaged weights, DTensors if sharded, and of the buffers."""
        self._copy_if_no_decay()
        shards = dict(zip((name for name, _ in self.model.named_parameters()), self._shards, strict=False))
        for name, value in self.model.state_dict().items():
            yield name, shards.get(name, value)

    @torch.no_grad()
    def _copy_if_no_decay(self) -> None:
        if not self.decay:
            torch._foreach_copy_([*self._averaged, *self._buffers], [*self._sources, *self._source_buffers])

    def _free_full_parameters(self) -> None:
        if self._is_sharded:
            for parameter in self._parameters:
                parameter.data = parameter.new_empty(0)
