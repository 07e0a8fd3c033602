"""Logging to TensorBoard."""

from pathlib import Path

import numpy as np
from PIL import Image

from vae_scale.config.options import Config
from vae_scale.errors import UserError
from vae_scale.tracking.logger import Logger, Metrics


class TensorBoardLogger(Logger):
    """Writes TensorBoard event files to `tensorboard/` in the run's folder.

    Args:
        config: Configuration of the run.
        images_seen: Start of this segment; events of later steps, written before the run was resumed, are purged.

    Raises:
        UserError: tensorboard is not installed.
    """

    def __init__(self, config: Config, images_seen: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("track.tracker tensorboard needs a package: pip install 'vae_scale[tensorboard]'") from None
        self._writer = SummaryWriter(str(config.run_dir / "tensorboard"), purge_step=images_seen + 1)

    def log_metrics(self, images_seen: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            if isinstance(value, list):
                self._writer.add_histogram(name, np.array(value), images_seen)
            else:
                self._writer.add_scalar(name, value, images_seen)

    def log_image(self, images_seen: int, name: str, path: Path) -> None:
        with Image.open(path) as image:
            self._writer.add_image(name, np.asarray(image), images_seen, dataformats="HWC")

    def log_event(self, images_seen: int, kind: str, text: str) -> None:
        self._writer.add_text(f"events/{kind}", text, images_seen)

    def close(self, failed: bool = False) -> None:
        self._writer.close()
