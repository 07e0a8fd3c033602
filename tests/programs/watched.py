"""Takes steps as training does, but hardly any time for them: `watched.py FOLDER TIMEOUT [STUCK [COMPILING]]`.

Each process writes the number of its steps into FOLDER; rank STUCK takes no more than 20 of them, or with COMPILING is given
that many seconds to compile before the next.
"""

import sys
import time
from pathlib import Path

import torch

from vae_scale.config import TrainConfig
from vae_scale.training import compiling
from vae_scale.training.launching import start
from vae_scale.training.watch import Watch

folder, timeout, stuck = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else -1
seconds = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
accelerator = start(TrainConfig(precision="fp32", timeout=timeout))
rank = accelerator.process_index


def compile_slowly(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
    time.sleep(seconds)
    return graph


with Watch(rank, accelerator.num_processes, timeout) as watch, compiling.shown(print, watch.compiling):
    for step in range(1, 1_000_000):
        watch.mark(f"the batch after {step} steps")
        if rank == stuck and step == 21:
            torch.compile(torch.square, backend=compile_slowly)(torch.ones(2)) if seconds else time.sleep(1000)
        watch.mark(f"the exchange after {step} steps")
        accelerator.reduce(torch.ones(()))
        (folder / f"rank_{rank}").write_text(str(step))
        time.sleep(0.01)
