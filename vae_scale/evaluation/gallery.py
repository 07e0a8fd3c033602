"""Image grids of a model: images [n, 3, side, side] in [-1, 1] on the CPU, row by row."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vae_scale.data.images import PHOTO_FORMATS, center_crop_resize
from vae_scale.data.shards import ShardSet
from vae_scale.data.transfer import normalize_images
from vae_scale.errors import UserError
from vae_scale.evaluation.evaluator import iterate_batches
from vae_scale.evaluation.features import FeatureExtractor
from vae_scale.evaluation.image_grids import render_grid, to_uint8
from vae_scale.evaluation.neighbours import nearest_neighbours
from vae_scale.models.vae import VAE, slerp
from vae_scale.runtime.distributed import SINGLE_PROCESS

ROWS = 8  # rows of interpolations and traversals, columns of the grids written during training
PCA_SAMPLES = 512  # latents from which principal directions are computed
TRAVERSAL_RANGE = 2.5  # standard deviations to either side
NUM_NEIGHBOURS = 5
NUM_RECONSTRUCTIONS = 32  # images in the grid of reconstructions during training


def make_training_grids(model: VAE, shards: ShardSet, num_samples: int, seed: int) -> dict[str, Image.Image]:
    """Returns the pictures written during training by name. `num_samples` 0 omits the samples."""
    images = {"samples": model.sample(num_samples, seed)} if num_samples else {}
    images["reconstructions"] = reconstruct_pairs(model, shards, NUM_RECONSTRUCTIONS, NUM_RECONSTRUCTIONS)
    return {name: render_grid(grid, ROWS) for name, grid in images.items()}


def interpolate(model: VAE, latents: Tensor, steps: int, batch_size: int) -> Tensor:
    """Returns r spherical interpolations of `steps` images, from the first half of `latents` [2r, ...] to the second."""
    positions = torch.linspace(0, 1, steps).tolist()
    pairs = zip(*latents.chunk(2), strict=True)
    return model.decode_batches(torch.stack([slerp(first, last, t) for first, last in pairs for t in positions]), batch_size)


def traverse(model: VAE, sample_latents: Callable[[int], Tensor], steps: int, batch_size: int) -> Tensor:
    """Returns ROWS traversals of `steps` images through one sample, along the principal directions of the prior's latents."""
    latents = sample_latents(PCA_SAMPLES).flatten(1)
    singular_values, directions = torch.linalg.svd(latents - latents.mean(0), full_matrices=False)[1:]
    rows = min(ROWS, len(directions))
    deviations = singular_values[:rows] / len(latents) ** 0.5
    positions = torch.linspace(-TRAVERSAL_RANGE, TRAVERSAL_RANGE, steps)
    offsets = torch.einsum("s,r,rd->rsd", positions, deviations, directions[:rows])
    return model.decode_batches((latents[0] + offsets).reshape(-1, *model.latent_shape), batch_size)


def reconstruct_pairs(model: VAE, shards: ShardSet, images: int, batch_size: int) -> Tensor:
    """Returns the first images of a set, each followed by its reconstruction."""
    originals = normalize_images(torch.from_numpy(shards.load_images(np.arange(min(images, len(shards))))))
    device = next(model.parameters()).device
    with torch.inference_mode():
        reconstructions = [model.reconstruct(batch.to(device)).float().cpu() for batch in originals.split(batch_size)]
    return torch.stack([originals, torch.cat(reconstructions)], 1).flatten(0, 1)


def retrieve_neighbours(samples: Tensor, shards: ShardSet, extractor: FeatureExtractor, batch_size: int) -> Tensor:
    """Returns each sample followed by its NUM_NEIGHBOURS nearest images of a set in feature space, nearest first."""
    batches = iterate_batches(shards, len(shards), batch_size, SINGLE_PROCESS, torch.device("cpu"), progress="features")
    reference = torch.cat([extractor(images[weights > 0]) for _, images, weights in batches])
    features = torch.cat([extractor(to_uint8(part)) for part in samples.split(batch_size)])
    rows = nearest_neighbours(features, reference, min(NUM_NEIGHBOURS, len(shards)))
    neighbours = normalize_images(torch.from_numpy(shards.load_images(rows.flatten().numpy()))).unflatten(0, rows.shape)
    return torch.cat([samples[:, None], neighbours], 1).flatten(0, 1)


def encode_photos(model: VAE, paths: Sequence[Path]) -> Tensor:
    """Returns the posterior means, on the CPU, of photos cropped and resized to the model's resolution.

    Raises:
        UserError: if a file cannot be read as an image.
    """
    images = []
    for path in paths:
        try:
            images.append(center_crop_resize(path, model.resolution, PHOTO_FORMATS))
        except ValueError as error:
            raise UserError(f"{path}: cannot be read as an image ({error})") from None
    with torch.inference_mode():
        return model.encode(normalize_images(torch.from_numpy(np.stack(images)).to(next(model.parameters()).device))).mean.cpu()
