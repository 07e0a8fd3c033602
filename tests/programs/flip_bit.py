"""Trains as `python -m vae_scale.train` does, but flips one bit of a weight of rank 1 in the step after 24 images."""

import sys

import torch

from vae_scale import train
from vae_scale.data.stream import Batch
from vae_scale.training.trainer import Trainer


class Faulty(Trainer):
    """A trainer on a machine whose memory fails."""

    def _step(self, batch: Batch) -> None:
        super()._step(batch)
        if self.rank == 1 and self.images_seen == 24:
            weight = next(self.model.parameters()).detach().view(torch.int32)
            weight[(0,) * weight.ndim] ^= 1


sys.modules["vae_scale.training.trainer"].Trainer = Faulty  # type: ignore[attr-defined]
train.main(sys.argv[1:])
