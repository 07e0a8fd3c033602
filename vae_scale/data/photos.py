"""The demo data set: random crops of photographs from the scikit-image wheel."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vae_scale.data.images import Images
from vae_scale.data.packing import Source
from vae_scale.errors import UserError
from vae_scale.files import sha256_of
from vae_scale.randomness import derive_seed

PHOTOS = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "motorcycle": "motorcycle_left.png",
    "rocket": "rocket.jpg",
}
CROPS = {"train": 1_000, "unlabeled": 4_000, "test": 500}
SIDE = 96
MIN_SCALE, MAX_SCALE = 0.7, 1.0  # side of a crop relative to the photograph's shorter side


def open_photos(splits: list[str]) -> Source:
    """Opens the photographs of scikit-image. Crop i of a split shows photograph i modulo 5; its position depends on i alone.

    Raises:
        UserError: scikit-image is not installed, or a split does not exist.
    """
    if unknown := sorted(set(splits) - set(CROPS)):
        raise UserError(f"--splits {','.join(unknown)}: the photographs have {', '.join(CROPS)}")
    try:
        import skimage
    except ImportError:
        raise UserError("--source photos requires scikit-image's photographs: pip install scikit-image") from None
    paths = [Path(skimage.__file__).parent / "data" / name for name in PHOTOS.values()]
    photos = [Image.open(path).convert("RGB") for path in paths]
    return Source(
        splits=[
            _PhotoSplit(split, [-1 if split == "unlabeled" else n % len(photos) for n in range(CROPS[split])], photos)
            for split in splits
        ],
        class_names=list(PHOTOS),
        hashes={path.name: sha256_of(path) for path in paths},
    )


@dataclass
class _PhotoSplit:
    """The crops of one split as a `packing.Split`."""

    name: str
    labels: list[int]
    photos: list[Image.Image]
    shape: tuple[int, int, int] = (SIDE, SIDE, 3)

    def fetch(self, start: int, stop: int) -> range:
        return range(start, stop)

    def decode(self, raw: range) -> Images:
        return np.stack([self._crop(number) for number in raw])

    def _crop(self, number: int) -> Images:
        photo = self.photos[number % len(self.photos)]
        scale, x, y = np.random.Generator(np.random.Philox(key=derive_seed(self.name, number, "crop"))).random(3)
        side = min(photo.size) * (MIN_SCALE + (MAX_SCALE - MIN_SCALE) * scale)
        left, top = (photo.width - side) * x, (photo.height - side) * y
        box = (left, top, left + side, top + side)
        return np.asarray(photo.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=box))
