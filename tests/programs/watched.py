"""Takes steps as training does, but hardly any time for them: `watched.py FOLDER TIMEOUT [STUCK]`.

Each process writes the number of its steps into FOLDER; rank STUCK takes no more than 20 of them.
"""

import sys
import time
from pathlib import Path

import torch

from vae_scale.config import TrainConfig
from vae_scale.training.launching import start
from vae_scale.training.watch import Watch

folder, timeout, stuck = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else -1
accelerator = start(TrainConfig(precision="fp32", timeout=timeout))
rank = accelerator.process_index
with Watch(rank, accelerator.num_processes, timeout) as watch:
    for step in range(1, 1_000_000):
        watch.mark(f"the batch after {step} steps")
        if rank == stuck and step > 20:
            time.sleep(1000)
        watch.mark(f"the exchange after {step} steps")
        accelerator.reduce(torch.ones(()))
        (folder / f"rank_{rank}").write_text(str(step))
        time.sleep(0.01)
