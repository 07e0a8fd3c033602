"""Runs `vae_scale.train` and records the rows of each batch in $RECORD_DIR, one file per rank."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from vae_scale import train
from vae_scale.data.stream import Batch, Stream
from vae_scale.training import setup


class RecordingStream(Stream):
    """Writes the rows of each batch as a line of JSON."""

    def __iter__(self) -> Iterator[Batch]:
        path = Path(os.environ["RECORD_DIR"]) / f"rank_{self._rank}_of_{self._world_size}.jsonl"
        with path.open("a") as file:
            for batch in super().__iter__():
                print(json.dumps(batch.rows.tolist()), file=file, flush=True)
                yield batch


setup.Stream = RecordingStream  # type: ignore[misc]
train.main(sys.argv[1:])
