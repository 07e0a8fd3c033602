"""Evaluation and schedules: numbers that depend on what they should, and on nothing else."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vae_scale.config import PRESETS, ObjectiveConfig, OptimizerConfig, VAEConfig
from vae_scale.data.shards import ShardSet
from vae_scale.models.networks import build
from vae_scale.models.vae import VAE
from vae_scale.training.evaluation import Processes, evaluate
from vae_scale.training.latents import fit_prior
from vae_scale.training.schedules import kl_weight, learning_rate


@pytest.fixture(scope="module")
def model() -> VAE:
    torch.manual_seed(0)
    config = VAEConfig(preset="tiny", **(PRESETS["tiny"] | {"width": 16, "latent": "vector"}))
    model = build(config, 96).eval()
    torch.nn.init.normal_(model.decoder.head.weight, std=0.05)  # type: ignore[union-attr]
    return model


def test_the_elbo_does_not_depend_on_the_batch_size(model: VAE, shards: Path) -> None:
    test_set = ShardSet.open(shards).select("test")

    def numbers(images: int, batch: int, seed: int) -> list[float]:
        found = evaluate(model, test_set, images, batch, seed)
        return [*found.pop("kl_nats_per_channel"), *found.values()]

    whole = numbers(30, 30, seed=0)
    assert numbers(30, 7, seed=0) == pytest.approx(whole, rel=1e-5)
    assert numbers(10_000, 7, seed=0) == pytest.approx(whole, rel=1e-5)
    assert numbers(30, 7, seed=1) != pytest.approx(whole, rel=1e-5)


def test_the_shares_of_all_ranks_add_up_to_the_whole(model: VAE, shards: Path) -> None:
    test_set = ShardSet.open(shards).select("test")
    whole = evaluate(model, test_set, 29, 8, seed=0)
    shares = [evaluate(model, test_set, 29, 8, 0, Processes(rank, 3)) for rank in range(3)]
    for name in ("nats", "reconstruction_nats", "kl_nats", "psnr_db"):
        assert sum(share[name] for share in shares) == pytest.approx(whole[name], rel=1e-5)
    channels = zip(*(share["kl_nats_per_channel"] for share in shares), strict=True)
    assert [sum(parts) for parts in channels] == pytest.approx(whole["kl_nats_per_channel"], rel=1e-5)


def test_the_prior_does_not_depend_on_the_batch_size(model: VAE, shards: Path) -> None:
    train_set = ShardSet.open(shards).select("train", "unlabeled")
    first, second = (fit_prior(model, train_set, 100, batch, seed=0) for batch in (100, 9))
    assert first is not None
    assert second is not None
    assert first.weights.shape == second.weights.shape
    assert torch.allclose(first.draw(range(20), 0, 1.0), second.draw(range(20), 0, 1.0), atol=1e-2)
    assert fit_prior(model, train_set, 100, 9, 0, Processes(1, 2)) is None


@given(st.integers(0, 2_000), st.integers(1, 1_000), st.integers(1, 2_000))
def test_the_learning_rate_rises_to_its_height_and_falls_to_a_hundredth(seen: int, warmup: int, more: int) -> None:
    config, images = OptimizerConfig(lr=0.5, warmup=warmup), warmup + more
    rates = [learning_rate(config, count, images) for count in (0, seen, warmup, images, 2 * images)]
    assert all(0 < rate <= 0.5 for rate in rates)
    assert rates[2] == pytest.approx(0.5)
    assert rates[3] == rates[4] == pytest.approx(0.005)
    if seen < warmup:
        assert learning_rate(config, seen, images) < learning_rate(config, seen + 1, images) + 1e-12
    constant = OptimizerConfig(lr=0.5, warmup=warmup, schedule="constant")
    assert learning_rate(constant, images, images) == 0.5


@given(st.integers(0, 1_000))
def test_beta_warms_up_to_its_weight(warmup: int) -> None:
    config = ObjectiveConfig(beta=2.0, beta_warmup=warmup)
    assert kl_weight(config, warmup) == 2.0
    assert 0 < kl_weight(config, 0) <= 2.0
