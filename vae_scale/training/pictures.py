"""Images as pictures."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from vae_scale.data.shards import Images


def to_uint8(images: Tensor) -> Images:
    """[b, 3, h, w] in [-1, 1] to uint8 [b, h, w, 3]."""
    levels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels: Images = np.ascontiguousarray(levels.permute(0, 2, 3, 1).numpy())
    return pixels


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """Writes images [b, 3, h, w] in [-1, 1] as one PNG, by default about as wide as high."""
    grid = make_grid(images.float().cpu(), columns or round(len(images) ** 0.5), padding=2, pad_value=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(to_uint8(grid[None])[0]).save(path)


def side_by_side(first: Tensor, second: Tensor) -> Tensor:
    """Each of `first` followed by its partner in `second`: [2b, 3, h, w]."""
    return torch.stack([first.float().cpu(), second.float().cpu()], 1).flatten(0, 1)
