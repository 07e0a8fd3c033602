"""Encoding of a set of images into shards of latents."""

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
from commands import error_line, hash_files
from conftest import COUNTS, TINY, discs

from launch import ACCELERATE, DDP, environment
from vae_scale.config.parsing import parse
from vae_scale.data.shards import ShardSet
from vae_scale.data.transfer import normalize_images
from vae_scale.encode import main
from vae_scale.errors import UserError
from vae_scale.evaluation.encoding import encode_shards
from vae_scale.evaluation.latents import iterate_posteriors, measure_latents
from vae_scale.models.vae import VAE
from vae_scale.pack import main as pack
from vae_scale.runtime import checkpoint
from vae_scale.runtime.distributed import SINGLE_PROCESS, DistContext
from vae_scale.training.trainer import train

KINDS = {
    "vector": ["--model.latent=vector"],
    "spatial": ["--model.latent=spatial"],
}


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run per kind of latents, trained for two steps."""
    root = tmp_path_factory.mktemp("runs")
    for kind, options in KINDS.items():
        arguments = [f"--data.shards={shards}", f"--run={root / kind}", *TINY, "--track.tracker=none", "--train.images=24"]
        train(parse([*arguments, *options, "--data.train=train,unlabeled", "--evaluate.images=12"])[0])
    return {kind: root / kind for kind in KINDS}


def load(run: Path) -> VAE:
    folder = checkpoint.newest_checkpoint(run)
    assert folder is not None
    return VAE.from_pretrained(folder, "ema.safetensors")


@pytest.fixture(scope="module")
def encoded(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The spatial latents, encoded with batch size 2."""
    out = tmp_path_factory.mktemp("encoded") / "deep" / "latents"
    main([f"--run={runs['spatial']}", f"--out={out}", "--batch=2"])
    return out


def manifest(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / "index.json").read_text())
    return index


