"""Trains as `python -m vae_scale.train` does, and writes down which images each process was given."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from vae_scale import train
from vae_scale.data.stream import Batch, Stream
from vae_scale.training import trainer


class Recording(Stream):
    """A stream that keeps a diary."""

    def __iter__(self) -> Iterator[Batch]:
        diary = Path(os.environ["DIARY"]) / f"rank_{self._rank}_of_{self._ranks}.jsonl"
        with diary.open("a") as file:
            for batch in super().__iter__():
                print(json.dumps(batch.rows.tolist()), file=file, flush=True)
                yield batch


trainer.Stream = Recording  # type: ignore[misc]
train.main(sys.argv[1:])
