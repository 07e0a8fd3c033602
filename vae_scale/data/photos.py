"""The demonstration's photographs: crops of those that the scikit-image wheel ships, written as STL-10's binaries.

A crop is a random square of a photograph, most of its shorter side wide, as a hand-held camera would frame it.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from vae_scale.data.images import Images
from vae_scale.data.stl10 import SIDE, write_binaries
from vae_scale.errors import UserError
from vae_scale.randomness import key

PHOTOS = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "motorcycle": "motorcycle_left.png",
    "rocket": "rocket.jpg",
}
CROPS = {"train": 1_000, "unlabeled": 4_000, "test": 500}
SMALLEST, LARGEST = 0.7, 1.0  # side of a crop over the photograph's shorter side
CHUNK = 500


def write_photos(folder: Path) -> None:
    """Writes the crops into `folder` in the layout of STL-10's binaries, unless it is there; the same bytes every time.

    Raises:
        UserError: scikit-image is not installed.
    """
    if folder.exists():
        return
    try:
        import skimage
    except ImportError:
        raise UserError("--source photos needs scikit-image's photographs: pip install scikit-image") from None
    data = Path(skimage.__file__).parent / "data"
    photos = [Image.open(data / file).convert("RGB") for file in PHOTOS.values()]

    bar = tqdm(total=sum(CROPS.values()), unit=" crops", unit_scale=True, desc=f"cropping {len(photos)} photographs")

    def crops(split: str) -> Iterator[tuple[Images, list[int]]]:
        for begin in range(0, CROPS[split], CHUNK):
            numbers = range(begin, min(begin + CHUNK, CROPS[split]))
            labels = [number % len(photos) for number in numbers]
            yield np.stack([_crop(photos[number % len(photos)], split, number) for number in numbers]), labels
            bar.update(len(numbers))

    # Under a temporary name, so that an interruption leaves no half of it.
    temporary = folder.with_name(f".{folder.name}.tmp")
    with bar:
        write_binaries(temporary, {split: crops(split) for split in CROPS}, list(PHOTOS))
    temporary.replace(folder)


def _crop(photo: Image.Image, split: str, number: int) -> Images:
    draw = np.random.Generator(np.random.Philox(key=key(split, number, "crop"))).random(3)
    side = min(photo.size) * (SMALLEST + (LARGEST - SMALLEST) * draw[0])
    left, top = (photo.width - side) * draw[1], (photo.height - side) * draw[2]
    box = (left, top, left + side, top + side)
    return np.asarray(photo.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=box))
