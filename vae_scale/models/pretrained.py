"""Saving, loading and sharing models: folders and repositories of the Hugging Face Hub."""

import json
import math
from abc import ABC, abstractmethod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vae_scale.errors import UserError, one_line
from vae_scale.models.mixture import GaussianMixture

CONFIG, MIXTURE, GUIDE = "config.json", "mixture.safetensors", "guide.safetensors"
WEIGHTS, AVERAGED_WEIGHTS = "model.safetensors", "ema.safetensors"
FORMAT_VERSION = 4  # of config.json and of the parameters' names and meaning
MAX_SIZE = 2**16  # pixels, channels or blocks that config.json may describe


class PretrainedModel(nn.Module, ABC):
    """A model that is saved to and loaded from a folder or the Hugging Face Hub.

    Attributes:
        mixture: The learned Gaussian mixture prior, or None.
        flow: The learned flow prior, or None.
        guide: Earlier weights of the flow prior, or None.
        latent_shape: (c, h, w).
    """

    mixture: GaussianMixture | None
    flow: nn.Module | None
    guide: dict[str, Tensor] | None
    latent_shape: tuple[int, int, int]

    @abstractmethod
    def to_config(self) -> dict[str, object]:
        """Returns the content of `config.json`."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any], name: str) -> "PretrainedModel":
        """Builds an untrained model from the content of `config.json`; `name` is the file's name in error messages."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json`, `model.safetensors`, and the mixture prior and the guide of the flow if there are any."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(self.to_config(), indent=2))
        if self.mixture:
            save_file(vars(self.mixture), folder / MIXTURE)
        if self.guide:
            save_file({name: tensor.contiguous() for name, tensor in self.guide.items()}, folder / GUIDE)

    def push_to_hub(self, repo: str, private: bool = False) -> str:
        """Uploads the model to the repository `repo` of the Hugging Face Hub and returns its URL."""
        hub = HfApi()
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            url = hub.create_repo(repo, private=private, exist_ok=True)
            hub.upload_folder(repo_id=url.repo_id, folder_path=folder)
        return str(url)

    @classmethod
    def from_pretrained(cls, name: str | Path, weights: str | None = None) -> Self:
        """Loads a model on the CPU, in evaluation mode and channels_last memory.

        Args:
            name: Folder of a saved model or of a checkpoint, or a repository of the Hugging Face Hub. For a run, see
                `vae_scale.load`.
            weights: File of the weights. Defaults to `ema.safetensors`, the averaged weights of a checkpoint, where it
                exists, else `model.safetensors`.

        Raises:
            UserError: if there is no such model, if it is damaged, or if it is not a `cls`.
        """
        folder = _resolve_folder(name, weights)
        weights = weights or (AVERAGED_WEIGHTS if (folder / AVERAGED_WEIGHTS).is_file() else WEIGHTS)
        try:
            config = json.loads((folder / CONFIG).read_text("utf-8"))
            check_version(config, folder)
            state = load_file(folder / weights)
            with torch.device("meta"):  # sizes are checked before memory is allocated for them
                _check_shapes(cls.from_config(config, str(folder / CONFIG)), state)
            model = cls.from_config(config, str(folder / CONFIG))
            model.load_state_dict(state)
            if (folder / MIXTURE).is_file():
                model.mixture = GaussianMixture(**load_file(folder / MIXTURE))
                model.mixture.check(math.prod(model.latent_shape))
            if model.flow is not None and (folder / GUIDE).is_file():
                model.guide = load_file(folder / GUIDE)
                _check_shapes(model.flow, model.guide)
        except FileNotFoundError as error:
            raise UserError(f"{error.filename or folder / weights}: missing; give the folder of a model") from None
        except (LookupError, TypeError, ValueError, AttributeError, OSError, RuntimeError, SafetensorError) as error:
            reason = f"{type(error).__name__} {one_line(error):.300}"
            raise UserError(f"{folder}: not a model of vae_scale, or damaged ({reason})") from None
        if not isinstance(model, cls):
            raise UserError(f"{folder}: holds a {type(model).__name__}, not a {cls.__name__}")
        return model.eval().to(memory_format=torch.channels_last)


def check_version(config: Any, folder: Path) -> None:
    """Checks the format version in the content of `config.json`.

    Raises:
        UserError: if another version of vae_scale wrote it.
    """
    version = config.get("format_version", 1) if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{folder}: has format version {version!r:.20}, and this version of vae_scale reads {FORMAT_VERSION}: options and "
            "names have changed; train again in another folder, or install the version that wrote it"
        )


def positive_int(values: Any, name: str, maximum: int = MAX_SIZE) -> int:
    """Returns `values[name]` of an untrusted `config.json`.

    Raises:
        ValueError: if it is not an integer from 1 to `maximum`.
    """
    value = values[name]
    if type(value) is not int or not 0 < value <= maximum:
        raise ValueError(f"{name} is {value!r:.40}, not an integer from 1 to {maximum:,}")
    return value


def _resolve_folder(name: str | Path, weights: str | None) -> Path:
    """Returns the folder of a model, downloaded if `name` is a repository of the Hub."""
    if Path(name).is_dir():
        return Path(name)
    try:
        patterns = [CONFIG, MIXTURE, GUIDE, *([weights] if weights else [WEIGHTS, AVERAGED_WEIGHTS])]
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{name}: neither a folder nor a model on the Hub ({type(error).__name__})") from None


def _check_shapes(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Raises a ValueError that names the first tensor of `state` that does not fit `model`."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    actual = {name: tensor.shape for name, tensor in state.items()}
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            in_file, in_config = (list(shapes[name]) if name in shapes else "missing" for shapes in (actual, expected))
            raise ValueError(f"{name}: shape in the file is {in_file}, in the configuration {in_config}")
