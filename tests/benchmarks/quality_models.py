"""The trained models of `quality.py`, which all generate and reconstruct images as uint8 [n, h, w, 3]."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from pythae_vae import Pythae
from quality_methods import BATCH, DEVICE, Row, to_batches
from quality_stages import StageRun
from torch import Tensor
from tqdm import tqdm

from vae_scale import load
from vae_scale.data.images import Images
from vae_scale.errors import UserError
from vae_scale.evaluation.image_grids import to_uint8
from vae_scale.runtime import checkpoint
from vae_scale.runtime.launching import resolve_precision


class Model(Protocol):
    """A trained model; images are [b, 3, h, w] in [-1, 1]."""

    def sample(self, indices: range, row: Row, seed: int) -> Tensor:
        """Returns the samples with these indices."""

    def reconstruct(self, images: Tensor) -> Tensor:
        """Returns the reconstruction of each image."""


class TrainedRun:
    """The EMA weights of a run of `vae_scale.train`.

    Raises:
        UserError: The run has no checkpoint.
    """

    def __init__(self, run: Path) -> None:
        folder = checkpoint.newest_checkpoint(run)
        if folder is None:
            raise UserError(f"{run}: has no checkpoint")
        self.model = load(folder).to(DEVICE)

    def sample(self, indices: range, row: Row, seed: int) -> Tensor:
        """Samples from the prior of a row."""
        with torch.autocast(DEVICE, torch.bfloat16, enabled=resolve_precision("auto") == "bf16"):  # as `vae_scale.sample` does
            latents = self.model.sample_latents(indices, seed, prior=row.prior, sampling=row.sampling, batch_size=BATCH)
            return self.model.decode_batches(latents, BATCH)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Decodes the mean of the posterior of each image."""
        return self.model.reconstruct(images)


def load_model(run: StageRun, side: int) -> Model:
    """Loads the trained model of a stage, for images of `side` pixels."""
    return TrainedRun(run.folder) if run.stage.options else Pythae(run.folder, side)


@torch.inference_mode()
def sample_images(model: Model, row: Row, num: int, seed: int) -> Images:
    """Generates samples."""
    starts = tqdm(range(0, num, BATCH), "samples", unit=" batches", leave=False)
    return _stack(lambda start: model.sample(range(start, min(start + BATCH, num)), row, seed), starts)


@torch.inference_mode()
def reconstruct_images(model: Model, images: Images) -> Images:
    """Reconstructs images."""
    return _stack(model.reconstruct, tqdm(to_batches(images), "reconstructions", unit=" batches", leave=False))


def _stack(compute: Callable[..., Tensor], inputs: "tqdm") -> Images:  # type: ignore[type-arg]
    return torch.cat([to_uint8(compute(value)).cpu() for value in inputs]).numpy()
