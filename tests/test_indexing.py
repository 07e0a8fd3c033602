"""Indexing of existing WebDatasets."""

import io
import json
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from bad_server import Server
from commands import error_line
from conftest import discs
from PIL import Image

from vae_scale.data.cache import Cache
from vae_scale.data.images import Images
from vae_scale.data.shards import ShardSet
from vae_scale.data.stream import Stream
from vae_scale.pack import main


def encode(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    """Writes a tar in GNU format with owners and times, unlike a packed shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(content), 1_700_000_000, "somebody"
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def webdataset(tmp_path: Path) -> tuple[Path, Images]:
    """Twelve shards of 10 samples: folders in names, captions beside images, labels before or after images or missing."""
    images = discs(120, 5)
    for shard in range(12):
        members = {}
        for row in range(shard * 10, shard * 10 + 10):
            image, key = Image.fromarray(images[row]), f"part{shard}/{row:05d}"
            members[f"{key}.json"] = json.dumps({"caption": "a disc"}).encode()
            if row % 10 < 4:
                members[f"{key}.cls"] = str(row % 7).encode()
            members[f"{key}.{'jpg' if row % 2 else 'JPEG'}"] = encode(image, "JPEG")
            if 4 <= row % 10 < 8:
                members[f"{key}.cls"] = f"{row % 7}\n".encode()
        write_tar(tmp_path / "webdataset" / f"disc-{shard:03d}.tar", members)
    return tmp_path / "webdataset", images


def test_indexed_jpegs_are_streamed_with_labels(webdataset: tuple[Path, Images]) -> None:
    folder, images = webdataset
    main(["--index", f"{folder}/disc-{{000..011}}.tar"])
    shards = ShardSet.open(folder)
    assert shards.splits == {"train": 100, "test": 20}
    assert shards.image_shape == (96, 96, 3)
    assert shards.labels.tolist() == [row % 7 if row % 10 < 8 else -1 for row in range(120)]
    rows = []
    for batch in islice(Stream(shards, 24, seed=1, window=3), 5):
        assert np.abs(batch.images.numpy().astype(float) - images[batch.rows]).mean() < 6
        rows += batch.rows.tolist()
    assert sorted(rows) == list(range(120))
    main(["--verify", str(folder)])


def test_remote_shards_are_indexed_by_url(webdataset: tuple[Path, Images], tmp_path: Path) -> None:
    folder, images = webdataset
    server = Server(folder)
    try:
        server.faults["disc-002.tar"] = ["reset"]
        urls = f"train={server.url}/disc-{{000..002}}.tar?key=secret"
        main(["--index", urls, f"test={server.url}/disc-003.tar", "--out", str(tmp_path / "index")])
        assert server.requests["disc-002.tar"] == 2
        assert [path.name for path in (tmp_path / "index").iterdir()] == ["index.json"]
        shards = ShardSet.open(tmp_path / "index", Cache(tmp_path / "cache"))
        assert shards.splits == {"train": 30, "test": 10}
        for batch in islice(Stream(shards, 20, seed=1), 2):
            assert np.abs(batch.images.numpy().astype(float) - images[batch.rows]).mean() < 6
    finally:
        server.stop()


def test_sources_can_set_splits(webdataset: tuple[Path, Images]) -> None:
    folder, _ = webdataset
    main(["--index", f"train={folder}/disc-{{000..004}}.tar", f"train={folder}/disc-006.tar", f"test={folder}/disc-010.tar"])
    shards = ShardSet.open(folder)
    assert shards.splits == {"train": 60, "test": 10}
    assert [shard.url for shard in shards.select("test").shards] == ["disc-010.tar"]


def test_images_of_any_size_are_cropped_and_resized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes, members = [(96, 60), (50, 200), (96, 60), (64, 64)], {}
    for row, size in enumerate(sizes):
        members[f"{row}.png"] = encode(Image.fromarray(discs(1, row)[0]).resize(size), "PNG")
    write_tar(tmp_path / "a.tar", members)
    error = error_line(capsys, main, "--index", tmp_path / "a.tar")
    assert "a.tar: images have several sizes (96x60, 64x64, 50x200); use --resolution" in error
    assert not (tmp_path / "index.json").exists()
    main(["--index", str(tmp_path / "a.tar"), "--resolution=32"])
    shards = ShardSet.open(tmp_path)
    assert shards.image_shape == (32, 32, 3)
    images = shards.read(0)
    expected = Image.open(io.BytesIO(members["1.png"])).crop((0, 75, 50, 125)).resize((32, 32), Image.Resampling.LANCZOS)
    assert np.abs(images[1].astype(int) - np.asarray(expected)).max() <= 1


def truncate_tar(folder: Path) -> str:
    path = folder / "disc-003.tar"
    with tarfile.open(path) as tar:
        third = tar.getmembers()[9]
    path.write_bytes(path.read_bytes()[: third.offset])  # between two members, which tar tools do not detect
    return "disc-003.tar: has no end-of-archive marker"


def damage_image(folder: Path) -> str:
    images = {f"{row}.jpg": encode(Image.fromarray(discs(1, row)[0]), "JPEG") for row in range(3)}
    write_tar(folder / "disc-005.tar", images | {"1.jpg": images["1.jpg"][:500]})
    return "disc-005.tar: 1.jpg cannot be read"


def write_invalid_label(folder: Path) -> str:
    image = encode(Image.fromarray(discs(1, 0)[0]), "JPEG")
    write_tar(folder / "disc-005.tar", {"1.jpg": image, "1.cls": b"cat"})
    return "disc-005.tar: 1.cls cannot be read"


def remove_images(folder: Path) -> str:
    write_tar(folder / "disc-005.tar", {"1.txt": b"no image"})
    return "disc-005.tar: contains no images"


def repeat_sample(folder: Path) -> str:
    image = Image.fromarray(discs(1, 0)[0])
    write_tar(folder / "disc-005.tar", {"1.jpg": encode(image, "JPEG"), "1.png": encode(image, "PNG")})
    return "disc-005.tar: a sample has several images"


def remove_shard(folder: Path) -> str:
    (folder / "disc-007.tar").unlink()
    return "disc-007.tar: No such file"


def write_other_file(folder: Path) -> str:
    (folder / "disc-007.tar").write_bytes(b"x" * 2048)
    return "disc-007.tar: has no end-of-archive marker"


@pytest.mark.parametrize(
    "damage", [truncate_tar, damage_image, write_invalid_label, remove_images, repeat_sample, remove_shard, write_other_file]
)
def test_error_names_the_unusable_shard(
    webdataset: tuple[Path, Images],
    capsys: pytest.CaptureFixture[str],
    damage,  # type: ignore[no-untyped-def]
) -> None:
    folder, _ = webdataset
    text = damage(folder)
    assert text in error_line(capsys, main, "--index", f"{folder}/disc-{{000..011}}.tar")
    assert not (folder / "index.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["http://127.0.0.1:9/{0..3}.tar"], "--out DIR is missing"),
        (["ftp://host/x.tar", "--out=x"], "not one of http, https"),
        (["train=a.tar", "b.tar"], "give a split for all sources"),
        (["a.tar", "b/c.tar"], "files in several folders"),
        (["a.tar", "a.tar"], "a.tar is listed twice"),
        (["a/a.tar", "--out=elsewhere"], "omit --out or give their folder"),
    ],
)
def test_invalid_options_are_rejected(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_line(capsys, main, "--index", *options)
