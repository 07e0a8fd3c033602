"""Packing: round trips, resuming, damaged sources and full disks."""

import hashlib
import io
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import skimage
import webdataset
from commands import error_line, hash_files, pack
from conftest import COUNTS, discs
from PIL import Image
from torchvision.datasets import STL10

from vae_scale.data.shard_file import SAVE_OPTIONS, write_shard
from vae_scale.data.shards import ShardSet
from vae_scale.errors import UserError
from vae_scale.pack import main


class UncheckedSTL10(STL10):
    """torchvision's reader without the md5 check, which only the official files pass."""

    def _check_integrity(self) -> bool:
        return True


@pytest.mark.parametrize("split", COUNTS)
def test_webdataset_reads_the_same_images_as_torchvision(binaries: Path, shards: Path, split: str) -> None:
    urls = [str(shards / shard.url) for shard in ShardSet.open(shards).select(split).shards]
    packed = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    expected = UncheckedSTL10(str(binaries.parent), split=split)
    assert len(packed) == len(expected) == COUNTS[split]
    for sample, (image, label) in zip(packed, expected, strict=True):
        assert sample["npy"].dtype == np.uint8
        assert np.array_equal(sample["npy"], np.asarray(image))
        assert sample["cls"] == label


def test_mapped_shard_is_an_array_of_images(shards: Path) -> None:
    shards = ShardSet.open(shards).select("train")
    images = np.concatenate([shards.read(number) for number in range(len(shards.shards))])
    assert np.array_equal(images, discs(COUNTS["train"], 0))
    assert shards.read(0).strides[0] == 29_696
    assert [label for shard in shards.shards for label in shard.labels] == [row % 10 for row in range(COUNTS["train"])]


def test_manifests_describe_the_shards(shards: Path) -> None:
    index = json.loads((shards / "index.json").read_text())
    assert index["__kind__"] == "wids-shard-index-v1"
    assert index["vae_scale"]["stride"] == 29_696
    assert index["vae_scale"]["offset"] == 1_664
    assert len(index["vae_scale"]["folds"]) == 10
    assert set(index["vae_scale"]["sources"]) == {"train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin", "unlabeled_X.bin"}
    for entry in index["shardlist"]:
        content = (shards / entry["url"]).read_bytes()
        assert entry["filesize"] == len(content)
        assert entry["md5sum"] == hashlib.md5(content).hexdigest()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert json.loads((shards / "sizes.json").read_text()) == {e["url"]: e["nsamples"] for e in index["shardlist"]}
    assert json.loads((shards / "_info.json").read_text())["splits"]["unlabeled"]["shard_lengths"] == [25, 25, 25, 15]


@pytest.mark.parametrize("encoding", ["npy", "png", "jpg", "webp"])
def test_bytes_do_not_depend_on_the_number_of_workers(binaries: Path, tmp_path: Path, encoding: str) -> None:
    for workers in (1, 3):
        options = (f"--encoding={encoding}", f"--workers={workers}", "--images-per-shard=8", "--limit=20")
        pack("--source=stl10", f"--data={binaries}", f"--out={tmp_path / str(workers)}", *options)
    assert hash_files(tmp_path / "1") == hash_files(tmp_path / "3")


@pytest.mark.parametrize(("encoding", "tolerance"), [("png", 0), ("jpg", 6), ("webp", 8)])
def test_compact_encodings_preserve_images(binaries: Path, tmp_path: Path, encoding: str, tolerance: float) -> None:
    pack("--source=stl10", f"--data={binaries}", f"--out={tmp_path}", f"--encoding={encoding}", "--splits=train")
    images = ShardSet.open(tmp_path).read(0)
    assert np.abs(images.astype(float) - discs(COUNTS["train"], 0)).mean() <= tolerance
    pack("--verify", tmp_path)


