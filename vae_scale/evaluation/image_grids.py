"""Images as PNG grids and GIF animations."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid


def to_uint8(images: Tensor) -> Tensor:
    """Converts [b, 3, h, w] in [-1, 1] to uint8 [b, h, w, 3]."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def render_grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """Arranges images, [b, 3, h, w] in [-1, 1] or uint8 [b, h, w, 3], in a grid; by default about square."""
    pixels = images if images.dtype == torch.uint8 else to_uint8(images)
    columns = columns or round(len(pixels) ** 0.5)
    grid = make_grid(pixels.permute(0, 3, 1, 2), columns, padding=2, pad_value=255)
    return Image.fromarray(grid.permute(1, 2, 0).contiguous().cpu().numpy())


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """Writes a grid of images (see `render_grid`) as a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    render_grid(images, columns).save(path)


def save_images(images: Tensor, folder: Path, first: int = 0) -> None:
    """Writes images, uint8 [b, h, w, 3], as `000000.png` etc., numbered from `first`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images.cpu().numpy(), first):
        Image.fromarray(image).save(folder / f"{number:06d}.png")


def save_gif(frames: Sequence[Image.Image], path: Path, milliseconds: int) -> None:
    """Writes frames of equal size as a looping GIF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
