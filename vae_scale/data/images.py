"""Decoding of image files."""

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
Rows = npt.NDArray[np.int64]  # indices of images in a set

FORMATS = ("JPEG", "PNG", "WEBP")  # accepted from untrusted shards; some of Pillow's other formats, such as EPS, are unsafe
PHOTO_FORMATS = (*FORMATS, "BMP", "GIF", "TIFF")  # accepted from the user's own files
MAX_PIXELS = 90_000_000  # limits the memory for decoding a small file
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS is checked instead


def decode_image(content: bytes, out: Images) -> None:
    """Decodes a JPEG, PNG or WebP file into `out`, uint8 [H, W, 3].

    simplejpeg and imagecodecs (the extra `compact`) decode in parallel threads, unlike Pillow, with the same pixels. Pillow
    is used if they are not installed or fail.

    Raises:
        ValueError: The file cannot be decoded, or the image has another size.
    """
    for signature, decoder in _fast_decoders().items():
        if content.startswith(signature):
            try:
                if decoder(content, out).shape == out.shape:
                    return
            except Exception:
                pass  # Pillow decodes it, or reports the error
    with open_image(io.BytesIO(content), FORMATS) as image:
        if (image.height, image.width) != out.shape[:2]:
            raise ValueError(f"it is {image.width}x{image.height}, not {out.shape[1]}x{out.shape[0]}")
        out[:] = np.asarray(image.convert("RGB"))


@contextlib.contextmanager
def open_image(file: Path | BinaryIO, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """Opens an image in one of the given formats without decoding it. Exceptions in the block are converted, too.

    Raises:
        ValueError: The image cannot be read, or has more than MAX_PIXELS pixels.
    """
    try:
        with Image.open(file, formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it is {image.width}x{image.height}, more than {MAX_PIXELS:,} pixels")
            yield image
    except UnidentifiedImageError:
        raise ValueError(f"it is not one of {', '.join(formats)}") from None
    except Exception as error:  # Pillow raises many types for damaged files
        raise ValueError(one_line(error) or type(error).__name__) from None


@functools.cache
def _fast_decoders() -> dict[bytes, Callable[[bytes, Images], Images]]:
    """Returns the installed decoders by file signature."""
    decoders: dict[bytes, Callable[[bytes, Images], Images]] = {}
    with contextlib.suppress(ImportError):
        import simplejpeg

        decoders[b"\xff\xd8"] = lambda content, out: simplejpeg.decode_jpeg(content, buffer=out)
    with contextlib.suppress(ImportError):
        import imagecodecs

        decoders[b"\x89PNG"] = lambda content, out: imagecodecs.png_decode(content, out=out)
        decoders[b"RIFF"] = lambda content, out: imagecodecs.webp_decode(content, out=out)
    return decoders


def center_crop_resize(file: Path | BinaryIO, size: int, formats: tuple[str, ...] = FORMATS) -> Images:
    """Reads a photograph, applies its EXIF orientation, crops the central square and resizes it: uint8 [size, size, 3].

    Raises:
        ValueError: See `open_image`.
    """
    with open_image(file, formats) as image:
        image.draft("RGB", (2 * size, 2 * size))  # decodes JPEG at reduced size
        upright = ImageOps.exif_transpose(image).convert("RGB")
        return np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS))
