"""Invariances of evaluation and prior fitting, and the learning rate."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vae_scale.config.options import PRESETS, OptimizerConfig, VAEConfig
from vae_scale.data.shards import ShardSet
from vae_scale.evaluation.evaluator import evaluate
from vae_scale.evaluation.latents import fit_prior
from vae_scale.models.networks import build_model
from vae_scale.models.vae import VAE
from vae_scale.runtime.distributed import DistContext
from vae_scale.training.optimizer_step import learning_rate


@pytest.fixture(scope="module")
def model() -> VAE:
    torch.manual_seed(0)
    config = VAEConfig(preset="tiny", **(PRESETS["tiny"] | {"width": 16, "latent": "vector"}))
    model = build_model(config, 96).eval()
    torch.nn.init.normal_(model.decoder.head.weight, std=0.05)  # type: ignore[union-attr]
    return model


def test_elbo_does_not_depend_on_the_batch_size(model: VAE, shards: Path) -> None:
    test_set = ShardSet.open(shards).select("test")

    def values(images: int, batch: int, seed: int) -> list[float]:
        metrics = evaluate(model, test_set, images, batch, seed)
        return [*metrics.pop("kl_per_channel"), *metrics.values()]

    expected = values(30, 30, seed=0)
    assert values(30, 7, seed=0) == pytest.approx(expected, rel=1e-5)
    assert values(10_000, 7, seed=0) == pytest.approx(expected, rel=1e-5)
    assert values(30, 7, seed=1) != pytest.approx(expected, rel=1e-5)


def test_metrics_of_all_ranks_sum_to_those_of_a_single_process(model: VAE, shards: Path) -> None:
    test_set = ShardSet.open(shards).select("test")
    expected = evaluate(model, test_set, 29, 8, seed=0)
    per_rank = [evaluate(model, test_set, 29, 8, 0, DistContext(rank, 3)) for rank in range(3)]
    for name in ("neg_elbo", "reconstruction", "kl", "psnr"):
        assert sum(metrics[name] for metrics in per_rank) == pytest.approx(expected[name], rel=1e-5)
    channels = zip(*(metrics["kl_per_channel"] for metrics in per_rank), strict=True)
    assert [sum(values) for values in channels] == pytest.approx(expected["kl_per_channel"], rel=1e-5)


def test_prior_does_not_depend_on_the_batch_size(model: VAE, shards: Path) -> None:
    train_set = ShardSet.open(shards).select("train", "unlabeled")
    first, second = (fit_prior(model, train_set, 100, batch, seed=0) for batch in (100, 9))
    assert first is not None
    assert second is not None
    assert first.weights.shape == second.weights.shape
    assert torch.allclose(first.sample(range(20), 0, 1.0), second.sample(range(20), 0, 1.0), atol=1e-2)
    assert fit_prior(model, train_set, 100, 9, 0, DistContext(1, 2)) is None


@given(st.integers(0, 2_000), st.integers(1, 1_000), st.integers(1, 2_000))
def test_learning_rate_warms_up_to_its_maximum_and_decays_to_a_hundredth(seen: int, warmup: int, more: int) -> None:
    config, images = OptimizerConfig(lr=0.5, warmup_images=warmup), warmup + more
    rates = [learning_rate(config, count, images) for count in (0, seen, warmup, images, 2 * images)]
    assert all(0 < rate <= 0.5 for rate in rates)
    assert rates[2] == pytest.approx(0.5)
    assert rates[3] == rates[4] == pytest.approx(0.005)
    if seen < warmup:
        assert learning_rate(config, seen, images) < learning_rate(config, seen + 1, images) + 1e-12
    constant = OptimizerConfig(lr=0.5, warmup_images=warmup, schedule="constant")
    assert learning_rate(constant, images, images) == 0.5
