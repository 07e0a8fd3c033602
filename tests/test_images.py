"""Decoding of images: all decoders give the same pixels, and damage is reported."""

import io
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import discs
from PIL import Image

from vae_scale.data import images
from vae_scale.data.images import Images, center_crop_resize, decode_image

PICTURE = Image.fromarray(discs(1, 3)[0])
OTHER = Image.fromarray(discs(1, 4)[0]).resize((120, 80))


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


FILES = {
    "jpeg": encoded(PICTURE, "JPEG", quality=95, subsampling=0),
    "subsampled jpeg": encoded(PICTURE, "JPEG"),
    "progressive jpeg": encoded(PICTURE, "JPEG", progressive=True),
    "grey jpeg": encoded(PICTURE.convert("L"), "JPEG"),
    "png": encoded(PICTURE, "PNG"),
    "png with a palette": encoded(PICTURE.convert("P"), "PNG"),
    "grey png": encoded(PICTURE.convert("L"), "PNG"),
    "transparent png": encoded(PICTURE.convert("RGBA"), "PNG"),
    "webp": encoded(PICTURE, "WEBP", quality=95),
    "lossless webp": encoded(PICTURE, "WEBP", lossless=True),
    "transparent webp": encoded(PICTURE.convert("RGBA"), "WEBP", lossless=True),
}


@pytest.fixture(params=["fast", "Pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], Images]:
    if request.param == "Pillow":
        monkeypatch.setattr(images, "_fast_decoders", dict)
    else:
        assert len(images._fast_decoders()) == 3

    def decoded(content: bytes) -> Images:
        out = np.zeros((96, 96, 3), np.uint8)
        decode_image(content, out)
        return out

    return decoded


@pytest.mark.parametrize("name", FILES)
def test_all_decoders_give_the_same_pixels(decoder: Callable[[bytes], Images], name: str) -> None:
    expected = np.asarray(Image.open(io.BytesIO(FILES[name])).convert("RGB"))
    assert np.array_equal(decoder(FILES[name]), expected)


@pytest.mark.parametrize("name", ["jpeg", "png", "webp"])
def test_truncated_file_is_rejected(decoder: Callable[[bytes], Images], name: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        decoder(FILES[name][:-200])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_unexpected_size_is_rejected(decoder: Callable[[bytes], Images], kind: str) -> None:
    with pytest.raises(ValueError, match="it is 120x80, not 96x96"):
        decoder(encoded(OTHER, kind))


@pytest.mark.parametrize("content", [b"", b"\xff\xd8 no JPEG", b"\x89PNG no PNG", b"GIF89a", encoded(PICTURE, "GIF")])
def test_other_content_is_rejected(decoder: Callable[[bytes], Images], content: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        decoder(content)


def test_decoding_is_thread_safe() -> None:
    mismatches = []

    def work(content: bytes) -> None:
        out, first = np.zeros((96, 96, 3), np.uint8), np.zeros((96, 96, 3), np.uint8)
        decode_image(content, first)
        for _ in range(50):
            decode_image(content, out)
            mismatches.extend([content] if not np.array_equal(out, first) else [])

    threads = [threading.Thread(target=work, args=(content,)) for content in FILES.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not mismatches


def test_center_crop_applies_exif_orientation(tmp_path: Path) -> None:
    picture = np.zeros((60, 100, 3), np.uint8)
    picture[:, 20:80] = (0, 200, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(picture).rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    image = center_crop_resize(tmp_path / "turned.png", 32)
    assert image.shape == (32, 32, 3)
    assert np.all(image[4:-4, 4:-4] == (0, 200, 0))
