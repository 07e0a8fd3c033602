"""Evaluation of a model on held-out images."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vae_scale.data.plan import evaluation_rows
from vae_scale.data.reader import Reader
from vae_scale.data.shards import ShardSet
from vae_scale.data.transfer import normalize_images, to_device
from vae_scale.evaluation.image_grids import to_uint8
from vae_scale.evaluation.reconstruction import ImageDistance, psnr, ssim
from vae_scale.models.likelihoods import bits_per_dim
from vae_scale.models.vae import VAE
from vae_scale.randomness import per_sample_noise
from vae_scale.runtime.distributed import SINGLE_PROCESS, DistContext

ACTIVE_VARIANCE = 0.01  # threshold of active units (Burda et al., 2016, sec. 5.2)


@dataclass(frozen=True)
class ExtendedMetrics:
    """Options of the metrics that training does not compute.

    Attributes:
        importance_samples: Latents per image of the importance-weighted bound; 0 disables it.
        lpips: The LPIPS distance, if available.
        on_batch: Called with the images and the reconstructions of each batch, uint8 [b, h, w, 3], with padding at the end.
    """

    importance_samples: int = 0
    lpips: ImageDistance | None = None
    on_batch: Callable[[Tensor, Tensor], None] | None = None


def iterate_batches(
    shards: ShardSet,
    images: int,
    batch_size: int,
    dist: DistContext,
    device: torch.device,
    spread: bool = False,
    progress: str = "",
) -> Iterator[tuple[range, Tensor, Tensor]]:
    """Iterates over this rank's part of the first `images` of a set, or of `images` spread evenly over it.

    Yields:
        For each batch: the numbers of its images (padding of the last batch has numbers of at least `images`); the images,
        uint8 [batch_size, h, w, 3]; and weights [batch_size], 0 for padding and 1 otherwise. If `progress` is not empty, rank 0
        displays a progress bar with this name.
    """
    selected = np.linspace(0, len(shards) - 1, images).astype(np.int64) if spread else np.arange(images)
    plan = evaluation_rows(images, batch_size, dist.rank, dist.world_size)
    with Reader(shards) as reader:
        for step, (rows, weights) in enumerate(tqdm(plan, progress, unit=" batches", disable=not progress or dist.rank > 0)):
            dist.heartbeat(f"batch {step} of {images:,} images")
            upcoming = np.concatenate([rows for rows, _ in plan[step : step + 2]])
            reader.prefetch(np.unique(shards.shard_indices(selected[upcoming])).tolist())
            pixels = to_device(reader.gather(selected[rows]), device)
            yield range(int(rows[0]), int(rows[0]) + batch_size), pixels, to_device(weights, device)


@torch.no_grad()
def evaluate(
    model: VAE,
    shards: ShardSet,
    images: int,
    batch_size: int,
    seed: int,
    dist: DistContext = SINGLE_PROCESS,
    extended: ExtendedMetrics | None = None,
) -> dict[str, float | list[float]]:
    """Evaluates a model on the first `images` of a set. The result does not depend on batch size or number of ranks.

    Args:
        model: In evaluation mode.
        shards: The images.
        images: Maximum number of images.
        batch_size: Images per batch and rank.
        seed: Keys the noise of each image.
        dist: The ranks that share the work.
        extended: Enables metrics that require further passes through the network.

    Returns:
        Means over images. In nats per image: `neg_elbo` (the negative ELBO), its terms `reconstruction` and `kl`, and
        `kl_per_channel`; `bits_per_dim`; and `psnr` in dB, of the reconstruction from the sampled latent.

        With `extended`, `psnr`, `ssim` and `lpips` are of the reconstruction from the posterior mean; `active_units` is
        the number of active latent dimensions out of `latent_units`; `iwae_nll` (and `iwae_bits_per_dim`) is the
        importance-weighted bound -log mean(p(image, latent) / q(latent | image)), which decreases to -log p(image) as the
        number of latents increases (Burda et al., 2016, eq. 8).
    """
    images, device = min(images, len(shards)), next(model.parameters()).device
    samples = extended.importance_samples if extended else 0
    sums: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=device))

    def update(weights: Tensor, **values: Tensor) -> None:
        for name, value in values.items():
            sums[name] = sums[name] + torch.einsum("b,b...->...", weights.double(), value.double())

    batches = iterate_batches(shards, images, batch_size, dist, device, progress="reconstructions" if extended else "")
    for numbers, pixels, weights in batches:
        x = normalize_images(pixels)
        log_weights = []
        for sample in range(max(1, samples)):
            purpose = ("evaluation", sample) if sample else ("evaluation",)
            terms = model(x, to_device(per_sample_noise(numbers, model.latent_shape, seed, *purpose), device))
            log_weights.append((terms.log_prob + terms.log_ratio).double())
            if sample == 0:
                update(weights, reconstruction=-terms.log_prob, kl=terms.kl)
                output = terms.output
        if extended is None:
            update(weights, psnr=psnr(x, model.likelihood.mean(output)))
            continue
        if samples:
            update(weights, iwae_nll=math.log(samples) - torch.stack(log_weights).logsumexp(0))
        latents = model.encode(x).mean.flatten(1).double()
        y = model.reconstruct(x).float().clamp(-1, 1)
        update(weights, latents=latents, squares=latents.square(), psnr=psnr(x, y), ssim=ssim(x, y))
        if extended.lpips:
            update(weights, lpips=extended.lpips(x, y))
        if extended.on_batch:
            extended.on_batch(pixels, to_uint8(y))
    values = {name: dist.all_reduce_sum(total) / images for name, total in sums.items()}
    kl, reconstruction = values["kl"].tolist(), float(values["reconstruction"])
    nll = {"": reconstruction + sum(kl)} | ({"iwae_": float(values["iwae_nll"])} if samples else {})
    metrics: dict[str, float | list[float]] = {
        "neg_elbo": nll[""],
        "reconstruction": reconstruction,
        "kl": sum(kl),
        "kl_per_channel": kl,
    }
    metrics |= {name: float(values[name]) for name in ("iwae_nll", "psnr", "ssim", "lpips") if name in values}
    metrics |= {f"{prefix}bits_per_dim": bits_per_dim(nats, model.dimensions) for prefix, nats in nll.items()}
    if extended:
        active = values["squares"] - values["latents"].square() > ACTIVE_VARIANCE
        metrics |= {"active_units": int(active.sum()), "latent_units": len(active)}
    return metrics
