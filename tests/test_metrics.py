"""Metrics, compared with closed forms and reference implementations."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import discs
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from skimage.metrics import structural_similarity
from torch import Tensor

from vae_scale.errors import UserError
from vae_scale.evaluation import features, neighbours, reconstruction
from vae_scale.evaluation.features import load_extractor
from vae_scale.evaluation.frechet import frechet_distance


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(mean: Tensor, covariance: Tensor, seed: int = 0) -> Tensor:
    """Returns features with exactly this mean and unbiased covariance."""
    x = normal(50, len(mean), seed=seed)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / 49), x.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ white).T + mean


def test_frechet_distance_of_gaussians_equals_the_closed_form() -> None:
    first, second = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 4.0, 1.0]).double()
    x = with_moments(torch.zeros(3).double(), torch.diag(first), seed=1)
    y = with_moments(torch.tensor([1.0, 2.0, 2.0]).double(), torch.diag(second), seed=2)
    # means: 9; standard deviations: (1 - 2)^2 + (2 - 2)^2 + (3 - 1)^2
    assert frechet_distance(x, y) == pytest.approx(9 + 1 + 0 + 4, rel=1e-10)


def test_frechet_distance_equals_scipy_and_torch_fidelity() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    x, y = normal(200, 20, seed=1), normal(150, 20, seed=2) @ normal(20, 20, seed=3) + 0.5
    result = frechet_distance(x, y)
    reference = fid_statistics_to_metric(*(fid_features_to_statistics(features) for features in (x, y)), verbose=False)
    assert result == pytest.approx(reference["frechet_inception_distance"], rel=1e-8)
    (m1, c1), (m2, c2) = ((a.mean(0), np.cov(a, rowvar=False)) for a in (x.numpy(), y.numpy()))
    assert result == pytest.approx(((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real), rel=1e-8)


@pytest.mark.parametrize("count", [2, 7, 300])
def test_frechet_distance_of_fewer_images_than_dimensions_is_exact(count: int) -> None:
    x = normal(count, 64).float() * 3 + 5
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x.double() + 0.25) == pytest.approx(64 / 16, rel=1e-9)
    # Deviations from the mean are doubled, so the square root of the covariance is doubled.
    spread = float(torch.cov(x.double().T).trace())
    assert frechet_distance(x, 2 * x.double() - x.double().mean(0)) == pytest.approx(spread, rel=1e-9)


def test_frechet_distance_requires_two_images() -> None:
    with pytest.raises(UserError, match="at least 2 images"):
        frechet_distance(normal(1, 4), normal(9, 4))


def brute_force(reference: np.ndarray, samples: np.ndarray) -> dict[str, float]:
    """Computes the metrics by their definitions, image by image."""

    def euclidean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(((a - b) ** 2).sum()))

    def kth_distance(points: np.ndarray, k: int) -> list[float]:
        return [sorted(euclidean(a, b) for j, b in enumerate(points) if j != i)[k - 1] for i, a in enumerate(points)]

    def inside(centers: np.ndarray, k: int, points: np.ndarray) -> np.ndarray:
        radii = kth_distance(centers, k)
        return np.array([[euclidean(c, p) <= r + 1e-12 for p in points] for c, r in zip(centers, radii, strict=True)])

    within = inside(reference, 5, samples)
    return {
        "precision": float(inside(reference, 3, samples).any(0).mean()),
        "recall": float(inside(samples, 3, reference).any(0).mean()),
        "density": float(within.sum() / (5 * len(samples))),
        "coverage": float(within.any(1).mean()),
    }


@settings(max_examples=20, deadline=None)
@given(st.integers(6, 20), st.integers(4, 20), st.integers(0, 99), st.floats(0, 2))
def test_precision_recall_density_and_coverage_follow_their_definitions(n: int, m: int, seed: int, shift: float) -> None:
    reference, samples = normal(n, 3, seed=seed), normal(m, 3, seed=seed + 100) + shift
    assert neighbours.compute_prdc(reference, samples) == pytest.approx(brute_force(reference.numpy(), samples.numpy()))


def test_neighbours_do_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, samples = normal(40, 8), normal(30, 8, seed=1)
    prdc, nearest = neighbours.compute_prdc(reference, samples), neighbours.nearest_neighbours(samples, reference)
    monkeypatch.setattr(neighbours, "CHUNK", 7)
    assert neighbours.compute_prdc(reference, samples) == prdc
    assert torch.equal(neighbours.nearest_neighbours(samples, reference), nearest)


def test_neighbours_of_equal_distant_and_repeated_sets() -> None:
    x = normal(30, 4)
    same, far = neighbours.compute_prdc(x, x), neighbours.compute_prdc(x, x + 1000)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    assert same["density"] >= 1
    assert set(far.values()) == {0.0}
    copies = neighbours.compute_prdc(x, x[:1].expand(30, -1))  # mode collapse
    assert copies["precision"] == 1
    assert copies["recall"] == pytest.approx(1 / 30)
    with pytest.raises(UserError, match="more than 5 images and 3 samples, got 5 and 30"):
        neighbours.compute_prdc(x[:5], x)
    with pytest.raises(UserError, match="got 30 and 3"):
        neighbours.compute_prdc(x, x[:3])


def test_nearest_neighbour_of_a_perturbed_image_is_the_image() -> None:
    reference = normal(50, 6).float() + 1000
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(neighbours.nearest_neighbours(reference[order] + 1e-3, reference)[:, 0], order)


def test_ssim_equals_scikit_image_and_psnr_its_definition() -> None:
    x = torch.from_numpy(discs(3, 0)).permute(0, 3, 1, 2).double() / 127.5 - 1
    y = (x + 0.2 * normal(*x.shape)).clamp(-1, 1)
    expected_ssim = [
        structural_similarity(
            a.numpy(), b.numpy(), channel_axis=0, data_range=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for a, b in zip(x, y, strict=True)
    ]
    assert reconstruction.ssim(x, y).tolist() == pytest.approx(expected_ssim, rel=1e-5)
    assert reconstruction.ssim(x, x).tolist() == pytest.approx([1, 1, 1])
    expected = -10 * torch.log10((x - y).square().mean((1, 2, 3)) / 4)
    assert reconstruction.psnr(x, y).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert reconstruction.psnr(x, x).tolist() == pytest.approx([106] * 3)
    with pytest.raises(UserError, match="11 pixels"):
        reconstruction.ssim(x[..., :8, :8], y[..., :8, :8])


def test_efficientnet_features_separate_discs_from_blurred_discs() -> None:
    extractor = load_extractor("efficientnet_lite0")
    images, others = (torch.from_numpy(discs(6, seed)) for seed in (0, 1))
    small = others.permute(0, 3, 1, 2).float()
    small = torch.nn.functional.interpolate(small, size=(12, 12), mode="area")
    blurred = torch.nn.functional.interpolate(small, size=(96, 96), mode="bilinear").round().to(torch.uint8).permute(0, 2, 3, 1)
    reference, similar, different = (extractor(x) for x in (images, others, blurred))
    assert reference.shape == (6, 1280)
    assert reference.dtype == torch.float32
    assert torch.allclose(extractor(images[:3]), reference[:3], atol=1e-4)
    distances = [frechet_distance(reference, x) for x in (similar, different)]
    assert distances[1] > 1.5 * distances[0] > 0


def test_weights_with_a_different_sha256_are_not_unpickled(tmp_path: Path) -> None:
    other = tmp_path / "weights.pth"
    other.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    for name in ("efficientnet_lite0", "inception"):
        with pytest.raises(UserError, match=r"weights\.pth: its SHA-256 starts"):
            load_extractor(name, weights=other)
    with pytest.raises(UserError, match=r"nothing\.pth: cannot be read"):
        load_extractor("inception", weights=tmp_path / "nothing.pth")


def test_inception_is_downloaded_verified_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    from torch_fidelity import feature_extractor_inceptionv3 as inception

    # Random weights, served from a file URL.
    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    (tmp_path / "server").mkdir()
    file = tmp_path / "server" / "weights.pth"
    torch.save(network.state_dict(), file)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(inception, "URL_INCEPTION_V3", file.as_uri())
    with pytest.raises(UserError, match=r"cannot be downloaded .* --weights FILE"):
        load_extractor("inception")
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    images = torch.from_numpy(discs(2, 0))
    features_of_images = load_extractor("inception")(images)
    assert features_of_images.shape == (2, 2048)
    assert torch.allclose(features_of_images, network(images.permute(0, 3, 1, 2))[0], atol=1e-5)
    assert (tmp_path / "hub" / "checkpoints" / "weights.pth").is_file()


def test_lpips_requires_verified_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lpips.pretrained_networks
    import torchvision

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"requires .*alexnet-owt-7be5be79\.pth"):
        reconstruction.load_lpips()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / reconstruction.ALEXNET_FILE).write_bytes(b"something else")
    with pytest.raises(UserError, match="its SHA-256 starts"):
        reconstruction.load_lpips()
    # AlexNet with random weights; the heads are part of the package.
    monkeypatch.setattr(reconstruction, "verify_sha256", lambda *_: None)
    random = torchvision.models.alexnet(weights=None)
    monkeypatch.setattr(lpips.pretrained_networks.tv, "alexnet", lambda **_: random)
    lpips_distance = reconstruction.load_lpips()
    x = torch.from_numpy(discs(2, 0)).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert lpips_distance(x, x).tolist() == [0, 0]
    assert (lpips_distance(x, -x) > 0).all()


@pytest.mark.parametrize("name", ["efficientnet_lite0", "inception"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("efficientnet_lite_pytorch", "torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r'pip install "vae_scale\[eval\]"'):
        load_extractor(name)
