"""The hierarchical VAE: its noise variables are whitened, so a KL divergence there must be the one before whitening."""

from pathlib import Path

import pytest
import torch
from conftest import TINY, discs
from torch import Tensor

from launch import losses, train
from vae_scale.config import VAEConfig
from vae_scale.models.exporting import export
from vae_scale.models.ladder import LadderVAE, sides_of


def small(resolution: int = 96, **options: object) -> LadderVAE:
    torch.manual_seed(0)
    defaults = {"patch": 8, "width": 16, "multipliers": [1, 2], "blocks": 2, "latent_channels": 4}
    return LadderVAE(VAEConfig(**(defaults | options)), resolution)  # type: ignore[arg-type]


def jolt(model: LadderVAE) -> LadderVAE:
    """Moves all weights off their special starting values, as if training had."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def images(count: int, seed: int = 0) -> Tensor:
    """[count, 3, 96, 96] in [-1, 1]."""
    return torch.from_numpy(discs(count, seed)).permute(0, 3, 1, 2).float() / 127.5 - 1


def noise_for(model: LadderVAE, count: int) -> Tensor:
    return torch.randn(count, *model.latent_shape)


@pytest.mark.parametrize(
    ("resolution", "patch", "sides"),
    [
        (96, 1, [96, 48, 24, 12, 6, 3, 1]),
        (96, 2, [48, 24, 12, 6, 3, 1]),
        (96, 4, [24, 12, 6, 3, 1]),
        (64, 4, [16, 8, 4, 2, 1]),
        (48, 2, [24, 12, 6, 3, 1]),
        (20, 2, [10, 5, 1]),
        (8, 8, [1]),
    ],
)
@pytest.mark.parametrize("likelihood", ["gaussian", "logistic_mixture"])
def test_any_resolution_goes_down_to_one_position_and_back(
    resolution: int, patch: int, sides: list[int], likelihood: str
) -> None:
    assert sides_of(resolution, patch) == sides
    with torch.device("meta"):
        model = small(resolution, patch=patch, likelihood=likelihood, latent_channels=3)
        x = torch.empty(2, 3, resolution, resolution)
        assert model.sizes == [3 * side**2 for side in reversed(sides) for _ in range(2)]
        assert model.latent_shape == (sum(model.sizes), 1, 1)
        posterior = model.encode(x)
        assert posterior.mean.shape == posterior.log_sigma.shape == (2, *model.latent_shape)
        assert model.reconstruct(x).shape == model.decode(posterior.mean).shape == x.shape
        terms = model(x, posterior.mean)
        assert terms.kl.shape == (2, len(model.sizes))
        assert terms.elbo.shape == terms.log_ratio.shape == (2,)
        assert terms.output.shape == (2, model.likelihood.channels, resolution, resolution)


def test_the_way_down_from_the_latents_is_the_way_down_from_the_image() -> None:
    model, x = jolt(small()), images(3)
    posterior = model.encode(x)
    assert torch.allclose(model.decoder(posterior.mean), model(x, torch.zeros(3, *model.latent_shape)).output, atol=1e-5)
    assert torch.equal(model.reconstruct(x), model.decode(posterior.mean))


def test_the_kl_of_each_layer_is_that_before_whitening() -> None:
    model, x = jolt(small()), images(3)
    heads: list[Tensor] = []
    for layer in model.decoder.layers:
        for part in (layer.posterior, layer.prior):
            part.register_forward_hook(lambda _, inputs, output: heads.append(output))
    terms = model(x, noise_for(model, 3))
    for column, (q, p) in enumerate(zip(heads[::2], heads[1::2], strict=True)):
        m, s = (5 * torch.tanh(part / 5) for part in q.chunk(2, 1))
        mean, log_sigma = p[:, :4], 5 * torch.tanh(p[:, 4:8] / 5)
        prior = torch.distributions.Normal(mean, log_sigma.exp())
        posterior = torch.distributions.Normal(mean + m * log_sigma.exp(), (s + log_sigma).exp())
        exact = torch.distributions.kl_divergence(posterior, prior).sum((1, 2, 3))
        assert exact.min() > 0.01
        assert torch.allclose(terms.kl[:, column], exact, rtol=1e-4, atol=1e-3)


def test_the_log_ratio_is_minus_the_kl_on_average() -> None:
    model, draws = jolt(small(width=8)), 400
    x = images(2).repeat_interleave(draws, 0)
    torch.manual_seed(2)
    with torch.no_grad():
        terms = model(x, noise_for(model, len(x)))
    for kl, ratio in zip(terms.kl.sum(1).split(draws), terms.log_ratio.split(draws), strict=True):
        spread = (ratio + kl).std() / draws**0.5
        assert kl.mean() > 10 * spread
        assert (ratio + kl).mean().abs() < 4 * spread


def test_every_prior_starts_as_a_standard_normal() -> None:
    model = small()
    for layer in model.decoder.layers:
        layer.prior.register_forward_hook(lambda _, inputs, output: heads.append(output))
    heads: list[Tensor] = []
    model(images(2), noise_for(model, 2))
    assert len(heads) == len(model.sizes)
    assert not any(head.any() for head in heads)


def test_samples_follow_the_seed_and_the_temperature() -> None:
    model = jolt(small()).eval()
    assert torch.equal(model.sample(2, seed=1, temperature=0.0), model.sample(2, seed=2, temperature=0.0))
    assert torch.equal(model.sample(2, seed=1), model.sample(2, seed=1))
    assert torch.allclose(model.sample(4, seed=1, batch_size=3)[:2], model.sample(2, seed=1), atol=1e-5)
    for options in ({"seed": 2}, {"seed": 1, "temperature": 0.5}):
        assert (model.sample(2, **options) - model.sample(2, seed=1)).abs().max() > 1e-3  # type: ignore[arg-type]


def test_features_stay_in_channels_last_memory() -> None:
    model = small().to(memory_format=torch.channels_last)
    seen = []
    for layer in [*model.encoder.modules(), *model.decoder.modules()]:
        if isinstance(layer, torch.nn.Conv2d) and layer.in_channels > 1:
            layer.register_forward_hook(
                lambda _, inputs, output: seen.append(output.is_contiguous(memory_format=torch.channels_last))
            )
    x = images(2).contiguous(memory_format=torch.channels_last)
    terms = model(x, noise_for(model, 2))
    assert len(seen) > 50
    assert all(seen)
    plain = small()(x, torch.zeros(2, *model.latent_shape)).elbo
    assert torch.allclose(model(x, torch.zeros(2, *model.latent_shape)).elbo, plain, rtol=1e-5)
    assert terms.elbo.isfinite().all()


def test_half_precision_leaves_the_kl_in_fp32() -> None:
    model, x = jolt(small()), images(2)
    noise = noise_for(model, 2)
    with torch.autocast("cpu", torch.bfloat16):
        terms = model(x, noise)
    assert terms.kl.dtype == terms.log_ratio.dtype == terms.log_prob.dtype == torch.float32
    assert torch.allclose(terms.kl.sum(1), model(x, noise).kl.sum(1), rtol=0.05)


def test_it_is_exported_for_any_batch_size(tmp_path: Path) -> None:
    parts = export(jolt(small()).eval(), tmp_path / "out", "torch", {})["parts"]
    assert [part["batches_compared"] for part in parts.values()] == [[1, 3]] * 2
    assert all(part["largest_difference"] < 1e-4 for part in parts.values())


def test_one_and_two_processes_train_it_alike(shards: Path, tmp_path: Path) -> None:
    network = ["--model.preset=ladder", "--model.patch=8", "--model.blocks=1", "--model.latent_channels=2"]
    for processes in (1, 2):
        words = [f"--data.shards={shards}", f"--run={tmp_path / str(processes)}", *TINY, *network, "--track.tracker=none"]
        train(processes, *words, "--train.images=60", "--train.log_every=1")
    assert list(losses(tmp_path / "2").values()) == pytest.approx(list(losses(tmp_path / "1").values()), rel=1e-4)


def step(model: LadderVAE, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    """One step of training, as the trainer does it; returns the negative ELBO in nats per image."""
    terms = model(x, noise_for(model, len(x)))
    loss = -terms.elbo.mean()
    (loss / model.dimensions).backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    model.likelihood.follow(model.likelihood.deviation(terms.output, x), torch.tensor(True))
    return loss.detach()


def test_gradients_reach_every_parameter_once_the_zero_heads_have_moved() -> None:
    model, x = small(likelihood="gaussian", scale=0.5), images(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):  # the head moves first, then the priors' last layers, then what feeds them
        optimizer.zero_grad()
        step(model, optimizer, x)
    still = [name for name, part in model.named_parameters() if part.grad is None or not part.grad.any()]
    assert not still


def test_it_learns_and_three_layers_carry_information() -> None:
    model = small(blocks=1).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), fused=True)
    data, held_out = images(256), images(32, seed=1)

    def nats() -> tuple[float, Tensor]:
        torch.manual_seed(3)
        with torch.no_grad():
            terms = model(held_out, noise_for(model, 32))
        return -terms.elbo.mean().item() / model.dimensions, terms.kl.mean(0)

    before, _ = nats()
    torch.manual_seed(4)
    for _ in range(80):
        optimizer.zero_grad()
        step(model, optimizer, data[torch.randint(len(data), (16,))])
    after, kl = nats()
    assert after < before - 0.7, (before, after)  # nats per dimension
    assert (kl > 20).sum() >= 3, kl
