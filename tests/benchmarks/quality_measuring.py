"""Measures the samples of trained methods. Features and metrics are computed once and cached in the folder of the results."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from quality_methods import BATCH, DEVICE, HELD_OUT, Method, Row, training_splits
from quality_metrics import compare, nearest_distances, probability_nearer
from quality_models import load_model, reconstruct_images, sample_images
from quality_stages import StageRun, Study
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from vae_scale.data.images import Images
from vae_scale.data.shards import ShardSet
from vae_scale.data.transfer import normalize_images
from vae_scale.errors import UserError
from vae_scale.evaluation.features import FeatureExtractor, load_extractor
from vae_scale.evaluation.frechet import frechet_distance
from vae_scale.evaluation.reconstruction import psnr
from vae_scale.files import atomic_path, write_json

Features = Literal["efficientnet_lite0", "inception"]
MAX_SAMPLES = 10_000
NUM_PICTURED = 10  # samples of each row for the figure
SMALL_SIDE = 64  # larger images are also measured at this resolution
FLOOR_ROW = "training images"

Metrics = dict[str, float]
MetricsBySide = dict[str, Metrics]  # by resolution in pixels
Result = dict[str, Any]  # metrics of a row with one seed at one resolution


@dataclass(frozen=True)
class Reference:
    """Features of the held-out and of the training images, and distances of the held-out to the nearest training images."""

    held_out: Tensor
    train: Tensor
    distances: Tensor


class Measuring:
    """Measures images against the held-out images of a set.

    Args:
        study: The common settings.
        samples: Number of images of each kind; None for all held-out images, at most 10,000.
        features: The feature extractor.
        weights: File of its weights; None for the default.

    Raises:
        UserError: There are too few images.
    """

    def __init__(self, study: Study, samples: int | None, features: Features, weights: Path | None = None) -> None:
        self.study, self.feature_name, self.weights = study, features, weights
        held_out, train = study.shards.select(HELD_OUT), study.shards.select(*training_splits(study.shards))
        available = min(len(held_out), len(train))
        self.num = min(MAX_SAMPLES, available) if samples is None else samples
        if self.num > available:
            raise UserError(f"--samples {self.num:,}: there are only {available:,} held-out or training images")
        self.held_out, self.train = load_spread(held_out, self.num), load_spread(train, self.num)
        side = self.held_out.shape[1]
        self.sides = [side, SMALL_SIDE] if side > SMALL_SIDE else [side]

    @cached_property
    def _extractor(self) -> FeatureExtractor:
        return load_extractor(self.feature_name, DEVICE, self.weights)

    def extract_features(self, images: Images, name: str) -> Tensor:
        """Returns the features of images, fp32 [n, d] on the device; `name` is displayed."""
        parts = torch.from_numpy(images).split(BATCH)
        bar = tqdm(parts, f"features of {name}", unit=" batches", leave=False)
        return torch.cat([self._extractor(part.to(DEVICE)) for part in bar])

    @cache  # noqa: B019
    def reference(self, side: int) -> Reference:
        """Returns the features at a resolution."""

        def compute() -> dict[str, Tensor]:
            held_out = self.extract_features(resize(self.held_out, side), "held-out images")
            train = self.extract_features(resize(self.train, side), "training images")
            return {"held_out": held_out, "train": train, "distances": nearest_distances(held_out, train)}

        path = self.study.out / "features" / f"{self._key(side)}.safetensors"
        return Reference(**cache_tensors(path, compute))

    def measure_samples(self, row: Row, run: StageRun) -> tuple[MetricsBySide, Images]:
        """Returns the metrics of the samples of a row, and the first samples."""
        sampling = vars(row.sampling) if row.prior == "flow" else None
        key = self._key(run.hash, row.prior, sampling)
        path = self.study.out / "metrics" / f"{key}.json"

        def compute() -> MetricsBySide:
            images = sample_images(load_model(run, self.held_out.shape[1]), row, self.num, run.seed)
            metrics = {str(side): self._measure(resize(images, side), side, row.name) for side in self.sides}
            cache_tensors(path.with_suffix(".safetensors"), lambda: {"images": torch.from_numpy(images[:NUM_PICTURED].copy())})
            return metrics

        metrics = cache_json(path, compute)
        return metrics, load_file(path.with_suffix(".safetensors"))["images"].numpy()

    def _measure(self, images: Images, side: int, name: str) -> Metrics:
        reference, features = self.reference(side), self.extract_features(images, name)
        nearer = probability_nearer(nearest_distances(features, reference.train), reference.distances)
        return compare(features, reference.held_out) | {"nearer": nearer}

    def measure_reconstructions(self, run: StageRun) -> MetricsBySide:
        """Returns the metrics of the reconstructions of the held-out images by a VAE."""

        def compute() -> MetricsBySide:
            images = reconstruct_images(load_model(run, self.held_out.shape[1]), self.held_out)
            metrics = {}
            for side in self.sides:
                original, rebuilt = resize(self.held_out, side), resize(images, side)
                features = self.extract_features(rebuilt, "reconstructions")
                distance = frechet_distance(features, self.reference(side).held_out)
                metrics[str(side)] = {"psnr": mean_psnr(original, rebuilt), "rfd": distance}
            return metrics

        return cache_json(self.study.out / "metrics" / f"{self._key(run.hash, 'reconstructions')}.json", compute)

    def measure_floor(self) -> MetricsBySide:
        """Returns the metrics of the training images against the held-out images."""

        def compute() -> MetricsBySide:
            references = {str(side): self.reference(side) for side in self.sides}
            return {side: compare(reference.train, reference.held_out) for side, reference in references.items()}

        return cache_json(self.study.out / "metrics" / f"{self._key('training images')}.json", compute)

    def _key(self, *parts: Any) -> str:
        values = [self.study.shards.fingerprint, self.num, self.feature_name, *parts]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def measure_methods(
    measuring: Measuring, methods: list[Method], runs: dict[tuple[str, int], list[StageRun]]
) -> tuple[list[Result], list[tuple[str, Images]]]:
    """Returns the metrics of all rows, starting with the training images, and the images of the figure."""
    results = [
        {"name": FLOOR_ROW, "method": None, "seed": None, "side": int(side), **metrics}
        for side, metrics in measuring.measure_floor().items()
    ]
    # Images of a class are often adjacent.
    rows = np.linspace(0, measuring.num - 1, NUM_PICTURED).astype(np.int64)
    pictures = [("held-out images", measuring.held_out[rows])]
    tasks = [(method, seed, row) for method in methods for row in method.rows for name, seed in runs if name == method.name]
    with tqdm(tasks, "measuring", unit=" rows") as bar:
        for method, seed, row in bar:
            bar.set_postfix_str(row.name)
            stages = runs[method.name, seed][: row.stage + 1]
            try:
                metrics, images = measuring.measure_samples(row, stages[-1])
            except UserError as error:
                bar.write(f"{row.name}, seed {seed} is skipped: {error}")
                continue
            records = [record for stage in stages if (record := stage.record())]
            cost = {"images": sum(record["images"] for record in records)}
            cost["minutes"] = sum(record["seconds"] for record in records) / 60
            for side, reconstruction in measuring.measure_reconstructions(stages[0]).items():
                values = cost | reconstruction | metrics[side]
                results.append({"name": row.name, "method": method.name, "seed": seed, "side": int(side), **values})
            if seed == 0:
                pictures.append((row.name, images))
    return results, pictures


def load_spread(shards: ShardSet, num: int) -> Images:
    """Returns `num` images spread evenly over a set."""
    return shards.load_images(np.linspace(0, len(shards) - 1, num).astype(np.int64))


def resize(images: Images, side: int) -> Images:
    """Downscales images, uint8 [n, h, h, 3], to `side` pixels with antialiasing."""
    if images.shape[1] == side:
        return images
    parts = []
    for part in torch.from_numpy(images).permute(0, 3, 1, 2).split(BATCH):
        scaled = F.interpolate(part.float(), (side, side), mode="bicubic", antialias=True)
        parts.append(scaled.clamp(0, 255).round().to(torch.uint8))
    return torch.cat(parts).permute(0, 2, 3, 1).contiguous().numpy()


def mean_psnr(images: Images, others: Images) -> float:
    """Returns the mean PSNR in dB."""
    pairs = zip(torch.from_numpy(images).split(BATCH), torch.from_numpy(others).split(BATCH), strict=True)
    return float(torch.cat([psnr(normalize_images(first), normalize_images(second)) for first, second in pairs]).mean())


def cache_json(path: Path, compute: Callable[[], MetricsBySide]) -> MetricsBySide:
    """Returns the content of a file, which is computed and written if it is missing."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, compute())
    return json.loads(path.read_text())


def cache_tensors(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the tensors in a file, on the device; they are computed and written if it is missing."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in compute().items()}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary)
    return load_file(path, device=DEVICE)
