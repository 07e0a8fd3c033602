"""Services that draw curves: wandb and TensorBoard."""

import netrc
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np

from vae_scale.config import Config, as_dict
from vae_scale.errors import UserError

Values = Mapping[str, float | list[float]]
ALERTS = {"left_out": "WARN", "straggler": "WARN", "not_saved": "WARN", "failed": "ERROR", "finished": "INFO"}
ALERT_AGAIN = timedelta(hours=1)  # after which the same is worth another alert


class Service(ABC):
    """Where curves, pictures and events of a run go. All of them count in images seen.

    Attributes:
        run_id: What the service calls the run; None where it needs no name to go on.
    """

    run_id: str | None = None

    @abstractmethod
    def log(self, images_seen: int, values: Values) -> None:
        """Takes scalars, and lists of which the distribution is shown."""

    @abstractmethod
    def picture(self, images_seen: int, name: str, path: Path) -> None:
        """Takes a picture, a PNG file."""

    def event(self, images_seen: int, kind: str, text: str) -> None:
        """Tells of an event; may be called by any thread."""
        return

    def checkpoint(self, folder: Path) -> None:
        """Takes a checkpoint; called by the thread that wrote it."""
        return

    @abstractmethod
    def close(self, failed: bool) -> None:
        """Sends what is left."""


def service(config: Config, images_seen: int, run_id: str | None, about: dict[str, Any]) -> Service | None:
    """The service that `track.tracker` names; None for none.

    Args:
        config: The run's configuration.
        images_seen: Where the run begins.
        run_id: What the service called the run before, if it goes on.
        about: Facts to record beside the configuration.
    """
    if config.track.tracker == "wandb":
        return Wandb(config, run_id, about)
    if config.track.tracker == "tensorboard":
        return TensorBoard(config, images_seen)
    return None


class Wandb(Service):
    """A wandb run: offline where there is no key, never a prompt."""

    def __init__(self, config: Config, run_id: str | None, about: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=config.track.project,
            name=config.folder.name,
            dir=str(config.folder),
            id=run_id,
            resume="allow" if run_id else None,
            config=as_dict(config) | about,
            mode=_wandb_mode(),
            # What it calls metadata has the whole command line in it, with what is secret in data.shards.
            settings=wandb.Settings(silent=True, console="off", x_disable_meta=True),
        )
        # Its own step counts calls; every curve is drawn over the images seen instead.
        self._run.define_metric("*", step_metric="images")
        self.run_id = str(self._run.id)
        self._artifacts = config.track.artifacts
        manifest = Path(config.data.shards) / "index.json"
        if self._artifacts and manifest.is_file():
            self._keep("shards", "dataset", manifest)

    def log(self, images_seen: int, values: Values) -> None:
        """See `Service`."""
        import wandb

        def shown(value: float | list[float]) -> Any:
            return wandb.Histogram(np_histogram=np.histogram(value)) if isinstance(value, list) else value

        self._run.log({"images": images_seen} | {name: shown(value) for name, value in values.items()})

    def picture(self, images_seen: int, name: str, path: Path) -> None:
        """See `Service`."""
        import wandb

        self._run.log({"images": images_seen, name: wandb.Image(str(path))})

    def event(self, images_seen: int, kind: str, text: str) -> None:
        """Alerts whoever watches, where that is worth it."""
        if kind in ALERTS:
            self._run.alert(f"{self._run.name}: {kind}", f"{images_seen:,} images: {text}", ALERTS[kind], ALERT_AGAIN)

    def checkpoint(self, folder: Path) -> None:
        """See `Service`; only with track.artifacts."""
        if self._artifacts:
            self._keep("checkpoint", "model", folder)

    def close(self, failed: bool) -> None:
        """See `Service`."""
        self._run.finish(exit_code=int(failed))

    def _keep(self, name: str, kind: str, path: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"{self.run_id}-{name}", kind)
        (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path))
        self._run.log_artifact(artifact, aliases=["latest", path.name])


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


class TensorBoard(Service):
    """Event files in the run's folder `tensorboard`.

    Raises:
        UserError: it is not installed.
    """

    def __init__(self, config: Config, images_seen: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("track.tracker tensorboard needs a package: pip install 'vae_scale[tensorboard]'") from None
        # What came after the checkpoint that the run goes on from will come again.
        self._writer = SummaryWriter(str(config.folder / "tensorboard"), purge_step=images_seen + 1)

    def log(self, images_seen: int, values: Values) -> None:
        """See `Service`."""
        for name, value in values.items():
            if isinstance(value, list):
                self._writer.add_histogram(name, np.array(value), images_seen)
            else:
                self._writer.add_scalar(name, value, images_seen)

    def picture(self, images_seen: int, name: str, path: Path) -> None:
        """See `Service`."""
        from PIL import Image

        with Image.open(path) as picture:
            self._writer.add_image(name, np.asarray(picture), images_seen, dataformats="HWC")

    def event(self, images_seen: int, kind: str, text: str) -> None:
        """Keeps it as text."""
        self._writer.add_text(f"events/{kind}", text, images_seen)

    def close(self, failed: bool) -> None:
        """See `Service`."""
        self._writer.close()
