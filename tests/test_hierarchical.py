"""The hierarchical VAE, whose latents are whitened, with a KL divergence that is invariant under the whitening."""

from pathlib import Path

import pytest
import torch
from conftest import TINY, discs
from torch import Tensor

from launch import losses, train
from vae_scale.config.options import VAEConfig
from vae_scale.models.exporting import export_model
from vae_scale.models.hierarchical import HierarchicalVAE, feature_map_sizes


def small(resolution: int = 96, **options: object) -> HierarchicalVAE:
    torch.manual_seed(0)
    defaults = {"patch_size": 8, "width": 16, "channel_mult": [1, 2], "num_res_blocks": 2, "latent_channels": 4}
    return HierarchicalVAE(VAEConfig(**(defaults | options)), resolution)  # type: ignore[arg-type]


def perturb(model: HierarchicalVAE) -> HierarchicalVAE:
    """Moves all weights away from their initial values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def images(count: int, seed: int = 0) -> Tensor:
    """[count, 3, 96, 96] in [-1, 1]."""
    return torch.from_numpy(discs(count, seed)).permute(0, 3, 1, 2).float() / 127.5 - 1


def noise_for(model: HierarchicalVAE, count: int) -> Tensor:
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
def test_shapes_at_any_resolution(resolution: int, patch: int, sides: list[int], likelihood: str) -> None:
    assert feature_map_sizes(resolution, patch) == sides
    with torch.device("meta"):
        model = small(resolution, patch_size=patch, likelihood=likelihood, latent_channels=3)
        x = torch.empty(2, 3, resolution, resolution)
        assert model.layer_sizes == [3 * side**2 for side in reversed(sides) for _ in range(2)]
        assert model.latent_shape == (sum(model.layer_sizes), 1, 1)
        posterior = model.encode(x)
        assert posterior.mean.shape == posterior.log_sigma.shape == (2, *model.latent_shape)
        assert model.reconstruct(x).shape == model.decode(posterior.mean).shape == x.shape
        terms = model(x, posterior.mean)
        assert terms.kl.shape == (2, len(model.layer_sizes))
        assert terms.elbo.shape == terms.log_ratio.shape == (2,)
        assert terms.output.shape == (2, model.likelihood.channels, resolution, resolution)


def test_decoding_the_posterior_mean_equals_the_forward_pass_without_noise() -> None:
    model, x = perturb(small()), images(3)
    posterior = model.encode(x)
    assert torch.allclose(model.decoder(posterior.mean), model(x, torch.zeros(3, *model.latent_shape)).output, atol=1e-5)
    assert torch.equal(model.reconstruct(x), model.decode(posterior.mean))


def test_the_kl_of_each_layer_is_invariant_under_whitening() -> None:
    model, x = perturb(small()), images(3)
    heads: list[Tensor] = []
    for layer in model.decoder.layers:
        for module in (layer.posterior, layer.prior):
            module.register_forward_hook(lambda _, inputs, output: heads.append(output))
    terms = model(x, noise_for(model, 3))
    for column, (q, p) in enumerate(zip(heads[::2], heads[1::2], strict=True)):
        m, s = (5 * torch.tanh(x / 5) for x in q.chunk(2, 1))
        mean, log_sigma = p[:, :4], 5 * torch.tanh(p[:, 4:8] / 5)
        prior = torch.distributions.Normal(mean, log_sigma.exp())
        posterior = torch.distributions.Normal(mean + m * log_sigma.exp(), (s + log_sigma).exp())
        exact = torch.distributions.kl_divergence(posterior, prior).sum((1, 2, 3))
        assert exact.min() > 0.01
        assert torch.allclose(terms.kl[:, column], exact, rtol=1e-4, atol=1e-3)


def test_the_mean_log_ratio_is_the_negative_kl() -> None:
    model, num_samples = perturb(small(width=8)), 400
    x = images(2).repeat_interleave(num_samples, 0)
    torch.manual_seed(2)
    with torch.no_grad():
        terms = model(x, noise_for(model, len(x)))
    for kl, ratio in zip(terms.kl.sum(1).split(num_samples), terms.log_ratio.split(num_samples), strict=True):
        spread = (ratio + kl).std() / num_samples**0.5
        assert kl.mean() > 10 * spread
        assert (ratio + kl).mean().abs() < 4 * spread


def test_every_prior_is_initialized_to_a_standard_normal() -> None:
    model = small()
    for layer in model.decoder.layers:
        layer.prior.register_forward_hook(lambda _, inputs, output: heads.append(output))
    heads: list[Tensor] = []
    model(images(2), noise_for(model, 2))
    assert len(heads) == len(model.layer_sizes)
    assert not any(head.any() for head in heads)


def test_samples_depend_on_the_seed_and_the_temperature() -> None:
    model = perturb(small()).eval()
    assert torch.equal(model.sample(2, seed=1, temperature=0.0), model.sample(2, seed=2, temperature=0.0))
    assert torch.equal(model.sample(2, seed=1), model.sample(2, seed=1))
    assert torch.allclose(model.sample(4, seed=1, batch_size=3)[:2], model.sample(2, seed=1), atol=1e-5)
    for options in ({"seed": 2}, {"seed": 1, "temperature": 0.5}):
        assert (model.sample(2, **options) - model.sample(2, seed=1)).abs().max() > 1e-3  # type: ignore[arg-type]


def test_features_stay_in_channels_last_memory() -> None:
    model = small().to(memory_format=torch.channels_last)
    channels_last = []
    for layer in [*model.encoder.modules(), *model.decoder.modules()]:
        if isinstance(layer, torch.nn.Conv2d) and layer.in_channels > 1:
            layer.register_forward_hook(
                lambda _, inputs, output: channels_last.append(output.is_contiguous(memory_format=torch.channels_last))
            )
    x = images(2).contiguous(memory_format=torch.channels_last)
    terms = model(x, noise_for(model, 2))
    assert len(channels_last) > 50
    assert all(channels_last)
    plain = small()(x, torch.zeros(2, *model.latent_shape)).elbo
    assert torch.allclose(model(x, torch.zeros(2, *model.latent_shape)).elbo, plain, rtol=1e-5)
    assert terms.elbo.isfinite().all()


def test_the_kl_is_in_fp32_under_autocast() -> None:
    model, x = perturb(small()), images(2)
    noise = noise_for(model, 2)
    with torch.autocast("cpu", torch.bfloat16):
        terms = model(x, noise)
    assert terms.kl.dtype == terms.log_ratio.dtype == terms.log_prob.dtype == torch.float32
    assert torch.allclose(terms.kl.sum(1), model(x, noise).kl.sum(1), rtol=0.05)


def test_the_model_exports_for_any_batch_size(tmp_path: Path) -> None:
    parts = export_model(perturb(small()).eval(), tmp_path / "out", "torch", {})["parts"]
    assert sorted(parts) == ["decoder", "encoder"]
    assert all(part["max_difference"] < 1e-4 for part in parts.values())


def test_one_and_two_processes_give_the_same_losses(shards: Path, tmp_path: Path) -> None:
    network = ["--model.preset=hierarchical", "--model.patch_size=8", "--model.num_res_blocks=1", "--model.latent_channels=2"]
    for processes in (1, 2):
        words = [f"--data.shards={shards}", f"--run={tmp_path / str(processes)}", *TINY, *network, "--track.tracker=none"]
        train(processes, *words, "--train.images=60", "--train.log_every=1")
    assert list(losses(tmp_path / "2").values()) == pytest.approx(list(losses(tmp_path / "1").values()), rel=1e-4)


def step(model: HierarchicalVAE, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    """Runs one training step and returns the negative ELBO in nats per image."""
    terms = model(x, noise_for(model, len(x)))
    loss = -terms.elbo.mean()
    (loss / model.dimensions).backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    model.likelihood.update_scale(model.likelihood.reconstruction_error(terms.output, x), torch.tensor(True))
    return loss.detach()


def test_every_parameter_gets_a_gradient_after_three_steps() -> None:
    model, x = small(likelihood="gaussian", likelihood_scale=0.5), images(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):  # zero-initialized layers block the gradients of the layers before them
        optimizer.zero_grad()
        step(model, optimizer, x)
    without_gradient = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without_gradient


def test_training_lowers_the_loss_and_uses_at_least_three_layers() -> None:
    model = small(num_res_blocks=1).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), fused=True)
    data, held_out = images(256), images(32, seed=1)

    def evaluate() -> tuple[float, Tensor]:
        torch.manual_seed(3)
        with torch.no_grad():
            terms = model(held_out, noise_for(model, 32))
        return -terms.elbo.mean().item() / model.dimensions, terms.kl.mean(0)

    before, _ = evaluate()
    torch.manual_seed(4)
    for _ in range(80):
        optimizer.zero_grad()
        step(model, optimizer, data[torch.randint(len(data), (16,))])
    after, kl = evaluate()
    assert after < before - 0.7, (before, after)  # nats per dimension
    assert (kl > 20).sum() >= 3, kl
