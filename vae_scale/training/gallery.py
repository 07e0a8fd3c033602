"""Pictures of what a model does: each function gives images [n, 3, side, side] in [-1, 1] on the CPU, row by row."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vae_scale.data.images import PHOTOGRAPHS, opened
from vae_scale.data.shards import ShardSet
from vae_scale.errors import UserError
from vae_scale.metrics.features import Extractor
from vae_scale.metrics.neighbours import nearest
from vae_scale.models.vae import VAE, slerp
from vae_scale.training import pictures
from vae_scale.training.evaluation import ALONE, batches
from vae_scale.training.objective import to_model

ROWS = 8
DIRECTIONS_FROM = 512  # latents whose principal directions are found
REACH = 2.5  # deviations to either side of a traversal
NEIGHBOURS = 5
PICTURED = 32  # held-out images shown while training
Draw = Callable[[int], Tensor]  # latents of the prior: so many


def progress(model: VAE, shards: ShardSet, samples: int, seed: int) -> dict[str, tuple[Tensor, int | None]]:
    """What shows how training gets on, by name: images, and how many of them make a row.

    Args:
        model: In evaluation mode.
        shards: Held-out images.
        samples: How many to draw, from the best prior there is; 0 for none.
        seed: Of the samples.
    """
    drawn: dict[str, tuple[Tensor, int | None]] = {}
    if samples:
        drawn["samples"] = model.sample(samples, seed), None
    return drawn | {"reconstructions": (reconstructions(model, shards, PICTURED, PICTURED), ROWS)}


def interpolations(model: VAE, latents: Tensor, steps: int, batch: int) -> Tensor:
    """Ways of `steps` images each from the first half of `latents` [2r, ...] to the second, along great circles."""
    ways = torch.linspace(0, 1, steps)
    pairs = zip(*latents.chunk(2), strict=True)
    return model.decode_all(torch.stack([slerp(first, last, float(way)) for first, last in pairs for way in ways]), batch)


def traversals(model: VAE, draw: Draw, steps: int, batch: int) -> Tensor:
    """ROWS ways of `steps` images each through one sample, along the directions in which the prior's latents differ most."""
    latents = draw(DIRECTIONS_FROM).flatten(1)
    spread, directions = torch.linalg.svd(latents - latents.mean(0), full_matrices=False)[1:]
    rows = min(ROWS, len(directions))
    deviations = spread[:rows] / len(latents) ** 0.5
    ways = torch.linspace(-REACH, REACH, steps)
    moved = torch.einsum("s,r,rd->rsd", ways, deviations, directions[:rows])
    return model.decode_all((latents[0] + moved).reshape(-1, *model.latent_shape), batch)


def reconstructions(model: VAE, shards: ShardSet, images: int, batch: int) -> Tensor:
    """The first images of a set, each followed by its reconstruction."""
    originals = to_model(torch.from_numpy(shards.images(np.arange(min(images, len(shards))))))
    device = next(model.parameters()).device
    with torch.inference_mode():
        parts = [model.reconstruct(part.to(device)).cpu() for part in originals.split(batch)]
    return pictures.side_by_side(originals, torch.cat(parts))


def neighbours(samples: Tensor, shards: ShardSet, extractor: Extractor, batch: int) -> Tensor:
    """Each sample followed by the NEIGHBOURS images of a set that are nearest to it in features, the nearest first."""
    everything = batches(shards, len(shards), batch, ALONE, torch.device("cpu"), bar="features")
    parts = [extractor(images[weights > 0]) for _, images, weights in everything]
    features = torch.cat([extractor(torch.from_numpy(pictures.to_uint8(part))) for part in samples.split(batch)])
    found = nearest(features, torch.cat(parts), min(NEIGHBOURS, len(shards)))
    near = to_model(torch.from_numpy(shards.images(found.flatten().cpu().numpy()))).unflatten(0, found.shape)
    return torch.cat([samples[:, None], near], 1).flatten(0, 1)


def encode_photographs(model: VAE, paths: Sequence[Path]) -> Tensor:
    """Latents, the posteriors' means, of photographs cut square and brought to the model's size.

    Raises:
        UserError: naming a file that is not an image.
    """
    side = model.resolution
    images = np.empty((len(paths), side, side, 3), np.uint8)
    for image, path in zip(images, paths, strict=True):
        try:
            with opened(path, PHOTOGRAPHS) as photograph:
                picture = photograph.convert("RGB")
        except ValueError as error:
            raise UserError(f"{path}: cannot be read as an image ({error})") from None
        edge = min(picture.size)
        left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
        square = picture.crop((left, top, left + edge, top + edge))
        image[:] = np.asarray(square.resize((side, side), Image.Resampling.LANCZOS))
    with torch.inference_mode():
        return model.encode(to_model(torch.from_numpy(images).to(next(model.parameters()).device))).mean.cpu()
