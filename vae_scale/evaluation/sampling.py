"""Distributed sampling of images."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from vae_scale.evaluation.image_grids import save_images, to_uint8
from vae_scale.models.vae import VAE
from vae_scale.runtime.compiling import compile_module, report_compilation
from vae_scale.runtime.distributed import SINGLE_PROCESS, DistContext

PROGRESS_DELAY = 3  # seconds before the progress bar is displayed


@torch.no_grad()
def iterate_samples(
    model: VAE,
    sample_latents: Callable[[range], Tensor],
    num: int,
    batch_size: int,
    dist: DistContext = SINGLE_PROCESS,
    compiled: bool = False,
) -> Iterator[tuple[int, Tensor]]:
    """Decodes samples 0..num-1 on all ranks.

    Args:
        model: In evaluation mode; `compiled` compiles its decoder and flow in place.
        sample_latents: Returns the latents of the samples with the given numbers.
        num: Number of samples.
        batch_size: Maximum number of samples per batch and rank.
        dist: The ranks that share the work.
        compiled: Whether to use torch.compile.

    Yields:
        For each batch of this rank: the number of its first sample, and the images, uint8 [b, h, w, 3]. All ranks have the same
        number of batches, all of one size; images with numbers of at least `num` are padding.
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
    with bar, report_compilation(bar.set_postfix_str):
        for start in range(0, num, batch_size * dist.world_size):
            first = start + dist.rank * batch_size
            yield first, to_uint8(model.decode(sample_latents(range(first, first + batch_size)).to(device)))
            bar.update(min(batch_size * dist.world_size, num - start))


def sample_images(
    model: VAE,
    sample_latents: Callable[[range], Tensor],
    num: int,
    batch_size: int,
    keep: int,
    folder: Path | None = None,
    dist: DistContext = SINGLE_PROCESS,
    compiled: bool = False,
) -> Tensor | None:
    """Decodes samples (see `iterate_samples`) and writes them to `folder`, if given, one file per image.

    Returns:
        The first `keep` samples, uint8 [keep, h, w, 3] on the CPU; None on ranks other than 0.
    """
    kept = []
    for first, images in iterate_samples(model, sample_latents, num, batch_size, dist, compiled):
        if folder:
            save_images(images[: max(0, num - first)], folder, first)
        if first - dist.rank * len(images) < keep:  # the same on all ranks
            gathered = dist.gather(images)
            if not dist.rank:
                kept.append(gathered.cpu())
    return torch.cat(kept)[:keep] if kept else None
