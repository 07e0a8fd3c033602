"""The metrics with which `quality.py` compares methods."""

import json
from typing import Any

import numpy as np
import torch
from pythae_vae import Pythae
from quality_methods import BATCH, DEVICE, METHODS, ROWS, Study, TrainedRun, batches
from torch import Tensor
from tqdm import tqdm

from vae_scale.data.images import Images
from vae_scale.data.shards import ShardSet
from vae_scale.evaluation.features import load_extractor
from vae_scale.evaluation.frechet import frechet_distance
from vae_scale.evaluation.image_grids import to_uint8
from vae_scale.evaluation.reconstruction import psnr

NUM_PICTURED = 10  # samples of each row for the figure
Rows = list[dict[str, Any]]


class DistanceTo:
    """The Frechet distance to the held-out photographs, with features of EfficientNet-Lite0."""

    def __init__(self, held_out: Images) -> None:
        self.extractor = load_extractor("efficientnet_lite0", DEVICE)
        self.held_out = self._features(held_out)

    def _features(self, images: Images) -> Tensor:
        return torch.cat([self.extractor(part.to(DEVICE)) for part in torch.from_numpy(images).split(BATCH)])

    def __call__(self, images: Images) -> float:
        return frechet_distance(self._features(images), self.held_out)


@torch.inference_mode()
def measure(study: Study, methods: list[str]) -> tuple[Rows, list[tuple[str, Images]]]:
    """Returns the rows of the table, starting with the training photographs, and the images of the figure."""
    shards = ShardSet.open(study.shards)
    held_out_set, train_set = shards.select("test"), shards.select("train", "unlabeled")
    held_out = held_out_set.load_images(np.arange(len(held_out_set)))
    distance, count = DistanceTo(held_out), len(held_out)
    train_images = train_set.load_images(np.linspace(0, len(train_set) - 1, count).astype(np.int64))
    rows: Rows = [{"name": "training photographs", "method": None, "distance": distance(train_images)}]
    pictures = [("held-out photographs", held_out[:NUM_PICTURED])]
    for method in tqdm(methods, "evaluating"):
        folder = study.folder(method)
        model = Pythae(folder, held_out.shape[1]) if method == "pythae" else TrainedRun(folder)
        pairs = [(batch, model.reconstruct(batch)) for batch in batches(held_out)]
        reconstructions = torch.cat([to_uint8(rebuilt) for _, rebuilt in pairs]).cpu().numpy()
        measured = {
            "psnr": float(torch.cat([psnr(images, rebuilt) for images, rebuilt in pairs]).mean()),
            "bits_per_dim": model.bits_per_dim(held_out_set, study.seed),
            "distance_of_reconstructions": distance(reconstructions),
        }
        records = [json.loads((study.folder(method, n) / "stage.json").read_text()) for n in range(len(METHODS[method]))]
        for row in ROWS:
            if row.method == method:
                samples = to_uint8(model.sample(count, row, study.seed)).cpu().numpy()
                stages = records[: row.stage + 1] if row.stage >= 0 else records
                minutes = sum(stage["seconds"] for stage in stages) / 60
                cost = {"minutes": minutes, "images": sum(stage["images"] for stage in stages)}
                rows.append({"name": row.name, "method": method, **cost, **measured, "distance": distance(samples)})
                pictures.append((row.name, samples[:NUM_PICTURED]))
    if notebook := min_distance(rows, "notebook"):
        for row in rows:
            row["over_notebook"] = row["distance"] / notebook
    return rows, pictures


def min_distance(rows: Rows, *methods: str) -> float | None:
    """Returns the smallest distance of the given methods, or None."""
    return min((row["distance"] for row in rows if row["method"] in methods), default=None)
