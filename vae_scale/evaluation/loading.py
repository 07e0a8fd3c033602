"""Loads trained runs for the commands that use them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator

from vae_scale.config.options import TrainConfig
from vae_scale.data.shards import ShardSet
from vae_scale.errors import UserError
from vae_scale.models.pretrained import AVERAGED_WEIGHTS
from vae_scale.models.vae import VAE
from vae_scale.runtime.checkpoint import images_seen_at, load_checkpoint, require_checkpoint
from vae_scale.runtime.distributed import SINGLE_PROCESS, DistContext
from vae_scale.runtime.launching import create_accelerator, get_device


@dataclass(frozen=True)
class LoadedRun:
    """The averaged weights of a run's newest checkpoint, and the `data` options it was trained with."""

    checkpoint_dir: Path
    images_seen: int
    data: dict[str, Any]
    model: VAE
    dist: DistContext

    @property
    def train_splits(self) -> list[str]:
        """Names of the splits that the model was trained on."""
        return [name.strip() for name in self.data["train"].split(",")]

    def open_shards(self, location: str | None = None) -> ShardSet:
        """Opens the shards at `location`, or those of the run.

        Raises:
            UserError: if they cannot be read, or their images do not have the model's resolution.
        """
        shards = ShardSet.open(location or self.data["shards"])
        height, width = shards.image_shape[:2]
        side = self.model.resolution
        if (height, width) != (side, side):
            raise UserError(f"--shards {shards.location}: images are {width}x{height}, but the model requires {side}x{side}")
        return shards


def load_run(run: Path, accelerator: Accelerator | None = None) -> LoadedRun:
    """Loads the newest valid checkpoint of a run, the same one on all ranks, onto the CPU or the accelerator's device.

    Raises:
        UserError: if there is no valid checkpoint.
    """
    dist = DistContext.from_accelerator(accelerator) if accelerator else SINGLE_PROCESS
    device = get_device(accelerator) if accelerator else "cpu"
    folder = require_checkpoint(run, "--run", dist, device)
    model = VAE.from_pretrained(folder, AVERAGED_WEIGHTS).to(device)
    return LoadedRun(folder, images_seen_at(folder), load_checkpoint(folder)[0]["config"]["data"], model, dist)


def start_command(run: Path, precision: Literal["auto", "bf16", "fp32"]) -> tuple[LoadedRun, Accelerator]:
    """Initializes Accelerate with a precision and loads a run."""
    accelerator = create_accelerator(TrainConfig(precision=precision))
    return load_run(run, accelerator), accelerator
