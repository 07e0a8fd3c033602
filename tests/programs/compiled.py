"""Trains compiled, and counts graphs: `compiled.py FILE OPTIONS...` writes FILE.RANK.

Graphs are run as they are, since generating code for them takes minutes. Where torch would silently go on without compiling,
it fails here.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from vae_scale.config import parse
from vae_scale.training.trainer import Trainer

torch._dynamo.config.fail_on_recompile_limit_hit = True
torch.compile = functools.partial(torch.compile, backend="eager")  # type: ignore[assignment]


class Counted(Trainer):
    """Notes how many graphs there are after each step, and what follows it."""

    graphs: tuple[int, ...] = ()

    def _advance(self, *args: Any) -> None:
        super()._advance(*args)
        self.graphs += (counters["stats"]["unique_graphs"],)


trainer = Counted(parse(sys.argv[2:])[0])
trainer.run()
Path(f"{sys.argv[1]}.{trainer.rank}").write_text(json.dumps(trainer.graphs))
