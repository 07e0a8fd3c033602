"""The demo data set: random crops of photographs from the scikit-image wheel, in the format of the STL-10 binaries."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from vae_scale.data.images import Images
from vae_scale.data.stl10 import SIDE, write_binaries
from vae_scale.errors import UserError
from vae_scale.randomness import derive_seed

PHOTOS = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "motorcycle": "motorcycle_left.png",
    "rocket": "rocket.jpg",
}
CROPS = {"train": 1_000, "unlabeled": 4_000, "test": 500}
MIN_SCALE, MAX_SCALE = 0.7, 1.0  # side of a crop relative to the photograph's shorter side
CHUNK = 500


def write_photos(folder: Path) -> None:
    """Writes the crops to `folder` unless it exists. The bytes are reproducible.

    Raises:
        UserError: scikit-image is not installed.
    """
    if folder.exists():
        return
    try:
        import skimage
    except ImportError:
        raise UserError("--source photos requires scikit-image's photographs: pip install scikit-image") from None
    photos = [Image.open(Path(skimage.__file__).parent / "data" / file).convert("RGB") for file in PHOTOS.values()]

    def make_crops(split: str) -> Iterator[tuple[Images, list[int]]]:
        for begin in range(0, CROPS[split], CHUNK):
            numbers = range(begin, min(begin + CHUNK, CROPS[split]))
            labels = [number % len(photos) for number in numbers]
            yield np.stack([_crop(photos[label], split, number) for number, label in zip(numbers, labels, strict=True)]), labels
            bar.update(len(numbers))

    temporary = folder.with_name(f".{folder.name}.tmp")  # an interrupted call leaves no incomplete folder
    with tqdm(total=sum(CROPS.values()), unit=" crops", unit_scale=True, desc=f"cropping {len(photos)} photographs") as bar:
        write_binaries(temporary, {split: make_crops(split) for split in CROPS}, list(PHOTOS))
    temporary.replace(folder)


def _crop(photo: Image.Image, split: str, number: int) -> Images:
    scale, x, y = np.random.Generator(np.random.Philox(key=derive_seed(split, number, "crop"))).random(3)
    side = min(photo.size) * (MIN_SCALE + (MAX_SCALE - MIN_SCALE) * scale)
    left, top = (photo.width - side) * x, (photo.height - side) * y
    box = (left, top, left + side, top + side)
    return np.asarray(photo.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=box))
