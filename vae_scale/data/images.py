"""Encoded images to pixels."""

import contextlib
import functools
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

Images = npt.NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow knows many more, of which few are safe to take from strangers


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
            except (RuntimeError, ValueError):
                pass  # Pillow finds out why
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if (image.height, image.width) != out.shape[:2]:
                raise ValueError(f"it is {image.width}x{image.height}, not {out.shape[1]}x{out.shape[0]}")
            out[:] = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(str(error)) from None


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


def square(file: Path | BinaryIO, side: int) -> Images:
    """The middle square of a photograph, upright, as uint8 [side, side, 3].

    Raises:
        ValueError: it cannot be read as an image, or is too large to be one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                image.draft("RGB", (2 * side, 2 * side))  # lets JPEG decode at a fraction of its size
                upright = ImageOps.exif_transpose(image).convert("RGB")
                return np.asarray(ImageOps.fit(upright, (side, side), Image.Resampling.LANCZOS))
    except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(str(error)) from None
