"""The methods that `quality.py` compares, and their trained models."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vae_scale.data.images import Images
from vae_scale.data.shards import ShardSet
from vae_scale.data.transfer import normalize_images
from vae_scale.errors import UserError
from vae_scale.evaluation.evaluator import evaluate
from vae_scale.models.vae import VAE
from vae_scale.runtime import checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 64  # batch size of evaluation


@dataclass(frozen=True)
class Stage:
    """One training run: `options` of `vae_scale.train`, or () for pythae's trainer; {folder} is the folder of the method."""

    name: str
    options: tuple[str, ...] = ()
    share: float = 1.0  # of the budget


@dataclass(frozen=True)
class Row:
    """A row of the table: samples from a prior of a stage."""

    name: str
    method: str
    prior: str
    stage: int = -1
    temperature: float = 1.0


NOTEBOOK = ("--config=configs/seed_notebook.yaml",)
RESNET = ("--config=configs/small.yaml",)
PRIOR = ("--config=configs/small_prior.yaml", "--prior.vae={folder}/vae")
HIERARCHICAL = ("--config=configs/small_hierarchical.yaml",)

METHODS: dict[str, tuple[Stage, ...]] = {
    "notebook": (Stage("vae", NOTEBOOK),),
    "resnet": (Stage("vae", RESNET, 0.35), Stage("flow", PRIOR, 0.65)),
    "pythae": (Stage("vae"),),
    "hierarchical": (Stage("vae", HIERARCHICAL),),
}
ROWS = (
    Row("seed notebook, N(0,I)", "notebook", "normal"),
    Row("pythae VAE, its GMM sampler", "pythae", "gmm"),
    Row("ResNet VAE, N(0,I)", "resnet", "normal", stage=0),
    Row("ResNet VAE, mixture", "resnet", "gmm", stage=0),
    Row("ResNet VAE, flow", "resnet", "flow"),
    Row("hierarchical VAE", "hierarchical", "normal"),
    Row("hierarchical VAE, temperature 0.8", "hierarchical", "normal", temperature=0.8),
)
PEERS = ("notebook", "pythae")


@dataclass(frozen=True)
class Study:
    """Settings common to all methods."""

    out: Path
    seed: int
    budget: float  # seconds
    jobs: int

    @property
    def shards(self) -> Path:
        return self.out / "shards"

    def folder(self, method: str, stage: int = -1) -> Path:
        """Returns the run folder of a stage, by default the last."""
        return self.out / method / METHODS[method][stage].name


class TrainedRun:
    """The EMA weights of a run, for images in [-1, 1]."""

    def __init__(self, run: Path) -> None:
        folder = checkpoint.newest_checkpoint(run)
        if folder is None:
            raise UserError(f"{run}: has no checkpoint")
        self.model = VAE.from_pretrained(folder, "ema.safetensors").to(DEVICE)

    def sample(self, num: int, row: Row, seed: int) -> Tensor:
        return self.model.sample(num, seed, row.temperature, BATCH, row.prior)  # type: ignore[arg-type]

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.model.reconstruct(images)

    def bits_per_dim(self, held_out: ShardSet, seed: int) -> float | None:
        return evaluate(self.model, held_out, len(held_out), BATCH, seed).get("bits_per_dim")


def batches(images: Images) -> list[Tensor]:
    """Returns batches in [-1, 1] on the device."""
    return [normalize_images(part).to(DEVICE) for part in torch.from_numpy(images).split(BATCH)]
