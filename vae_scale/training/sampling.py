"""Any number of samples, drawn by all processes together."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vae_scale.data.images import Images
from vae_scale.models.vae import VAE
from vae_scale.training import compiling, pictures
from vae_scale.training.evaluation import ALONE, Processes

QUIET = 3  # seconds after which a progress bar appears


@torch.no_grad()
def draw_images(
    model: VAE,
    draw: Callable[[range], Tensor],
    num: int,
    batch: int,
    kept: int,
    folder: Path | None = None,
    processes: Processes = ALONE,
    compiled: bool = False,
) -> Images | None:
    """Samples 0..num-1: in each round every process draws one batch of them. Memory is taken for those that are kept only.

    Args:
        model: In evaluation mode; `compiled` compiles its decoder and its flow.
        draw: Latents of samples, by their numbers.
        num: How many.
        batch: Samples at a time and process, at most.
        kept: How many to return.
        folder: Where each process writes its samples, each as a file of its own; by default none is written.
        processes: Those that share the work.
        compiled: Whether to use torch.compile.

    Returns:
        The first `kept`, uint8 [kept, h, w, 3]; None on ranks other than 0.
    """
    device = next(model.parameters()).device
    # All batches have one size, or others would be compiled anew; it is chosen so that the fewest are drawn in vain.
    rounds = -(-num // (batch * processes.ranks))
    batch = -(-num // (rounds * processes.ranks))
    if compiled:
        for part in (model.decoder, model.flow):
            if part is not None:
                compiling.compile_module(part)
    bar = tqdm(total=num, unit=" images", unit_scale=True, desc="samples", delay=QUIET, disable=processes.rank > 0)
    found: list[Images] = []
    with bar, compiling.shown(bar.set_postfix_str):
        for start in range(0, num, batch * processes.ranks):
            first = start + processes.rank * batch
            images = pictures.to_uint8(model.decode(draw(range(first, first + batch)).to(device)))
            if folder:
                save_images(images[: max(0, num - first)], folder, first)
            if start < kept:
                together = processes.gather(torch.from_numpy(images).to(device))
                if not processes.rank:
                    found.append(together.cpu().numpy())
            bar.update(min(batch * processes.ranks, num - start))
    return np.concatenate(found)[:kept] if found else None


def save_images(images: Images, folder: Path, first: int = 0) -> None:
    """Writes images uint8 [b, h, w, 3] as the files `000000.png` and on, numbered from `first`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images, first):
        Image.fromarray(image).save(folder / f"{number:06d}.png")
