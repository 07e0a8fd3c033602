"""Indexing of existing WebDatasets."""

import io
import json
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from bad_server import Server
from conftest import discs
from PIL import Image

from vae_scale.data.cache import Cache
from vae_scale.data.images import Images
from vae_scale.data.shards import ShardSet
from vae_scale.data.stream import Stream
from vae_scale.pack import main


def error_line(capsys: pytest.CaptureFixture[str], *options: object) -> str:
    """Runs the command, which must fail, and returns its one-line error."""
    with pytest.raises(SystemExit) as caught:
        main([str(option) for option in options])
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def encoded(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
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
    pictures = discs(120, 5)
    for shard in range(12):
        members = {}
        for row in range(shard * 10, shard * 10 + 10):
            picture, key = Image.fromarray(pictures[row]), f"part{shard}/{row:05d}"
            members[f"{key}.json"] = json.dumps({"caption": "a disc"}).encode()
            if row % 10 < 4:
                members[f"{key}.cls"] = str(row % 7).encode()
            members[f"{key}.{'jpg' if row % 2 else 'JPEG'}"] = encoded(picture, "JPEG")
            if 4 <= row % 10 < 8:
                members[f"{key}.cls"] = f"{row % 7}\n".encode()
        write_tar(tmp_path / "webdataset" / f"disc-{shard:03d}.tar", members)
    return tmp_path / "webdataset", pictures


def test_indexed_jpegs_are_streamed_with_labels(webdataset: tuple[Path, Images]) -> None:
    folder, pictures = webdataset
    main(["--index", f"{folder}/disc-{{000..011}}.tar"])
    shards = ShardSet.open(folder)
    assert shards.splits == {"train": 100, "test": 20}
    assert shards.image_shape == (96, 96, 3)
    assert shards.labels.tolist() == [row % 7 if row % 10 < 8 else -1 for row in range(120)]
    rows = []
    for batch in islice(Stream(shards, 24, seed=1, window=3), 5):
        assert np.abs(batch.images.numpy().astype(float) - pictures[batch.rows]).mean() < 6
        rows += batch.rows.tolist()
    assert sorted(rows) == list(range(120))
    main(["--verify", str(folder)])


def test_remote_shards_are_indexed_by_url(webdataset: tuple[Path, Images], tmp_path: Path) -> None:
    folder, pictures = webdataset
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
            assert np.abs(batch.images.numpy().astype(float) - pictures[batch.rows]).mean() < 6
    finally:
        server.stop()


def test_sources_name_splits(webdataset: tuple[Path, Images]) -> None:
    folder, _ = webdataset
    main(["--index", f"train={folder}/disc-{{000..004}}.tar", f"train={folder}/disc-006.tar", f"test={folder}/disc-010.tar"])
    shards = ShardSet.open(folder)
    assert shards.splits == {"train": 60, "test": 10}
    assert [shard.url for shard in shards.select("test").shards] == ["disc-010.tar"]


def test_images_of_any_size_are_cropped_and_resized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes, members = [(96, 60), (50, 200), (96, 60), (64, 64)], {}
    for row, size in enumerate(sizes):
        members[f"{row}.png"] = encoded(Image.fromarray(discs(1, row)[0]).resize(size), "PNG")
    write_tar(tmp_path / "a.tar", members)
    assert "a.tar: images of 50x200, others of 96x60; give --resolution" in error_line(capsys, "--index", tmp_path / "a.tar")
    assert not (tmp_path / "index.json").exists()
    main(["--index", str(tmp_path / "a.tar"), "--resolution=32"])
    shards = ShardSet.open(tmp_path)
    assert shards.image_shape == (32, 32, 3)
    images = shards.read(0)
    expected = Image.open(io.BytesIO(members["1.png"])).crop((0, 75, 50, 125)).resize((32, 32), Image.Resampling.LANCZOS)
    assert np.abs(images[1].astype(int) - np.asarray(expected)).max() <= 1


def break_end(folder: Path) -> str:
    path = folder / "disc-003.tar"
    with tarfile.open(path) as tar:
        third = tar.getmembers()[9]
    path.write_bytes(path.read_bytes()[: third.offset])  # between two members, where tar tools see nothing wrong
    return "disc-003.tar: does not end as a tar does"


def break_image(folder: Path) -> str:
    pictures = {f"{row}.jpg": encoded(Image.fromarray(discs(1, row)[0]), "JPEG") for row in range(3)}
    write_tar(folder / "disc-005.tar", pictures | {"1.jpg": pictures["1.jpg"][:500]})
    return "disc-005.tar: 1.jpg cannot be read"


def break_label(folder: Path) -> str:
    picture = encoded(Image.fromarray(discs(1, 0)[0]), "JPEG")
    write_tar(folder / "disc-005.tar", {"1.jpg": picture, "1.cls": b"cat"})
    return "disc-005.tar: 1.cls cannot be read"


def break_kind(folder: Path) -> str:
    write_tar(folder / "disc-005.tar", {"1.txt": b"no image"})
    return "disc-005.tar: holds no image"


def break_sample(folder: Path) -> str:
    picture = Image.fromarray(discs(1, 0)[0])
    write_tar(folder / "disc-005.tar", {"1.jpg": encoded(picture, "JPEG"), "1.png": encoded(picture, "PNG")})
    return "disc-005.tar: a sample has several images"


def break_file(folder: Path) -> str:
    (folder / "disc-007.tar").unlink()
    return "disc-007.tar: No such file"


def break_kind_of_file(folder: Path) -> str:
    (folder / "disc-007.tar").write_bytes(b"x" * 2048)
    return "disc-007.tar: does not end as a tar does"


@pytest.mark.parametrize(
    "damage", [break_end, break_image, break_label, break_kind, break_sample, break_file, break_kind_of_file]
)
def test_unusable_shard_is_named(
    webdataset: tuple[Path, Images],
    capsys: pytest.CaptureFixture[str],
    damage,  # type: ignore[no-untyped-def]
) -> None:
    folder, _ = webdataset
    text = damage(folder)
    assert text in error_line(capsys, "--index", f"{folder}/disc-{{000..011}}.tar")
    assert not (folder / "index.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["http://127.0.0.1:9/{0..3}.tar"], "--out DIR is missing"),
        (["ftp://host/x.tar"], "must be a file, or a URL"),
        (["train=a.tar", "b.tar"], "name the split of all sources"),
        (["a.tar", "b/c.tar"], "in several folders"),
        (["a.tar", "a.tar"], "a.tar is named twice"),
        (["a/a.tar", "--out=elsewhere"], "must be beside its shards"),
    ],
)
def test_invalid_options_are_rejected(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_line(capsys, "--index", *options)