def arrays(folder: Path) -> list[np.ndarray]:
    """Maps each shard as the array described by the manifest."""
    info = manifest(folder)["vae_scale"]
    shape, dtype, stride = info["shape"], np.dtype(info["dtype"]), info["stride"]
    strides = (stride, *np.empty(shape, dtype).strides)
    return [
        np.ndarray((entry["nsamples"], *shape), dtype, (folder / entry["url"]).read_bytes(), info["offset"], strides)
        for entry in manifest(folder)["shardlist"]
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_latents_match_the_model_and_keep_labels_and_order(
    runs: dict[str, Path], shards: Path, kind: str, tmp_path: Path
) -> None:
    main([f"--run={runs[kind]}", f"--out={tmp_path}"])
    model, index = load(runs[kind]), manifest(tmp_path)
    assert index["vae_scale"]["shape"] == [2, *model.latent_shape]
    for seed, (split, count) in enumerate(COUNTS.items()):
        images = normalize_images(torch.from_numpy(discs(count, seed)))
        urls = [str(tmp_path / entry["url"]) for entry in index["shardlist"] if entry["split"] == split]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
        assert [sample["__key__"] for sample in samples] == [f"{split}-{row:08d}" for row in range(count)]
        assert [sample["cls"] for sample in samples] == [-1 if split == "unlabeled" else row % 10 for row in range(count)]
        latents = torch.from_numpy(np.stack([sample["npy"] for sample in samples]))
        assert latents.dtype == torch.float32
        with torch.no_grad():
            for row in range(0, count, 7):
                posterior = model.encode(images[row : row + 1])
                torch.testing.assert_close(latents[row, 0], posterior.mean[0], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(latents[row, 1], 2 * posterior.log_sigma[0], rtol=1e-4, atol=1e-5)
            decoded, expected = model.decode(latents[:5, 0]), model.reconstruct(images[:5])
            torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-4)
    train_set = ShardSet.open(shards).select("train", "unlabeled")
    posteriors = iterate_posteriors(model, train_set, len(train_set), 30, SINGLE_PROCESS)
    shift, scale = measure_latents(posteriors)
    assert index["vae_scale"]["measured_on"] == ["train", "unlabeled"]
    np.testing.assert_allclose(index["vae_scale"]["shift"], shift.flatten(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(index["vae_scale"]["scale"], scale.flatten(), rtol=1e-4)


def test_manifest_describes_latents_and_their_origin(encoded: Path, shards: Path, runs: dict[str, Path]) -> None:
    index, source, folder = manifest(encoded), ShardSet.open(shards), checkpoint.newest_checkpoint(runs["spatial"])
    info = index["vae_scale"]
    assert folder is not None
    assert index["__kind__"] == "wids-shard-index-v1"
    assert (info["content"], info["encoding"], info["dtype"]) == ("latents", "npy", "<f4")
    assert info["planes"] == ["mean", "log_variance"]
    assert (info["source"], info["splits"], info["precision"]) == (source.fingerprint, source.splits, "fp32")
    assert tuple(info["class_names"]) == source.class_names
    weights = hashlib.sha256((folder / "ema.safetensors").read_bytes()).hexdigest()
    assert info["checkpoint"] == {"name": folder.name, "images_seen": 24, "weights": "ema.safetensors", "sha256": weights}
    identity = {"format_version": 1, **{key: info[key] for key in ("splits", "source", "checkpoint", "precision")}}
    assert info["fingerprint"] == hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
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
    assert {path.name for path in encoded.iterdir()} == names  # and no journals


def test_latents_do_not_depend_on_batch_size_or_number_of_processes(
    encoded: Path, runs: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    provenance = {key: manifest(encoded)["vae_scale"][key] for key in ("checkpoint", "precision")}
    with pytest.raises(UserError, match=r"unlabeled-000001\.tar: missing; all processes must use the same folder"):
        encode_shards(load(runs["spatial"]), ShardSet.open(shards), tmp_path, 7, provenance, [], DistContext(0, 2))
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    assert len(kept) == 4  # of nine: part 1 of 2

    arguments = [f"--run={runs['spatial']}", f"--out={tmp_path}"]
    launched = [*ACCELERATE, f"--config_file={DDP}", "--num_processes=2", "-m", "vae_scale.encode", *arguments]
    process = subprocess.run(launched, env=environment(), capture_output=True, text=True, timeout=250, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("latents of 180 images in 9 shards") == 1  # only the main process prints
    assert hash_files(tmp_path).keys() == hash_files(encoded).keys()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for actual, expected in zip(arrays(tmp_path), arrays(encoded), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    info, expected_info = manifest(tmp_path)["vae_scale"], manifest(encoded)["vae_scale"]
    assert info["fingerprint"] == expected_info["fingerprint"]
    np.testing.assert_allclose(info["scale"], expected_info["scale"], rtol=1e-5)


def test_encode_resumes_with_another_number_of_processes(
    encoded: Path, runs: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    provenance = {key: manifest(encoded)["vae_scale"][key] for key in ("checkpoint", "precision")}
    with pytest.raises(UserError, match="missing"):
        encode_shards(load(runs["spatial"]), ShardSet.open(shards), tmp_path, 2, provenance, [], DistContext(0, 3))
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    assert len(kept) == 3
    main([f"--run={runs['spatial']}", f"--out={tmp_path}", "--batch=2"])
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert hash_files(tmp_path) == hash_files(encoded)


def test_resume_after_kill_gives_the_same_bytes(encoded: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    arguments = [f"--run={runs['spatial']}", f"--out={tmp_path}", "--batch=2"]
    process = subprocess.Popen([sys.executable, "-m", "vae_scale.encode", *arguments], env=environment())
    journal = tmp_path / ".packing.jsonl"
    while process.poll() is None and (not journal.exists() or len(journal.read_text().splitlines()) < 4):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "index.json").exists()
    intact, damaged = (tmp_path / record["url"] for record in map(json.loads, journal.read_text().splitlines()[1:3]))
    kept = intact.stat().st_mtime_ns
    content = bytearray(damaged.read_bytes())
    content[5000] ^= 1
    damaged.write_bytes(content)
    main(arguments)
    assert intact.stat().st_mtime_ns == kept
    assert hash_files(tmp_path) == hash_files(encoded)


def test_complete_set_is_not_changed(encoded: Path, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in encoded.iterdir()}
    main([f"--run={runs['spatial']}", f"--out={encoded}", "--batch=3"])
    assert "already complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in encoded.iterdir()} == before


def test_normalization_is_absent_without_training_splits(runs: dict[str, Path], tmp_path: Path) -> None:
    main([f"--run={runs['vector']}", f"--out={tmp_path}", "--splits=test"])
    info = manifest(tmp_path)["vae_scale"]
    assert info["splits"] == {"test": COUNTS["test"]}
    assert (info["shift"], info["scale"], info["measured_on"]) == (None, None, [])


def test_bf16_is_close_to_fp32_and_recorded(encoded: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    main([f"--run={runs['spatial']}", f"--out={tmp_path}", "--splits=test", "--precision=bf16"])
    assert manifest(tmp_path)["vae_scale"]["precision"] == "bf16"
    latents = np.concatenate(arrays(tmp_path))
    is_test = [entry["split"] == "test" for entry in manifest(encoded)["shardlist"]]
    exact = np.concatenate([array for array, keep in zip(arrays(encoded), is_test, strict=True) if keep])
    assert 0 < np.abs(latents - exact).max() < 0.05 * np.abs(exact).max()


def test_user_errors_are_reported_in_one_line(
    encoded: Path, runs: dict[str, Path], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = f"--run={runs['spatial']}", f"--out={tmp_path / 'out'}"
    (tmp_path / "file").write_text("")
    assert "--run /nowhere" in error_line(capsys, main, "--run=/nowhere", out)
    assert "--batch" in error_line(capsys, main, run, out, "--batch=0")
    assert "is a file" in error_line(capsys, main, run, f"--out={tmp_path / 'file'}")
    assert "/nowhere" in error_line(capsys, main, run, out, "--shards=/nowhere")
    assert "no split 'best'" in error_line(capsys, main, run, out, "--splits=train,best")
    assert "another source or other options" in error_line(capsys, main, f"--run={runs['vector']}", f"--out={encoded}")
    assert "another source or other options" in error_line(capsys, main, run, f"--out={encoded}", "--splits=train")
    assert "another source or other options" in error_line(capsys, main, run, f"--out={shards}")
    assert "contains latents, not images" in error_line(capsys, main, run, out, f"--shards={encoded}")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="contains latents, not images"):
        ShardSet.open(encoded)


def test_interrupted_set_of_another_source_is_not_resumed(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = {"name": "latents", "images_per_shard": 25, "vae_scale": {"fingerprint": "other", "splits": {"train": 60}}}
    (tmp_path / ".packing.jsonl").write_text(json.dumps(header))
    assert "is of another source or other options" in error_line(capsys, main, f"--run={runs['vector']}", f"--out={tmp_path}")


def test_images_of_another_size_are_rejected(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for split in ("train", "test"):
        (tmp_path / "images" / split).mkdir(parents=True)
        Image.fromarray(discs(1, 0)[0]).save(tmp_path / "images" / split / "disc.png")
    pack(["--source=folder", f"--data={tmp_path / 'images'}", f"--out={tmp_path / 'small'}", "--resolution=32"])
    capsys.readouterr()
    arguments = [f"--run={runs['vector']}", f"--shards={tmp_path / 'small'}", f"--out={tmp_path / 'out'}"]
    assert "images are 32x32, but the model requires 96x96" in error_line(capsys, main, *arguments)


def test_split_names_cannot_escape_the_output_folder(shards: Path, tmp_path: Path, runs: dict[str, Path]) -> None:
    index = manifest(shards)
    for entry in index["shardlist"]:
        entry["split"] = "../outside"
        (tmp_path / entry["url"]).symlink_to(shards / entry["url"])
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="a name consists of"):
        encode_shards(load(runs["vector"]), ShardSet.open(tmp_path), tmp_path / "out" / "deep", 10, {}, [])


def test_non_finite_latents_are_rejected(shards: Path, tmp_path: Path, runs: dict[str, Path]) -> None:
    model = load(runs["vector"])
    with torch.no_grad():
        next(model.encoder.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match=r"train-000000\.tar: a latent is not finite"):
        encode_shards(model, ShardSet.open(shards), tmp_path, 10, {}, [])
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_no_incomplete_file(runs: dict[str, Path], tmp_path: Path) -> None:
    arguments = [f"--run={runs['vector']}", f"--out={tmp_path}"]
    process = subprocess.run(
        [sys.executable, "-m", "vae_scale.encode", *arguments],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2, process.stderr
    (error,) = [line for line in process.stderr.splitlines() if line.startswith("error:")]
    assert "latents-train-000000.tar" in error
    assert not list(tmp_path.iterdir())
