"""Trains as `python -m vae_scale.train` does, and tells how it was launched."""

import sys

from torch.distributed.fsdp import FSDPModule

from vae_scale import train
from vae_scale.training.trainer import Trainer


class Telling(Trainer):
    """A trainer that says who it is, before it trains."""

    def run(self) -> None:
        kind = "FSDP2" if isinstance(self.objective, FSDPModule) else type(self.objective).__name__
        print(f"rank {self.rank} of {self.ranks}, {kind}, {self.device.type}", flush=True)
        super().run()


sys.modules["vae_scale.training.trainer"].Trainer = Telling  # type: ignore[attr-defined]
train.main(sys.argv[1:])
