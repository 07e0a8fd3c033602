"""Distributed sampling of images."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vae_scale.data.images import Images
from vae_scale.evaluation.image_grids import to_uint8
from vae_scale.models.vae import VAE
from vae_scale.runtime.compiling import compile_module, report_compilation
from vae_scale.runtime.distributed import SINGLE_PROCESS, DistContext

PROGRESS_DELAY = 3  # seconds before the progress bar is displayed


@torch.no_grad()
def sample_images(
    model: VAE,
    sample_latents: Callable[[range], Tensor],
    num: int,
    batch_size: int,
    keep: int,
    folder: Path | None = None,
    dist: DistContext = SINGLE_PROCESS,
    compiled: bool = False,
) -> Images | None:
    """Decodes samples 0..num-1 on all ranks. Only the first `keep` are held in memory.

    Args:
        model: In evaluation mode; `compiled` compiles its decoder and flow in place.
        sample_latents: Returns the latents of the samples with the given numbers.
        num: Number of samples.
        batch_size: Maximum number of samples per batch and rank.
        keep: Number of samples to return: uint8 [keep, h, w, 3], or None on ranks other than 0.
        folder: If given, each rank writes its samples here, one file per image.
        dist: The ranks that share the work.
        compiled: Whether to use torch.compile.
    """
    device = next(model.parameters()).device
    # Batches of equal size, with the least padding, are compiled only once.
    rounds = -(-num // (batch_size * dist.world_size))
    batch_size = -(-num // (rounds * dist.world_size))
    if compiled:
        for module in (model.decoder, model.flow):
            if module is not None:
                compile_module(module)
    bar = tqdm(total=num, unit=" images", unit_scale=True, desc="samples", delay=PROGRESS_DELAY, disable=dist.rank > 0)
    kept: list[Images] = []
    with bar, report_compilation(bar.set_postfix_str):
        for start in range(0, num, batch_size * dist.world_size):
            first = start + dist.rank * batch_size
            images = to_uint8(model.decode(sample_latents(range(first, first + batch_size)).to(device)))
            if folder:
                save_images(images[: max(0, num - first)], folder, first)
            if start < keep:
                gathered = dist.gather(torch.from_numpy(images).to(device))
                if not dist.rank:
                    kept.append(gathered.cpu().numpy())
            bar.update(min(batch_size * dist.world_size, num - start))
    return np.concatenate(kept)[:keep] if kept else None


def save_images(images: Images, folder: Path, first: int = 0) -> None:
    """Writes images, uint8 [b, h, w, 3], as `000000.png` etc., numbered from `first`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images, first):
        Image.fromarray(image).save(folder / f"{number:06d}.png")
