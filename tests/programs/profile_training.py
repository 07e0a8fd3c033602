"""Trains under the profiler: `profile_training.py FILE SLOW_RANK OPTIONS...` writes a report to FILE.RANK.

SLOW_RANK sleeps in each optimizer step, like a slow GPU.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from torch.profiler import profile

from vae_scale.config.parsing import parse
from vae_scale.training.trainer import Trainer

OPERATIONS = ("c10d::allreduce_", "aten::_fused_adamw_", "c10d::broadcast_")

trainer = Trainer(parse(sys.argv[3:])[0])
adamw_step = trainer.optimizer_step.adamw.step


def slow_step(*args: Any) -> Any:
    time.sleep(0.05)
    return adamw_step(*args)


if trainer.rank == int(sys.argv[2]):
    trainer.optimizer_step.adamw.step = slow_step  # type: ignore[method-assign]
with profile() as profiler:
    trainer.run()
start_times: dict[str, list[float]] = {}
for event in profiler.events():
    start_times.setdefault(event.name, []).append(event.time_range.start)
report = {
    "weights": sum(weight.numel() for weight in trainer.model.parameters()),
    "averaged": sum(weight.numel() for weight in trainer.ema.model.parameters()),
    "local average": sum(weight.numel() for weight in trainer.ema._averaged),
    "staged": sum(tensor.numel() for part in trainer.writer._staged.values() for tensor in part.values()),
    "start_times": {name: start_times.get(name, []) for name in OPERATIONS},
}
Path(f"{sys.argv[1]}.{trainer.rank}").write_text(json.dumps(report))
