"""WebDatasets that somebody else made: read once, and then like our own."""

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

from vae_scale.data.images import Images
from vae_scale.data.shards import ShardSet
from vae_scale.data.storage import Cache
from vae_scale.data.stream import Stream
from vae_scale.pack import main


def told(capsys: pytest.CaptureFixture[str], *options: object) -> str:
    """The one line with which indexing refuses."""
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
    """As GNU tar does by default, with owners and times: not as we would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(content), 1_700_000_000, "somebody"
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def theirs(tmp_path: Path) -> tuple[Path, Images]:
    """Twelve shards of 10 samples: folders in names, captions beside images, labels before or after, some missing."""
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
        write_tar(tmp_path / "theirs" / f"disc-{shard:03d}.tar", members)
    return tmp_path / "theirs", pictures


def test_jpegs_with_labels_are_streamed_like_our_own(theirs: tuple[Path, Images]) -> None:
    folder, pictures = theirs
    main(["--index", f"{folder}/disc-{{000..011}}.tar"])
    found = ShardSet.open(folder)
    assert found.splits == {"train": 100, "test": 20}
    assert found.image_shape == (96, 96, 3)
    assert found.labels.tolist() == [row % 7 if row % 10 < 8 else -1 for row in range(120)]
    seen = []
    for batch in islice(Stream(found, 24, seed=1, window=3), 5):
        assert np.abs(batch.images.numpy().astype(float) - pictures[batch.rows]).mean() < 6
        seen += batch.rows.tolist()
    assert sorted(seen) == list(range(120))
    main(["--verify", str(folder)])


def test_shards_of_a_server_are_indexed_where_they_are(theirs: tuple[Path, Images], tmp_path: Path) -> None:
    folder, pictures = theirs
    server = Server(folder)
    try:
        server.faults["disc-002.tar"] = ["reset"]
        urls = f"train={server.url}/disc-{{000..002}}.tar?key=secret"
        main(["--index", urls, f"test={server.url}/disc-003.tar", "--out", str(tmp_path / "index")])
        assert server.requests["disc-002.tar"] == 2
        assert [path.name for path in (tmp_path / "index").iterdir()] == ["index.json"]
        found = ShardSet.open(tmp_path / "index", Cache(tmp_path / "cache"))
        assert found.splits == {"train": 30, "test": 10}
        for batch in islice(Stream(found, 20, seed=1), 2):
            assert np.abs(batch.images.numpy().astype(float) - pictures[batch.rows]).mean() < 6
    finally:
        server.stop()


def test_splits_are_named_by_the_user(theirs: tuple[Path, Images]) -> None:
    folder, _ = theirs
    main(["--index", f"train={folder}/disc-{{000..004}}.tar", f"train={folder}/disc-006.tar", f"test={folder}/disc-010.tar"])
    found = ShardSet.open(folder)
    assert found.splits == {"train": 60, "test": 10}
    assert [shard.url for shard in found.select("test").shards] == ["disc-010.tar"]


def test_images_of_any_size_are_cut_and_resized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes, members = [(96, 60), (50, 200), (96, 60), (64, 64)], {}
    for row, size in enumerate(sizes):
        members[f"{row}.png"] = encoded(Image.fromarray(discs(1, row)[0]).resize(size), "PNG")
    write_tar(tmp_path / "a.tar", members)
    assert "a.tar: images of 50x200, others of 96x60; give --resolution" in told(capsys, "--index", tmp_path / "a.tar")
    assert not (tmp_path / "index.json").exists()
    main(["--index", str(tmp_path / "a.tar"), "--resolution=32"])
    found = ShardSet.open(tmp_path)
    assert found.image_shape == (32, 32, 3)
    images = found.read(0)
    expected = Image.open(io.BytesIO(members["1.png"])).crop((0, 75, 50, 125)).resize((32, 32), Image.Resampling.LANCZOS)
    assert np.abs(images[1].astype(int) - np.asarray(expected)).max() <= 1


def break_end(folder: Path) -> str:
    path = folder / "disc-003.tar"
    with tarfile.open(path) as tar:
        third = tar.getmembers()[9]
    path.write_bytes(path.read_bytes()[: third.offset])  # between two members, where tar tools see nothing wrong
    return "disc-003.tar: it does not end as a tar does"


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
    return "disc-005.tar: a sample holds several images"


def break_file(folder: Path) -> str:
    (folder / "disc-007.tar").unlink()
    return "disc-007.tar: No such file"


def break_kind_of_file(folder: Path) -> str:
    (folder / "disc-007.tar").write_bytes(b"x" * 2048)
    return "disc-007.tar: it does not end as a tar does"


@pytest.mark.parametrize(
    "damage", [break_end, break_image, break_label, break_kind, break_sample, break_file, break_kind_of_file]
)
def test_what_cannot_be_used_is_named(
    theirs: tuple[Path, Images],
    capsys: pytest.CaptureFixture[str],
    damage,  # type: ignore[no-untyped-def]
) -> None:
    folder, _ = theirs
    text = damage(folder)
    assert text in told(capsys, "--index", f"{folder}/disc-{{000..011}}.tar")
    assert not (folder / "index.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["http://127.0.0.1:9/{0..3}.tar"], "--out DIR is missing"),
        (["pipe:cat x.tar"], "must be a file, or a URL"),
        (["ftp://host/x.tar"], "must be a file, or a URL"),
        (["train=a.tar", "b.tar"], "name the split of all sources"),
        (["a.tar", "b/c.tar"], "in several folders"),
        (["a.tar", "a.tar"], "a.tar is named twice"),
        (["a/a.tar", "--out=elsewhere"], "lies beside its shards"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in told(capsys, "--index", *options)
