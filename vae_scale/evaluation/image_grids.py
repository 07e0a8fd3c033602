"""Images as PNG grids and GIF animations."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from vae_scale.data.images import Images


def to_uint8(images: Tensor) -> Images:
    """Converts [b, 3, h, w] in [-1, 1] to uint8 [b, h, w, 3] on the CPU."""
    levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)  # on the device: copies fewer bytes
    pixels: Images = np.ascontiguousarray(levels.permute(0, 2, 3, 1).cpu().numpy())
    return pixels


def render_grid(images: Tensor | Images, columns: int | None = None) -> Image.Image:
    """Arranges images, [b, 3, h, w] in [-1, 1] or uint8 [b, h, w, 3], in a grid; by default about square."""
    pixels = to_uint8(images) if isinstance(images, Tensor) else images
    columns = columns or round(len(pixels) ** 0.5)
    grid = make_grid(torch.from_numpy(pixels).permute(0, 3, 1, 2), columns, padding=2, pad_value=255)
    return Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy())


def save_grid(images: Tensor | Images, path: Path, columns: int | None = None) -> None:
    """Writes a grid of images (see `render_grid`) as a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    render_grid(images, columns).save(path)


def save_gif(frames: Sequence[Image.Image], path: Path, milliseconds: int) -> None:
    """Writes frames of equal size as a looping GIF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
