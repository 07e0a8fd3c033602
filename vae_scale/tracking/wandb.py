"""Logging to Weights & Biases."""

import netrc
import os
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import wandb

from vae_scale.config.options import Config, to_dict
from vae_scale.tracking.logger import Logger, Metrics

ALERT_LEVELS = {
    "skipped_steps": "WARN",
    "straggler": "WARN",
    "checkpoint_failed": "WARN",
    "failed": "ERROR",
    "finished": "INFO",
}
ALERT_INTERVAL = timedelta(hours=1)  # minimum time between two alerts of the same kind


class WandbLogger(Logger):
    """Logs to a wandb run: offline if no API key is found, without a prompt.

    Args:
        config: Configuration of the run.
        run_id: Identifier of the wandb run to resume; None for a new one.
        metadata: Values to record beside the configuration.
    """

    def __init__(self, config: Config, run_id: str | None, metadata: dict[str, Any]) -> None:
        self._run = wandb.init(
            project=config.track.project,
            name=config.run_dir.name,
            dir=str(config.run_dir),
            id=run_id,
            resume="allow" if run_id else None,
            config=to_dict(config) | metadata,
            mode=_wandb_mode(),
            # wandb's metadata includes the command line, where data.shards may hold credentials.
            settings=wandb.Settings(silent=True, console="off", x_disable_meta=True),
        )
        self._run.define_metric("*", step_metric="images")  # wandb's own step counts calls
        self.run_id = str(self._run.id)
        self._log_artifacts = config.track.artifacts
        manifest = Path(config.data.shards) / "index.json"
        if self._log_artifacts and manifest.is_file():
            self._log_artifact("shards", "dataset", manifest)

    def log_metrics(self, images_seen: int, metrics: Metrics) -> None:
        values = {
            name: wandb.Histogram(np_histogram=np.histogram(value)) if isinstance(value, list) else value
            for name, value in metrics.items()
        }
        self._run.log({"images": images_seen} | values)

    def log_image(self, images_seen: int, name: str, path: Path) -> None:
        self._run.log({"images": images_seen, name: wandb.Image(str(path))})

    def log_event(self, images_seen: int, kind: str, text: str) -> None:
        """Sends an alert if the event's kind has an alert level."""
        if kind in ALERT_LEVELS:
            title = f"{self._run.name}: {kind}"
            self._run.alert(title, f"{images_seen:,} images: {text}", ALERT_LEVELS[kind], ALERT_INTERVAL)

    def log_checkpoint(self, folder: Path) -> None:
        """Logs a checkpoint as an artifact if `track.artifacts` is set."""
        if self._log_artifacts:
            self._log_artifact("checkpoint", "model", folder)

    def close(self, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))

    def _log_artifact(self, name: str, artifact_type: str, path: Path) -> None:
        artifact = wandb.Artifact(f"{self.run_id}-{name}", artifact_type)
        (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path))
        self._run.log_artifact(artifact, aliases=["latest", path.name])


def _wandb_mode() -> Any:
    """Returns WANDB_MODE if it is set; otherwise "online" if there is an API key, else "offline"."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        has_key = netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        has_key = False
    return "online" if has_key or os.environ.get("WANDB_API_KEY") else "offline"
