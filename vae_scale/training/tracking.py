"""Curves and pictures: always in the run's folder, and in wandb where that is wanted."""

import errno
import json
import netrc
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from tqdm import tqdm

from vae_scale.config import Config, as_dict

METRICS = "metrics.jsonl"


class Tracker:
    """What rank 0 writes down, counted in images seen.

    Args:
        config: The run's configuration.
        images_seen: Where the run begins; what `metrics.jsonl` holds beyond it is dropped, for it will come again.
        wandb_id: The wandb run to go on with, if there was one.
    """

    def __init__(self, config: Config, images_seen: int, wandb_id: str | None) -> None:
        self.folder = config.folder
        self._metrics = _Lines(self.folder / METRICS, images_seen)
        self._wandb = _start_wandb(config, wandb_id) if config.track.tracker == "wandb" else None

    @property
    def wandb_id(self) -> str | None:
        """The id of the wandb run."""
        return str(self._wandb.id) if self._wandb else None

    def log(self, images_seen: int, values: dict[str, float]) -> None:
        """Writes scalars."""
        self._metrics.append(json.dumps({"images": images_seen} | values))
        if self._wandb:
            self._wandb.log({"images": images_seen} | values)

    def picture(self, images_seen: int, name: str, path: Path) -> None:
        """Hands on a picture that lies in the run's folder."""
        if self._wandb:
            import wandb

            self._wandb.log({"images": images_seen, name: wandb.Image(str(path))})

    def close(self) -> None:
        """Ends the wandb run, once everything is written."""
        if self._wandb:
            self._wandb.finish()


class _Lines:
    """The lines of a file, of which each is written whole. Those that find the disk full, or gone, are written later."""

    def __init__(self, path: Path, images_seen: int) -> None:
        self._path = path
        self._waiting: list[str] = []
        self._told = False
        kept = []
        if path.exists():
            for line in path.read_text("utf-8", "replace").splitlines():
                try:
                    if json.loads(line)["images"] <= images_seen:
                        kept.append(line)
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue  # a line that was being written when the run was stopped
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(path)

    def append(self, line: str) -> None:
        self._waiting.append(line)
        content = "".join(f"{line}\n" for line in self._waiting).encode()
        try:
            with self._path.open("ab", buffering=0) as file:
                end = file.tell()
                if file.write(content) < len(content):
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._told:
                tqdm.write(f"warning: {self._path}: {error.strerror}; its lines are kept until they can be written", sys.stderr)
            self._told = True
            return
        self._waiting, self._told = [], False


def _start_wandb(config: Config, wandb_id: str | None) -> Any:
    import wandb

    run = wandb.init(
        project=config.track.project,
        name=config.folder.name,
        dir=str(config.folder),
        id=wandb_id,
        resume="allow" if wandb_id else None,
        config=as_dict(config),
        mode=_wandb_mode(),
        # What it calls metadata has the whole command line in it, with what is secret in data.shards.
        settings=wandb.Settings(silent=True, console="off", x_disable_meta=True),
    )
    # Its own step counts calls; every curve is drawn over the images seen instead.
    run.define_metric("*", step_metric="images")
    return run


def _wandb_mode() -> Any:
    """What the environment says; else online if there is a key, offline if not: never a prompt."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        known = False
    return "online" if known or os.environ.get("WANDB_API_KEY") else "offline"
