"""Images as pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from vae_scale.data.images import Images
from vae_scale.errors import UserError


def to_uint8(images: Tensor) -> Images:
    """[b, 3, h, w] in [-1, 1] to uint8 [b, h, w, 3]."""
    levels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels: Images = np.ascontiguousarray(levels.permute(0, 2, 3, 1).numpy())
    return pixels


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """Writes images [b, 3, h, w] in [-1, 1] as one PNG, by default about as wide as high."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _grid(images, columns or round(len(images) ** 0.5)).save(path)


def animate_ways(ways: Tensor, path: Path) -> None:
    """Writes ways [r, steps, 3, h, w] as a GIF that goes along all of them at once, there and back."""
    frames = [_grid(step, round(len(ways) ** 0.5)) for step in ways.unbind(1)]
    _animate(frames + frames[-2:0:-1], path, milliseconds=120)


def animate_files(files: Sequence[Path], path: Path) -> None:
    """Writes pictures of one size as a GIF, one after the other.

    Raises:
        UserError: there are none.
    """
    if not files:
        raise UserError(f"--gif {path}: the run has no pictures in its folder samples yet")
    _animate([Image.open(file).convert("RGB") for file in files], path, milliseconds=500)


def _animate(frames: list[Image.Image], path: Path, milliseconds: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)


def _grid(images: Tensor, columns: int) -> Image.Image:
    return Image.fromarray(to_uint8(make_grid(images.float().cpu(), columns, padding=2, pad_value=1)[None])[0])


def side_by_side(first: Tensor, second: Tensor) -> Tensor:
    """Each of `first` followed by its partner in `second`: [2b, 3, h, w]."""
    return torch.stack([first.float().cpu(), second.float().cpu()], 1).flatten(0, 1)
