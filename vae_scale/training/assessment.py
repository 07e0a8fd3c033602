"""All that is told about a trained model: how it describes, reconstructs and resembles images."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from vae_scale.data.plan import Rows, evaluation_rows
from vae_scale.data.shards import ShardSet
from vae_scale.data.transfer import to_device
from vae_scale.metrics import cache
from vae_scale.metrics.features import Extractor
from vae_scale.metrics.frechet import Moments
from vae_scale.metrics.reconstruction import Perceptual, psnr, ssim
from vae_scale.models.vae import VAE
from vae_scale.randomness import noise_of_each
from vae_scale.training import pictures
from vae_scale.training.evaluation import ALONE, Processes, batches
from vae_scale.training.objective import bits_per_dim, to_model

ACTIVE = 0.01  # variance of a latent's posterior mean over images, above which it is in use (Burda et al., 2016, sec. 5.2)
Report = dict[str, float | list[float]]
Batch = tuple[Rows, npt.NDArray[np.float32]]  # of `evaluation_rows`


@torch.no_grad()
def describe(
    model: VAE,
    shards: ShardSet,
    images: int,
    batch: int,
    seed: int,
    importance: int = 0,
    extractor: Extractor | None = None,
    perceptual: Perceptual | None = None,
    processes: Processes = ALONE,
) -> tuple[Report, Moments | None]:
    """How well a model describes and reconstructs the first `images` of a set, whatever the batch and number of ranks.

    Args:
        model: In evaluation mode.
        shards: The images.
        images: How many, at most.
        batch: Images at a time and rank.
        seed: Keys the noise of each image.
        importance: Latents per image of the importance-weighted bound; 0 leaves it out.
        extractor: Describes the reconstructions.
        perceptual: A perceptual distance of reconstructions.
        processes: Those that share the work.

    Returns:
        Means over images, and the moments of the reconstructions' features. In nats per image: `nats` (the negative ELBO),
        `reconstruction_nats`, `kl_nats`, `kl_nats_per_channel` (per stochastic layer of a hierarchical model), and
        `importance_weighted_nats`, -log of the mean of w = p(image, latent) / q(latent | image) over `importance` latents,
        which comes down to -log p(image) as they become more (Burda et al., 2016, eq. 8). Where the likelihood is a
        density of images, `bits_per_dim` and `importance_weighted_bits_per_dim`. Of reconstructions from the posterior's
        mean, `psnr_db`, `ssim` and `lpips`. Besides, the latent numbers in use, `active_units`, of `latent_units`.
    """
    images, device = min(images, len(shards)), next(model.parameters()).device
    means = _Means()
    moments = Moments(extractor.dimensions, device) if extractor else None
    for numbers, pixels, weights in batches(shards, images, batch, processes, device, bar="reconstructions"):
        x = to_model(pixels)
        log_weights = []
        for draw in range(max(1, importance)):
            # The first is the noise of `evaluate`, so that a run's curves and this report agree.
            which = ("evaluation", draw) if draw else ("evaluation",)
            terms = model(x, to_device(noise_of_each(numbers, model.latent_shape, seed, *which), device))
            log_weights.append((terms.log_prob + terms.log_ratio).double())
            if draw == 0:
                means.add(weights, reconstruction=-terms.log_prob, kl=terms.kl)
        if importance:
            means.add(weights, bound=math.log(importance) - torch.stack(log_weights).logsumexp(0))
        latents = model.encode(x).mean.flatten(1).double()
        y = model.reconstruct(x).float().clamp(-1, 1)
        means.add(weights, latents=latents, squares=latents.square(), psnr_db=psnr(x, y), ssim=ssim(x, y))
        if perceptual:
            means.add(weights, lpips=perceptual(x, y))
        if extractor and moments:
            moments.add(extractor(_pixels(y, device)), weights)
    found = means.over(images, processes.add_up)
    kl, reconstruction = float(found["kl"].sum()), float(found["reconstruction"])
    active = found["squares"] - found["latents"].square() > ACTIVE
    bounds = {"": reconstruction + kl} | ({"importance_weighted_": float(found["bound"])} if importance else {})
    report: Report = {f"{name}nats": nats for name, nats in bounds.items()}
    if model.likelihood.normalised:
        report |= {f"{name}bits_per_dim": bits_per_dim(nats, model.dimensions) for name, nats in bounds.items()}
    report |= {"reconstruction_nats": reconstruction, "kl_nats": kl, "kl_nats_per_channel": found["kl"].tolist()}
    report |= {"active_units": int(active.sum()), "latent_units": len(active)}
    report |= {name: float(found[name]) for name in ("psnr_db", "ssim", "lpips") if name in found}
    return report, moments.pooled(processes.add_up) if moments else None


@torch.no_grad()
def reference_features(
    extractor: Extractor,
    shards: ShardSet,
    images: int,
    batch: int,
    processes: Processes = ALONE,
    device: torch.device | str = "cpu",
) -> Tensor | None:
    """Features of the first `images` of a set, fp32 [n, dimensions]: from the cache if they are there, else put there.

    Returns:
        Them, on the CPU; None on ranks other than 0.
    """
    images = min(images, len(shards))
    # Hashes of the shards rather than the fingerprint: they cannot be right for other pixels.
    content = hashlib.sha256(repr([shard.sha256 for shard in shards.shards]).encode()).hexdigest()
    path = cache.path_of(content, images, extractor.name)
    known = None if processes.rank else cache.read(path, (images, extractor.dimensions))
    if processes.add_up(torch.tensor(float(known is not None), device=device)):  # rank 0 decides for all
        return known
    found = batches(shards, images, batch, processes, torch.device(device), bar="reference")
    features = _collect(((extractor(pixels), weights) for _, pixels, weights in found), processes)
    if features is not None:
        cache.write(path, features)
    return features


@torch.no_grad()
def decoded_features(
    model: VAE,
    extractor: Extractor,
    draw: Callable[[range], Tensor],
    samples: int,
    batch: int,
    processes: Processes = ALONE,
) -> Tensor | None:
    """Features of samples 0..samples-1, fp32 [samples, dimensions]; ranks share them.

    Args:
        model: Decodes them.
        extractor: Describes them.
        draw: Latents of samples, by their numbers.
        samples: How many.
        batch: Samples at a time and rank.
        processes: Those that share the work.

    Returns:
        Them, on the CPU; None on ranks other than 0.
    """
    device = next(model.parameters()).device

    def found() -> Iterator[tuple[Tensor, Tensor]]:
        plan = evaluation_rows(samples, batch, processes.rank, processes.ranks)
        for rows, weights in tqdm(plan, "samples", unit=" batches", disable=processes.rank > 0):
            x = model.decode(draw(range(int(rows[0]), int(rows[0]) + batch)).to(device))
            yield extractor(_pixels(x, device)), to_device(weights, device)

    return _collect(found(), processes)


class _Means:
    """Means over images of any number of quantities, from weighted sums in fp64."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, weights: Tensor, **values: Tensor) -> None:
        """Counts values [b, ...] of a batch with weights [b]."""
        for name, value in values.items():
            total = torch.einsum("b,b...->...", weights.double(), value.double())
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def over(self, images: int, add_up: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The means over all ranks' `images` images."""
        return {name: add_up(total) / images for name, total in self._sums.items()}


def _collect(parts: Iterable[tuple[Tensor, Tensor]], processes: Processes) -> Tensor | None:
    """All ranks' features in the order of the images, without padding, on the CPU of rank 0; None elsewhere."""
    found = []
    for features, weights in parts:
        together, counted = processes.gather(features), processes.gather(weights) > 0
        if not processes.rank:
            found.append(together[counted].cpu())
    return torch.cat(found) if found else None


def _pixels(images: Tensor, device: torch.device) -> Tensor:
    """Images as they are written to files: uint8 [b, h, w, 3], from [b, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(pictures.to_uint8(images)).to(device)
