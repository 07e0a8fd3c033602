"""Trains, and writes down what this process holds and does: `inspected.py FILE SLOW OPTIONS...` writes FILE.RANK.

Rank SLOW waits in each step of the optimizer, as a slow GPU does.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from torch.profiler import profile

from vae_scale.config import parse
from vae_scale.training.trainer import Trainer

trainer = Trainer(parse(sys.argv[3:])[0])
step = trainer.update.adamw.step


def slow_step(*args: Any) -> Any:
    time.sleep(0.05)
    return step(*args)


if trainer.rank == int(sys.argv[2]):
    trainer.update.adamw.step = slow_step  # type: ignore[method-assign]
with profile() as recorded:
    trainer.run()
began: dict[str, list[float]] = {}
for event in recorded.events():
    began.setdefault(event.name, []).append(event.time_range.start)
report = {
    "weights": sum(weight.numel() for weight in trainer.model.parameters()),
    "averaged": sum(weight.numel() for weight in trainer.ema.model.parameters()),
    "own share": sum(weight.numel() for weight in trainer.ema._averaged),
    "staged": sum(tensor.numel() for part in trainer.writer._staged.values() for tensor in part.values()),
    "began": {name: began.get(name, []) for name in ("c10d::allreduce_", "aten::_fused_adamw_", "c10d::broadcast_")},
}
Path(f"{sys.argv[1]}.{trainer.rank}").write_text(json.dumps(report))