def test_complete_set_is_not_changed(binaries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--source=stl10", f"--data={binaries}", f"--out={tmp_path}", "--splits=train")
    pack(*options)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    capsys.readouterr()
    pack(*options)
    assert "already complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert "another source or other options" in error_line(capsys, main, *options, "--limit=5")


def test_resume_after_kill_gives_the_same_bytes(binaries: Path, tmp_path: Path) -> None:
    options = ["--source=stl10", f"--data={binaries}", "--images-per-shard=2", "--encoding=png"]
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-m", "vae_scale.pack", *options, f"--out={out}", "--workers=1"])
    while process.poll() is None and len(list(out.glob("*.tar"))) < 6:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert process.returncode == -signal.SIGKILL
    assert len(finished) >= 6
    assert not (out / "index.json").exists()
    recorded = len((out / ".packing.jsonl").read_text().splitlines()) - 1
    damaged = min(finished)
    damaged.write_bytes(damaged.read_bytes()[:-1])  # as after a crash of the machine
    pack(*options, f"--out={out}")
    pack(*options, f"--out={tmp_path / 'uninterrupted'}")
    assert hash_files(out) == hash_files(tmp_path / "uninterrupted")
    kept = [path for path in finished if path.stat().st_mtime_ns == finished[path]]
    assert len(kept) >= recorded - 1


def test_memory_is_bounded(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with (data / "unlabeled_X.bin").open("wb") as file:
        file.truncate(8_000 * 3 * 96 * 96)
    code = "import sys; from vae_scale.pack import main; main(sys.argv[1:]); print(open('/proc/self/status').read())"
    options = ["--source=stl10", f"--data={data}", f"--out={tmp_path / 'out'}", "--splits=unlabeled", "--workers=2"]
    run = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, check=True)
    peak = next(int(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("VmHWM"))
    assert peak < 350 * 1024  # KiB; two workers hold a shard of 30 MB twice


@pytest.mark.parametrize("encoding", ["npy", "png", "jpg", "webp"])
@pytest.mark.parametrize("shape", [(96, 96, 3), (5, 7, 3), (8, 48, 3)])
def test_shard_bytes_match_webdataset_tarwriter(tmp_path: Path, encoding: str, shape: tuple[int, int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, *shape), np.uint8)
    labels = [-1, 0, 9, 10, 99, 100, 12345, 7, -1]
    keys = [f"unlabeled-{99_995 + row:08d}" for row in range(9)]
    expected = io.BytesIO()
    writer = webdataset.TarWriter(expected, user="", group="", mode=0o444, mtime=0, encoder=False)
    for key, label, image in zip(keys, labels, images, strict=True):
        content = io.BytesIO()
        if encoding == "npy":
            np.save(content, image)
        else:
            Image.fromarray(image).save(content, **SAVE_OPTIONS[encoding])
        writer.write({"__key__": key, "cls": str(label).encode(), encoding: content.getvalue()})
    writer.close()
    for count in (9, 4, 9):  # a thread reuses the memory of its previous shard
        entry = write_shard(tmp_path / "shard.tar", keys[:count], labels[:count], images[:count], encoding)
    content = (tmp_path / "shard.tar").read_bytes()
    assert content == expected.getvalue()
    assert entry["filesize"] == len(content)
    assert entry["sha256"] == hashlib.sha256(content).hexdigest()


def test_full_disk_leaves_no_incomplete_file(binaries: Path, tmp_path: Path) -> None:
    # A limit on file sizes simulates a full disk: write() fails.
    code = "import sys; from vae_scale.pack import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "--source=stl10", f"--data={binaries}", f"--out={tmp_path}"]
    limit = (300_000, 300_000)
    run = subprocess.run(
        [*command, "--images-per-shard=25"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    error = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert "stl10-train-00000" in error[0]
    assert not list(tmp_path.glob("*.tar"))
    assert not list(tmp_path.glob(".*.tmp"))
    pack("--source=stl10", f"--data={binaries}", f"--out={tmp_path}", "--images-per-shard=25")
    assert len(ShardSet.open(tmp_path)) == sum(COUNTS.values())


def test_folder_of_photographs_is_cropped_and_labeled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(40):
        folder = tmp_path / "photos" / ("cats" if number % 2 else "dogs") / "deeper"
        folder.mkdir(parents=True, exist_ok=True)
        photo = np.zeros((50, 90, 3), np.uint8)
        photo[:, 20:70] = (200, 10 * (number % 20), 30)  # central square
        Image.fromarray(photo).save(folder / f"{number:03d} ü.png")
    options = ["--source=folder", f"--data={tmp_path / 'photos'}", f"--out={tmp_path / 'out'}"]
    pack(*options, "--resolution=32")
    shards = ShardSet.open(tmp_path / "out")
    assert shards.image_shape == (32, 32, 3)
    assert shards.class_names == ("cats", "dogs")
    assert set(shards.splits) == {"train", "test"}
    assert sum(shards.splits.values()) == 40
    # Resizing rings at the edges; all other pixels are from the central square.
    assert np.all(shards.read(0)[:, 4:-4, 4:-4, 0] == 200)
    assert "other options" in error_line(capsys, main, *options)


def test_split_folders_are_used_as_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(discs(1, number)[0]).save(tmp_path / "photos" / split / f"{number}.jpg")
    pack("--source=folder", f"--data={tmp_path / 'photos'}", f"--out={tmp_path / 'out'}")
    shards = ShardSet.open(tmp_path / "out")
    assert shards.splits == {"train": 3, "test": 3}
    assert shards.shards[0].labels == (-1, -1, -1)


def test_error_names_the_unreadable_photograph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(30):
        Image.fromarray(discs(1, number)[0]).save(tmp_path / f"{number}.png")
    broken = tmp_path / "7.png"
    broken.write_bytes(broken.read_bytes()[:400])
    assert "7.png" in error_line(
        capsys, main, "--source=folder", f"--data={tmp_path}", f"--out={tmp_path / 'out'}", "--splits=train"
    )
    assert not (tmp_path / "out" / "index.json").exists()


def test_shard_cut_at_a_member_is_rejected(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(shards, folder)
    damaged = folder / "stl10-train-000000.tar"
    damaged.write_bytes(damaged.read_bytes()[: 29_696 * 20])
    with pytest.raises(UserError, match=r"stl10-train-000000\.tar"):
        ShardSet.open(folder).select("train").read(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["vae_scale"].update(version=2), "format version 2"),
        (lambda index: index["shardlist"][0].update(url="../../etc/passwd"), "neither a file name nor a URL"),
        (lambda index: index["shardlist"][0].update(url="/etc/passwd"), "neither a file name nor a URL"),
        (lambda index: index["shardlist"][0].update(nsamples=10**12), "10000"),
        (lambda index: index["shardlist"][0].pop("sha256"), "sha256"),
        (lambda index: index["vae_scale"].update(image_shape=[10**9, 96, 3]), "image shape"),
        (lambda index: index.update(shardlist=[]), "no shards"),
        (lambda index: index.update(vae_scale=7), "damaged"),
    ],
)
def test_invalid_manifest_is_rejected(shards: Path, tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    index = json.loads((shards / "index.json").read_text())
    change(index)
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        ShardSet.open(tmp_path)


def test_demo_photographs_are_cropped_with_reproducible_bytes(tmp_path: Path) -> None:
    options = ("--source=photos", "--limit=7", "--images-per-shard=4")
    pack(*options, f"--out={tmp_path / 'out'}", "--workers=3")
    shards = ShardSet.open(tmp_path / "out")
    assert shards.splits == {"train": 7, "unlabeled": 7, "test": 7}
    assert shards.class_names == ("astronaut", "cat", "coffee", "motorcycle", "rocket")
    assert shards.select("train").labels.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert shards.select("unlabeled").labels.tolist() == [-1] * 7
    for part in (1, 2):
        pack(*options, f"--out={tmp_path / 'parts'}", f"--part={part}/2")
    pack("--merge", tmp_path / "parts")
    assert hash_files(tmp_path / "parts") == hash_files(tmp_path / "out")
    photo = Image.open(Path(skimage.__file__).parent / "data" / "chelsea.png")  # 451x300
    expected = np.asarray(photo.resize((451 * 96 // 300, 96))).mean((0, 1))
    assert np.abs(shards.select("train").read(0)[1].mean((0, 1)) - expected).max() < 30
    assert len({image.tobytes() for image in shards.load_images(np.arange(21))}) == 21


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--source=stl10"], "--out"),
        (["--source=stl10", "--out=x"], "--data"),
        (["--source=folder", "--out=x"], "--data"),
        (["--source=stl10", "--out=x", "--data=/nowhere"], "/nowhere"),
        (["--source=stl10", "--out=x", "--data=/nowhere", "--splits=trian"], "trian"),
        (["--source=stl10", "--out=x", "--data=/nowhere", "--resolution=64"], "--resolution"),
        (["--source=photos", "--out=x", "--workers=0"], "--workers"),
        (["--source=photos", "--out=x", "--data=/nowhere"], "--data /nowhere"),
        (["--source=photos", "--out=x", "--resolution=64"], "--resolution 64"),
        (["--source=photos", "--out=x", "--splits=train,valid"], "--splits valid"),
        (["--source=folder", "--out=x", "--data=/nowhere", "--splits=a/b"], "a/b"),
        (["--source=stl10", "--out=x", "--data=/nowhere", "--part=5/4"], "--part 5/4"),
        (["--source=stl10", "--out=x", "--data=/nowhere", "--part=0/4"], "--part 0/4"),
        (["--source=stl10", "--out=x", "--data=/nowhere", "--part=1/0"], "--part 1/0"),
        (["--source=stl10", "--out=x", "--data=/nowhere", "--part=x"], "--part x"),
        (["--merge=/nowhere", "--part=1/2"], "--part 1/2"),
        (["--merge=/nowhere"], "--merge /nowhere"),
        (["--merge=/nowhere", "--workers=0"], "--workers"),
        (["--inspect=/nowhere"], "index.json"),
        (["--verify=/nowhere"], "index.json"),
    ],
)
def test_user_errors_are_reported_in_one_line(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert message in error_line(capsys, main, *options)
