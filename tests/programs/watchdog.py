"""Takes short steps like training: `watchdog.py FOLDER TIMEOUT [STUCK_RANK [COMPILE_SECONDS]]`.

Each rank writes its step count into FOLDER. STUCK_RANK hangs after 20 steps, or compiles for COMPILE_SECONDS before the next.
"""

import sys
import time
from pathlib import Path

import torch

from vae_scale.config.options import TrainConfig
from vae_scale.runtime import compiling
from vae_scale.runtime.launching import create_accelerator
from vae_scale.runtime.watchdog import HangWatchdog

folder, timeout, stuck_rank = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else -1
compile_seconds = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
accelerator = create_accelerator(TrainConfig(precision="fp32", timeout=timeout))
rank = accelerator.process_index


def compile_slowly(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
    time.sleep(compile_seconds)
    return graph


watchdog = HangWatchdog(rank, accelerator.num_processes, timeout)
with watchdog, compiling.report_compilation(print, watchdog.set_compiling):
    for step in range(1, 1_000_000):
        watchdog.heartbeat(f"the batch after {step} steps")
        if rank == stuck_rank and step == 21:
            torch.compile(torch.square, backend=compile_slowly)(torch.ones(2)) if compile_seconds else time.sleep(1000)
        watchdog.heartbeat(f"the all-reduce after {step} steps")
        accelerator.reduce(torch.ones(()))
        (folder / f"rank_{rank}").write_text(str(step))
        time.sleep(0.01)
