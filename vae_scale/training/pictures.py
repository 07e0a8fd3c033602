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
    levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)  # on the device: fewer bytes to copy
    pixels: Images = np.ascontiguousarray(levels.permute(0, 2, 3, 1).cpu().numpy())
    return pixels


def save_grid(images: Tensor | Images, path: Path, columns: int | None = None) -> None:
    """Writes images, [b, 3, h, w] in [-1, 1] or uint8 [b, h, w, 3], as one PNG, by default about as wide as high."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = to_uint8(images) if isinstance(images, Tensor) else images
    _grid(pixels, columns or round(len(pixels) ** 0.5)).save(path)


def animate_ways(ways: Tensor, path: Path) -> None:
    """Writes ways [r, steps, 3, h, w] as a GIF that goes along all of them at once, there and back."""
    frames = [_grid(to_uint8(step), round(len(ways) ** 0.5)) for step in ways.unbind(1)]
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


def _grid(images: Images, columns: int) -> Image.Image:
    grid = make_grid(torch.from_numpy(images).permute(0, 3, 1, 2), columns, padding=2, pad_value=255)
    return Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy())


def side_by_side(first: Tensor, second: Tensor) -> Tensor:
    """Each of `first` followed by its partner in `second`: [2b, 3, h, w]."""
    return torch.stack([first.float().cpu(), second.float().cpu()], 1).flatten(0, 1)
