"""Features of reference images, kept from one evaluation to the next.

A file holds fp32 features and their sha256; one that is damaged counts as absent. Files can be deleted at any time.
"""

import contextlib
import hashlib
import os
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 1  # one more whenever the same images get other features


def path_of(*parts: str | int) -> Path:
    """The file for features of what `parts` name, in $XDG_CACHE_HOME/vae_scale or ~/.cache/vae_scale."""
    home = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(home) if home else Path.home() / ".cache") / "vae_scale"
    return folder / f"features-{hashlib.sha256(repr((FORMAT, *parts)).encode()).hexdigest()[:32]}.safetensors"


def read(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """The features in a file, fp32 [n, d]; None if it is absent, damaged or of another shape."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            features: Tensor = file.get_tensor("features")
            wanted = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        print(f"warning: {path} is made anew: {error}", file=sys.stderr, flush=True)
        return None
    if features.shape != shape or features.dtype != torch.float32 or _sha256(features) != wanted:
        print(f"warning: {path} is made anew: it is not what was written", file=sys.stderr, flush=True)
        return None
    return features


def write(path: Path, features: Tensor) -> None:
    """Writes features, fp32 [n, d]; the file is complete or absent. A cache that cannot be written is done without."""
    features = features.detach().cpu().contiguous()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": features}, temporary, {"sha256": _sha256(features)})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        print(f"warning: {path} is not kept: {error}", file=sys.stderr, flush=True)


def _sha256(features: Tensor) -> str:
    return hashlib.sha256(features.numpy().tobytes()).hexdigest()
