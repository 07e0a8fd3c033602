"""Runs `vae_scale.train` and flips one bit of a weight of rank 1 in the step after 24 images."""

import sys

import torch

from vae_scale import train
from vae_scale.data.stream import Batch
from vae_scale.training.trainer import Trainer


class FaultyTrainer(Trainer):
    """Simulates a memory fault."""

    def train_step(self, batch: Batch) -> None:
        super().train_step(batch)
        if self.rank == 1 and self.images_seen == 36:
            weight = next(self.model.parameters()).detach().view(torch.int32)
            weight[(0,) * weight.ndim] ^= 1


sys.modules["vae_scale.training.trainer"].Trainer = FaultyTrainer  # type: ignore[attr-defined]
train.main(sys.argv[1:])
