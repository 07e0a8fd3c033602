"""Encoded images to pixels."""

import contextlib
import functools
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from vae_scale.errors import one_line

Images = npt.NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow knows many more, of which few are safe to take from strangers: EPS is a program
PHOTOGRAPHS = (*FORMATS, "BMP", "GIF", "TIFF")  # what may lie among a user's own
MOST_PIXELS = 90_000_000  # of an image that is decoded, so that a small file cannot fill the memory
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # of fewer pixels than that


def decode(content: bytes, out: Images) -> None:
    """Decodes a JPEG, PNG or WebP file into `out`, uint8 [H, W, 3].

    Pillow decodes all, but one image at a time, whatever the number of threads. simplejpeg and imagecodecs (the extra
    `compact`) give the same pixels, faster, and in parallel; what they refuse goes to Pillow.

    Raises:
        ValueError: it cannot be decoded, or is of another size.
    """
    for begin, fast in _fast_decoders().items():
        if content.startswith(begin):
            try:
                if fast(content, out).shape == out.shape:
                    return
            except Exception:
                pass  # Pillow finds out why
    with opened(io.BytesIO(content), FORMATS) as image:
        if (image.height, image.width) != out.shape[:2]:
            raise ValueError(f"it is {image.width}x{image.height}, not {out.shape[1]}x{out.shape[0]}")
        out[:] = np.asarray(image.convert("RGB"))


@contextlib.contextmanager
def opened(file: Path | BinaryIO, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """An image in one of some formats, not decoded yet; what goes wrong while it is worked with is told alike.

    Raises:
        ValueError: it cannot be read, or is too large.
    """
    try:
        with Image.open(file, formats=formats) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"it is {image.width}x{image.height}, more than {MOST_PIXELS:,} pixels")
            yield image
    except UnidentifiedImageError:
        raise ValueError(f"it is not one of {', '.join(formats)}") from None
    except Exception as error:  # whatever Pillow stumbles over in a damaged file
        raise ValueError(one_line(error) or type(error).__name__) from None


@functools.cache
def _fast_decoders() -> dict[bytes, Callable[[bytes, Images], Images]]:
    """Those that are installed, by how their files begin."""
    found: dict[bytes, Callable[[bytes, Images], Images]] = {}
    with contextlib.suppress(ImportError):
        import simplejpeg

        found[b"\xff\xd8"] = lambda content, out: simplejpeg.decode_jpeg(content, buffer=out)
    with contextlib.suppress(ImportError):
        import imagecodecs

        found[b"\x89PNG"] = lambda content, out: imagecodecs.png_decode(content, out=out)
        found[b"RIFF"] = lambda content, out: imagecodecs.webp_decode(content, out=out)
    return found


def square(file: Path | BinaryIO, side: int, formats: tuple[str, ...] = FORMATS) -> Images:
    """The middle square of a photograph, upright, as uint8 [side, side, 3].

    Raises:
        ValueError: it cannot be read as an image, or is too large to be one.
    """
    with opened(file, formats) as image:
        image.draft("RGB", (2 * side, 2 * side))  # lets JPEG decode at a fraction of its size
        upright = ImageOps.exif_transpose(image).convert("RGB")
        return np.asarray(ImageOps.fit(upright, (side, side), Image.Resampling.LANCZOS))
