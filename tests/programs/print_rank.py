"""Runs `vae_scale.train` and prints the rank, the type of parallelism and the device of each process."""

import sys

from torch.distributed.fsdp import FSDPModule

from vae_scale import train
from vae_scale.training.trainer import Trainer


class PrintingTrainer(Trainer):
    """Prints a line before training."""

    def run(self) -> None:
        kind = "FSDP2" if isinstance(self.objective, FSDPModule) else type(self.objective).__name__
        print(f"rank {self.rank} of {self.world_size}, {kind}, {self.device.type}", flush=True)
        super().run()


sys.modules["vae_scale.training.trainer"].Trainer = PrintingTrainer  # type: ignore[attr-defined]
train.main(sys.argv[1:])
