"""A whole set of images as latents, through the command."""

import hashlib
import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from conftest import COUNTS, TINY, discs

from launch import ACCELERATE, DDP, environment
from vae_scale.config import parse
from vae_scale.data.shards import ShardSet
from vae_scale.encode import main
from vae_scale.errors import UserError
from vae_scale.models.vae import VAE
from vae_scale.pack import main as pack
from vae_scale.training import checkpoint
from vae_scale.training.encoding import encode_shards
from vae_scale.training.evaluation import Processes
from vae_scale.training.latents import measure_latents
from vae_scale.training.objective import to_model
from vae_scale.training.trainer import train

KINDS = {
    "vector": ["--model.latent=vector"],
    "spatial": ["--model.latent=spatial"],
    "ladder": ["--model.preset=ladder", "--model.patch=8", "--model.width=8", "--model.blocks=1", "--model.latent_channels=2"],
}


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind of latents, trained for two steps."""
    root = tmp_path_factory.mktemp("runs")
    for kind, options in KINDS.items():
        words = [f"--data.shards={shards}", f"--run={root / kind}", *TINY, "--track.tracker=none", "--train.images=24"]
        train(parse([*words, *options, "--data.train=train,unlabeled", "--evaluate.images=12"])[0])
    return {kind: root / kind for kind in KINDS}


def load(run: Path) -> VAE:
    folder = checkpoint.newest(run)
    assert folder is not None
    return VAE.from_pretrained(folder, "ema.safetensors")


@pytest.fixture(scope="module")
def encoded(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The spatial latents, two images at a time."""
    out = tmp_path_factory.mktemp("encoded") / "deep" / "latents"
    main([f"--run={runs['spatial']}", f"--out={out}", "--batch=2"])
    return out


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "index.json").read_text())
    return found


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def arrays(folder: Path) -> list[np.ndarray]:
    """Each shard as the array that the manifest says it is."""
    ours = manifest(folder)["vae_scale"]
    shape, dtype, stride = ours["shape"], np.dtype(ours["dtype"]), ours["stride"]
    strides = (stride, *np.empty(shape, dtype).strides)
    return [
        np.ndarray((entry["nsamples"], *shape), dtype, (folder / entry["url"]).read_bytes(), ours["offset"], strides)
        for entry in manifest(folder)["shardlist"]
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_those_of_each_image_with_its_label_in_order(
    runs: dict[str, Path], shards: Path, kind: str, tmp_path: Path
) -> None:
    main([f"--run={runs[kind]}", f"--out={tmp_path}"])
    model, index = load(runs[kind]), manifest(tmp_path)
    assert index["vae_scale"]["shape"] == [2, *model.latent_shape]
    for seed, (split, count) in enumerate(COUNTS.items()):
        images = to_model(torch.from_numpy(discs(count, seed)))
        urls = [str(tmp_path / entry["url"]) for entry in index["shardlist"] if entry["split"] == split]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
        assert [sample["__key__"] for sample in samples] == [f"{split}-{row:08d}" for row in range(count)]
        assert [sample["cls"] for sample in samples] == [-1 if split == "unlabeled" else row % 10 for row in range(count)]
        found = torch.from_numpy(np.stack([sample["npy"] for sample in samples]))
        assert found.dtype == torch.float32
        with torch.no_grad():
            for row in range(0, count, 7):
                posterior = model.encode(images[row : row + 1])
                torch.testing.assert_close(found[row, 0], posterior.mean[0], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(found[row, 1], 2 * posterior.log_sigma[0], rtol=1e-4, atol=1e-5)
            decoded, wanted = model.decode(found[:5, 0]), model.reconstruct(images[:5])
            torch.testing.assert_close(decoded, wanted, rtol=1e-4, atol=1e-4)
    train_set = ShardSet.open(shards).select("train", "unlabeled")
    shift, scale = measure_latents(model, train_set, len(train_set), 30)
    assert index["vae_scale"]["measured_on"] == ["train", "unlabeled"]
    np.testing.assert_allclose(index["vae_scale"]["shift"], shift.flatten(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(index["vae_scale"]["scale"], scale.flatten(), rtol=1e-4)


def test_the_manifest_says_what_is_there_and_where_it_came_from(encoded: Path, shards: Path, runs: dict[str, Path]) -> None:
    index, source, folder = manifest(encoded), ShardSet.open(shards), checkpoint.newest(runs["spatial"])
    ours = index["vae_scale"]
    assert folder is not None
    assert index["__kind__"] == "wids-shard-index-v1"
    assert (ours["content"], ours["encoding"], ours["dtype"]) == ("latents", "npy", "<f4")
    assert ours["planes"] == ["mean", "log_variance"]
    assert (ours["source"], ours["splits"], ours["precision"]) == (source.fingerprint, source.splits, "fp32")
    assert tuple(ours["class_names"]) == source.class_names
    weights = hashlib.sha256((folder / "ema.safetensors").read_bytes()).hexdigest()
    assert ours["checkpoint"] == {"name": folder.name, "images_seen": 24, "weights": "ema.safetensors", "sha256": weights}
    wanted = {"format_version": 1, **{key: ours[key] for key in ("splits", "source", "checkpoint", "precision")}}
    assert ours["fingerprint"] == hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    assert [(entry["split"], entry["nsamples"], tuple(entry["labels"])) for entry in index["shardlist"]] == [
        (shard.split, shard.samples, shard.labels) for shard in source.shards
    ]
    for entry, array in zip(index["shardlist"], arrays(encoded), strict=True):
        content = (encoded / entry["url"]).read_bytes()
        assert len(content) == entry["filesize"]
        assert hashlib.md5(content).hexdigest() == entry["md5sum"]
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        assert hashlib.sha256(array.tobytes()).hexdigest() == entry["latents_sha256"]
    names = {"index.json", "sizes.json", "_info.json", *(entry["url"] for entry in index["shardlist"])}
    assert {path.name for path in encoded.iterdir()} == names  # and no notes


def test_latents_are_the_same_for_any_batch_and_number_of_processes(
    encoded: Path, runs: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    about = {key: manifest(encoded)["vae_scale"][key] for key in ("checkpoint", "precision")}
    with pytest.raises(UserError, match=r"train-000001\.tar: not there; all processes need the same folder"):
        encode_shards(load(runs["spatial"]), ShardSet.open(shards), tmp_path, 7, about, [], Processes(0, 2))
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    assert len(kept) == 5  # of nine: the share of the first of two

    words = [f"--run={runs['spatial']}", f"--out={tmp_path}"]
    launched = [*ACCELERATE, f"--config_file={DDP}", "--num_processes=2", "-m", "vae_scale.encode", *words]
    done = subprocess.run(launched, env=environment(), capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("latents of 180 images in 9 shards") == 1  # one process tells
    assert contents(tmp_path).keys() == contents(encoded).keys()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for found, wanted in zip(arrays(tmp_path), arrays(encoded), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    ours, theirs = manifest(tmp_path)["vae_scale"], manifest(encoded)["vae_scale"]
    assert ours["fingerprint"] == theirs["fingerprint"]
    np.testing.assert_allclose(ours["scale"], theirs["scale"], rtol=1e-5)


def test_a_killed_encode_carries_on_and_ends_with_the_same_bytes(encoded: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    words = [f"--run={runs['spatial']}", f"--out={tmp_path}", "--batch=2"]
    process = subprocess.Popen([sys.executable, "-m", "vae_scale.encode", *words], env=environment())
    while process.poll() is None and len(list(tmp_path.glob(".*.tar.json"))) < 2:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "index.json").exists()
    first, second = sorted(path for path in tmp_path.glob("*.tar") if (tmp_path / f".{path.name}.json").exists())[:2]
    kept = first.stat().st_mtime_ns
    content = bytearray(second.read_bytes())
    content[5000] ^= 1
    second.write_bytes(content)
    main(words)
    assert first.stat().st_mtime_ns == kept
    assert contents(tmp_path) == contents(encoded)


def test_a_complete_set_is_left_alone(encoded: Path, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in encoded.iterdir()}
    main([f"--run={runs['spatial']}", f"--out={encoded}", "--batch=3"])
    assert "already complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in encoded.iterdir()} == before


def test_some_splits_only_and_nothing_measured_where_none_was_trained_on(runs: dict[str, Path], tmp_path: Path) -> None:
    main([f"--run={runs['vector']}", f"--out={tmp_path}", "--splits=test"])
    ours = manifest(tmp_path)["vae_scale"]
    assert ours["splits"] == {"test": COUNTS["test"]}
    assert (ours["shift"], ours["scale"], ours["measured_on"]) == (None, None, [])


def test_bf16_is_near_fp32_and_said(encoded: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    main([f"--run={runs['spatial']}", f"--out={tmp_path}", "--splits=test", "--precision=bf16"])
    assert manifest(tmp_path)["vae_scale"]["precision"] == "bf16"
    found = np.concatenate(arrays(tmp_path))
    of_test = [entry["split"] == "test" for entry in manifest(encoded)["shardlist"]]
    exact = np.concatenate([array for array, wanted in zip(arrays(encoded), of_test, strict=True) if wanted])
    assert 0 < np.abs(found - exact).max() < 0.05 * np.abs(exact).max()


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """The one line with which the command refuses."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error:")
    assert error.count("\n") == 1
    return error


def test_mistakes_are_told_in_one_line(
    encoded: Path, runs: dict[str, Path], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = f"--run={runs['spatial']}", f"--out={tmp_path / 'out'}"
    (tmp_path / "file").write_text("")
    assert "--run /nowhere" in refused(capsys, ["--run=/nowhere", out])
    assert "--batch" in refused(capsys, [run, out, "--batch=0"])
    assert "is a file" in refused(capsys, [run, f"--out={tmp_path / 'file'}"])
    assert "/nowhere" in refused(capsys, [run, out, "--shards=/nowhere"])
    assert "no split 'best'" in refused(capsys, [run, out, "--splits=train,best"])
    assert "another checkpoint" in refused(capsys, [f"--run={runs['vector']}", f"--out={encoded}"])
    assert "another checkpoint or options" in refused(capsys, [run, f"--out={encoded}", "--splits=train"])
    assert "holds a complete set of images" in refused(capsys, [run, f"--out={shards}"])
    assert "holds latents, not images" in refused(capsys, [run, out, f"--shards={encoded}"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="holds latents, not images"):
        ShardSet.open(encoded)


def test_interrupted_work_of_another_kind_is_not_carried_on(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".latents-train-000000.tar.json").write_text('{"fingerprint": "other", "url": "latents-train-000000.tar"}')
    assert "interrupted work of another" in refused(capsys, [f"--run={runs['vector']}", f"--out={tmp_path}"])


def test_images_of_another_size_are_refused(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for split in ("train", "test"):
        (tmp_path / "images" / split).mkdir(parents=True)
        Image.fromarray(discs(1, 0)[0]).save(tmp_path / "images" / split / "disc.png")
    pack(["--source=folder", f"--data={tmp_path / 'images'}", f"--out={tmp_path / 'small'}", "--resolution=32"])
    capsys.readouterr()
    words = [f"--run={runs['vector']}", f"--shards={tmp_path / 'small'}", f"--out={tmp_path / 'out'}"]
    assert "images of 32x32, the model's are 96 a side" in refused(capsys, words)


def test_a_manifest_cannot_name_files_outside_the_folder(shards: Path, tmp_path: Path, runs: dict[str, Path]) -> None:
    index = manifest(shards)
    for entry in index["shardlist"]:
        entry["split"] = "../outside"
        (tmp_path / entry["url"]).symlink_to(shards / entry["url"])
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="a name has letters"):
        encode_shards(load(runs["vector"]), ShardSet.open(tmp_path), tmp_path / "out" / "deep", 10, {}, [])


def test_latents_that_are_not_finite_are_refused(shards: Path, tmp_path: Path, runs: dict[str, Path]) -> None:
    model = load(runs["vector"])
    with torch.no_grad():
        next(model.encoder.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match=r"train-000000\.tar: a latent is not finite"):
        encode_shards(model, ShardSet.open(shards), tmp_path, 10, {}, [])
    assert not list(tmp_path.iterdir())


def test_the_command_of_a_strangers_run_is_not_run(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_state = checkpoint.load

    def strange(folder: Path, *names: str) -> tuple[dict[str, Any], checkpoint.Tensors]:
        state, tensors = load_state(folder, *names)
        state["config"]["data"]["shards"] = f"pipe:touch {tmp_path / 'ran'}; cat {{}}"
        return state, tensors

    monkeypatch.setattr(checkpoint, "load", strange)
    assert "pass --shards" in refused(capsys, [f"--run={runs['vector']}", f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_leaves_nothing_half_written(runs: dict[str, Path], tmp_path: Path) -> None:
    words = [f"--run={runs['vector']}", f"--out={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "vae_scale.encode", *words],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "latents-train-000000.tar" in error
    assert not list(tmp_path.iterdir())
