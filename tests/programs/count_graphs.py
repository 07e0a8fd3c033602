"""Trains with torch.compile and counts graphs after each step: `count_graphs.py FILE OPTIONS...` writes FILE.RANK.

Graphs run eagerly, because generating code takes minutes. A fallback to eager mode, which torch does silently, is an error.
"""

import functools
import json
import sys
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from vae_scale.config.parsing import parse
from vae_scale.data.stream import Batch
from vae_scale.training.trainer import Trainer

torch._dynamo.config.fail_on_recompile_limit_hit = True
torch.compile = functools.partial(torch.compile, backend="eager")  # type: ignore[assignment]


class CountingTrainer(Trainer):
    """Records the number of graphs after each iteration, including evaluation and checkpoints."""

    graphs: tuple[int, ...] = ()

    def train_iteration(self, batch: Batch) -> None:
        super().train_iteration(batch)
        self.graphs += (counters["stats"]["unique_graphs"],)


trainer = CountingTrainer(parse(sys.argv[2:])[0])
trainer.run()
Path(f"{sys.argv[1]}.{trainer.rank}").write_text(json.dumps(trainer.graphs))
