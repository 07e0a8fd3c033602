"""Checkpoints and models that are damaged or malicious: they are skipped, or one line names the file."""

import contextlib
import io
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import allow_user_error, corrupted, expect_user_error, fuzz_settings, limit_memory, list_files, mutated_json
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vae_scale.config.options import VAEConfig
from vae_scale.files import sha256_of
from vae_scale.models.networks import build_model
from vae_scale.models.vae import VAE
from vae_scale.runtime import checkpoint


@pytest.fixture(scope="module")
def model() -> VAE:
    torch.manual_seed(1)
    return build_model(VAEConfig(preset="tiny", width=16, latent_channels=2), 32)


@pytest.fixture(scope="module")
def run(model: VAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    writer = checkpoint.CheckpointWriter(folder, 3)
    for images in (12, 24):
        state = {"images_seen": images, "config": {"model": {}, "data": {}}}
        writer.save(images, {"model": model.state_dict(), "ema": model.state_dict(), "optimizer": {}}, state, model.to_config())
    writer.wait()
    return folder


def rehash(folder: Path) -> None:
    """Updates the hashes in the manifest of a checkpoint."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in folder.iterdir()
        if path.name != checkpoint.MANIFEST
    }
    (folder / checkpoint.MANIFEST).write_text(json.dumps({"version": 1, "files": files}))


@fuzz_settings
@given(st.data())
def test_corrupted_checkpoints_are_skipped_and_with_valid_hashes_are_read_or_rejected(
    run: Path, tmp_path: Path, data: st.DataObject
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy", dirs_exist_ok=True))
    folder = checkpoint.checkpoint_folder(copy, 24)
    victim = folder / data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    content = data.draw(corrupted(victim.read_bytes()))
    is_unchanged = content == victim.read_bytes()
    victim.write_bytes(content)
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        newest = checkpoint.newest_checkpoint(copy)
    if victim.name != checkpoint.MANIFEST and not is_unchanged:
        assert newest == checkpoint.checkpoint_folder(copy, 12)
        assert f"{folder} is skipped" in stdout.getvalue()
    rehash(folder)
    with allow_user_error(folder):
        checkpoint.load_checkpoint(folder, "model", "ema")
    with allow_user_error(folder):
        assert VAE.from_pretrained(folder, "ema.safetensors").sample(1).shape[1] == 3


@settings(fuzz_settings, max_examples=150)
@given(st.data())
def test_mutated_model_configs_are_rejected_unless_they_fit_the_weights(
    model: VAE, tmp_path: Path, data: st.DataObject
) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(data.draw(mutated_json(model.to_config()))))
    with allow_user_error(tmp_path):
        VAE.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"width": 2**16},
        {"width": 10**12},
        {"width": 10**400},
        {"num_res_blocks": 10**9},
        {"channel_mult": [1] * 10**5},
        {"channel_mult": [10**18]},
        {"latent_channels": 2**62},
        {"network": "seed_notebook"},
        {"width": float("nan")},
        {"preset": {"__class__": "os.system"}},
    ],
)
def test_model_configs_of_excessive_size_take_no_memory(model: VAE, tmp_path: Path, change: dict[str, Any]) -> None:
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for values in (config | {"model": config["model"] | change}, config | {"resolution": 10**9}):
        (tmp_path / "config.json").write_text(json.dumps(values))
        message = expect_user_error(lambda: VAE.from_pretrained(tmp_path), tmp_path)
        assert len(message) < 1000
    flow = {"flow": {"width": 2**16, "depth": 9}, "classes": []}
    (tmp_path / "config.json").write_text(json.dumps(model.to_config() | flow))
    expect_user_error(lambda: VAE.from_pretrained(tmp_path), tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 2**62),
        struct.pack("<Q", 99_000_000) + b"{",
        struct.pack("<Q", 2) + b"{}",
        *(
            struct.pack("<Q", len(text)) + text + bytes(64)
            for text in (
                b'{"w":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,64]}}',
                b'{"w":{"dtype":"F32","shape":[16],"data_offsets":[0,1099511627776]}}',
                b'{"w":{"dtype":"X9","shape":[16],"data_offsets":[0,64]}}',
                b'{"../../w":{"dtype":"F32","shape":[16],"data_offsets":[0,64]}}',
                b'{"a":' * 20_000,
            )
        ),
    ],
)
def test_invalid_weights_are_rejected(run: Path, model: VAE, tmp_path: Path, content: bytes) -> None:
    folder = checkpoint.checkpoint_folder(Path(shutil.copytree(run, tmp_path / "run")), 24)
    for name in ("model", "ema"):
        (folder / f"{name}.safetensors").write_bytes(content)
    rehash(folder)
    before = list_files(tmp_path)
    with limit_memory(), allow_user_error(folder):
        checkpoint.load_checkpoint(folder, "model")
    expect_user_error(lambda: VAE.from_pretrained(folder), folder)
    model.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "mixture.safetensors").write_bytes(content)
    expect_user_error(lambda: VAE.from_pretrained(tmp_path / "other"), tmp_path / "other")
    assert {path for path in list_files(tmp_path) - before if "other" not in path.parts} == set()


def test_a_mixture_of_other_latents_is_rejected(model: VAE, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tensors = {"weights": torch.ones(2) / 2, "means": torch.zeros(2, 32), "factors": torch.eye(32).repeat(2, 1, 1)}
    for change in (
        {"means": torch.zeros(2, 7)},
        {"factors": torch.ones(2, 32)},
        {"weights": torch.ones(2, dtype=torch.int64)},
    ):
        save_file(tensors | change, tmp_path / "mixture.safetensors")
        expect_user_error(lambda: VAE.from_pretrained(tmp_path), tmp_path, f"the mixture's {next(iter(change))}")
    save_file(tensors, tmp_path / "mixture.safetensors")
    assert VAE.from_pretrained(tmp_path).mixture is not None


@pytest.mark.parametrize("name", ["../state.json", "/etc/passwd", "..", "", "a\0b", "a/b", "\x1b[2J"])
def test_a_checkpoint_cannot_name_paths(run: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint.checkpoint_folder(Path(shutil.copytree(run, tmp_path / "run")), 24)
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest["files"][name] = {"size": 1, "sha256": "0" * 64}
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    assert checkpoint.newest_checkpoint(tmp_path / "run") == checkpoint.checkpoint_folder(tmp_path / "run", 12)
    assert "\x1b" not in capsys.readouterr().out


def test_a_missing_key_of_the_state_is_named(run: Path, tmp_path: Path) -> None:
    folder = checkpoint.checkpoint_folder(Path(shutil.copytree(run, tmp_path / "run")), 24)
    expect_user_error(
        lambda: checkpoint.load_checkpoint(folder)[0]["config"]["data"]["shards"], folder / checkpoint.STATE, "lacks shards"
    )
    for state in ({"config": []}, {"config": {"data": 7}}, []):
        (folder / checkpoint.STATE).write_text(json.dumps(state))
        expect_user_error(lambda: checkpoint.load_checkpoint(folder), folder, checkpoint.STATE)
