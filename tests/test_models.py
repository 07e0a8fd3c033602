"""The networks, likelihoods and the mixture prior, compared with closed forms and with PyTorch."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import discs
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import vae_scale
from vae_scale import ResNetVAE
from vae_scale.config.options import PRESETS, Config, ObjectiveConfig, VAEConfig
from vae_scale.data.transfer import normalize_images
from vae_scale.errors import UserError
from vae_scale.models.blocks import Attention, GroupNorm, ResBlock, depth_to_space, space_to_depth
from vae_scale.models.likelihoods import LEVELS_PER_UNIT, Gaussian, SigmoidMSE, bits_per_dim
from vae_scale.models.mixture import GaussianMixture
from vae_scale.models.networks import build_model
from vae_scale.models.vae import VAE, Posterior, slerp
from vae_scale.runtime import checkpoint
from vae_scale.training.objectives import ELBO


def tiny(**options: object) -> VAE:
    torch.manual_seed(0)
    return build_model(VAEConfig(preset="tiny", **(PRESETS["tiny"] | {"width": 16} | options)), 96).eval()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("latent", ["spatial", "vector"])
def test_every_preset_maps_images_to_latents_and_back(preset: str, latent: str) -> None:
    options = PRESETS[preset] | ({"latent": latent} if PRESETS[preset].get("network", "resnet") == "resnet" else {})
    with torch.device("meta"):
        config = VAEConfig(preset=preset, **options)  # type: ignore[arg-type]
        model = build_model(config, 96)
        images = torch.empty(2, 3, 96, 96)
        posterior = model.encode(images)
        assert posterior.mean.shape == (2, *model.latent_shape)
        assert model.reconstruct(images).shape == images.shape
        terms = model(images, torch.empty(2, *model.latent_shape))
        assert terms.elbo.shape == (2,)
        assert terms.kl.shape == (2, config.latent_channels)
    if config.latent == "vector":
        assert model.latent_shape[1:] == (1, 1)
    else:
        assert model.latent_shape[1:] == (96 // config.downsampling_factor,) * 2


def test_the_seed_notebook_network_has_the_layers_of_the_notebook() -> None:
    with torch.device("meta"):
        model = build_model(VAEConfig(preset="seed_notebook", **PRESETS["seed_notebook"]), 96)
    kernels = [tuple(layer.weight.shape) for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert kernels == [(32, 3, 7, 7), (64, 32, 5, 5), (128, 64, 7, 7), (3, 32, 7, 7)]
    widths = [tuple(layer.weight.shape) for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    flat = 128 * 24 * 24
    assert widths == [(512, flat), (256, 512), (20, 256), (256, 10), (512, 256), (flat, 512)]
    assert model.latent_shape == (10, 1, 1)


@pytest.mark.parametrize("layer", [ResBlock(8), Attention(8)])
def test_residual_blocks_are_initialized_to_the_identity(layer: torch.nn.Module) -> None:
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(layer(x), x)


@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 2, 4]))
@settings(deadline=None)
def test_depth_to_space_inverts_space_to_depth(batch: int, side: int, block: int) -> None:
    x = torch.randn(batch, 3, side * block, side * block)
    folded = space_to_depth(x, block)
    assert folded.shape == (batch, 3 * block**2, side, side)
    assert torch.equal(depth_to_space(folded, block), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_equals_pytorchs_in_channels_last_memory(dtype: torch.dtype) -> None:
    layer, reference = GroupNorm(8, 32).to(dtype), torch.nn.GroupNorm(8, 32).to(dtype)
    x = torch.randn(4, 32, 6, 5).to(dtype, memory_format=torch.channels_last)
    output = layer(x)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(output, reference(x), atol=0 if dtype == torch.float32 else 0.03)


def test_features_stay_in_channels_last_memory() -> None:
    model = tiny().to(memory_format=torch.channels_last)
    x = normalize_images(torch.from_numpy(discs(2, 0)))
    assert x.is_contiguous(memory_format=torch.channels_last)
    channels_last = []
    for layer in model.modules():
        if isinstance(layer, ResBlock):
            layer.register_forward_hook(
                lambda _, inputs, output: channels_last.append(output.is_contiguous(memory_format=torch.channels_last))
            )
    model.reconstruct(x)
    assert channels_last
    assert all(channels_last)


def test_uint8_levels_become_minus_one_to_one_and_flips_mirror() -> None:
    images = torch.from_numpy(discs(2, 0))
    x = normalize_images(images, torch.tensor([True, False]))
    plain = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.equal(x[0], plain[0].flip(2))
    assert torch.equal(x[1], plain[1])
    assert normalize_images(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)).flatten().tolist() == [-1, 1]


def test_kl_equals_pytorchs_and_a_monte_carlo_estimate() -> None:
    torch.manual_seed(1)
    posterior = Posterior(torch.randn(3, 4, 2, 2), 0.5 * torch.randn(3, 4, 2, 2))
    normal = torch.distributions.Normal(posterior.mean, posterior.log_sigma.exp())
    prior = torch.distributions.Normal(0.0, 1.0)
    exact = torch.distributions.kl_divergence(normal, prior).sum((2, 3))
    assert torch.allclose(posterior.kl(), exact, atol=1e-5)
    samples = torch.stack([posterior.sample(torch.randn(3, 4, 2, 2)) for _ in range(20_000)])
    estimate = (normal.log_prob(samples) - prior.log_prob(samples)).mean(0).sum((1, 2, 3))
    assert torch.allclose(posterior.kl().sum(1), estimate, rtol=0.03)


def gaussian(scale: float) -> Gaussian:
    likelihood = Gaussian()
    likelihood.log_scale.fill_(math.log(scale))
    return likelihood


@pytest.mark.parametrize("scale", [0.05, 0.3])
def test_the_gaussian_likelihood_integrates_to_one_over_grey_levels(scale: float) -> None:
    likelihood = gaussian(scale)
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64).float()
    density = likelihood.log_prob(torch.full((len(x), 1, 1, 1), 0.3), x[:, None, None, None]).double().exp()
    assert torch.trapezoid(density, x.double() * LEVELS_PER_UNIT).item() == pytest.approx(1, abs=1e-3)


def test_the_gaussian_likelihood_equals_pytorchs() -> None:
    output, x = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    reference = (torch.distributions.Normal(output, 0.2).log_prob(x) - math.log(LEVELS_PER_UNIT)).sum((1, 2, 3))
    assert torch.allclose(gaussian(0.2).log_prob(output, x), reference, rtol=1e-4)


def test_the_sigmoid_likelihood_is_normalized() -> None:
    x = torch.linspace(-16, 16, 200_001, dtype=torch.float64).float()
    density = SigmoidMSE().log_prob(torch.full((len(x), 1, 1, 1), 0.7), x[:, None, None, None]).double().exp()
    levels = (x.double() + 1) / 2 * 255
    assert torch.trapezoid(density, levels).item() == pytest.approx(1, abs=1e-3)


def test_the_sigmoid_likelihood_gives_the_loss_of_the_notebook() -> None:
    output, x = torch.randn(4, 3, 5, 5), torch.rand(4, 3, 5, 5) * 2 - 1
    squared = (output.sigmoid() - (x + 1) / 2).square().sum((1, 2, 3))
    constant = -SigmoidMSE().log_prob(output, x) - squared
    assert torch.allclose(constant, constant[0].expand(4), rtol=1e-5)


def test_the_optimal_scale_converges_to_the_error_and_maximizes_the_likelihood() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 10, 10)
    likelihood, output = Gaussian(), x + 0.1 * torch.randn_like(x)
    for _ in range(200):
        likelihood.update_scale(likelihood.reconstruction_error(output, x), torch.tensor(True))
    best = (output - x).square().mean().sqrt().item()
    assert likelihood.log_scale.exp().item() == pytest.approx(best, rel=1e-3)
    at_best = likelihood.log_prob(output, x).sum()
    for factor in (0.9, 1.1):
        assert gaussian(best * factor).log_prob(output, x).sum() < at_best


def test_the_elbo_is_below_the_importance_weighted_bound() -> None:
    """log p(x) >= E[log 1/K sum w] >= ELBO (Burda et al., 2016)."""
    model = tiny(latent="vector", latent_channels=2)
    model.likelihood.log_scale.fill_(0.0)
    x = normalize_images(torch.from_numpy(discs(2, 0)))
    torch.manual_seed(0)
    with torch.no_grad():
        posterior = model.encode(x)
        normal = torch.distributions.Normal(posterior.mean, posterior.log_sigma.exp())
        weights, elbos = [], []
        for _ in range(64):
            noise = torch.randn(2, *model.latent_shape)
            z = posterior.sample(noise)
            log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum((1, 2, 3))
            log_posterior = normal.log_prob(z).sum((1, 2, 3))
            log_prob = model.likelihood.log_prob(model.decoder(z), x)
            weights.append(log_prob + log_prior - log_posterior)
            elbos.append(model(x, noise).elbo)
    elbo, single = torch.stack(elbos).mean(0), torch.stack(weights).mean(0)
    bound = torch.stack(weights).logsumexp(0) - math.log(64)
    assert torch.allclose(elbo, single, atol=0.5)  # nats; two estimates of the same value
    assert (bound >= elbo - 0.1).all()


def test_the_kl_is_in_fp32_under_autocast() -> None:
    model, x = tiny(), normalize_images(torch.from_numpy(discs(2, 0)))
    noise = torch.randn(2, *model.latent_shape)
    with torch.autocast("cpu", torch.bfloat16):
        terms = model(x, noise)
    assert terms.kl.dtype == terms.log_ratio.dtype == terms.log_prob.dtype == torch.float32
    assert torch.allclose(terms.kl.sum(1), model(x, noise).kl.sum(1), rtol=0.05)


@pytest.mark.parametrize("latent", ["spatial", "vector"])
def test_every_parameter_gets_a_gradient(latent: str) -> None:
    model = tiny(latent=latent, attention=True)
    with torch.no_grad():
        for parameter in model.parameters():  # zero-initialized layers block the gradients of the layers before them
            parameter.add_(0.05 * torch.randn_like(parameter))
    x = normalize_images(torch.from_numpy(discs(2, 0)))
    model(x, torch.randn(2, *model.latent_shape)).elbo.sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_the_objective_is_the_negative_elbo_per_dimension_with_a_weighted_kl() -> None:
    model = tiny()
    images = torch.from_numpy(discs(4, 0))
    noise = torch.randn(4, *model.latent_shape)
    random_inputs = {"noise": noise, "flips": torch.zeros(4, dtype=torch.bool)}
    terms = model(normalize_images(images), noise)
    loss, metrics = ELBO(model, Config())(images, random_inputs)
    assert loss.item() == pytest.approx(-terms.elbo.mean().item() / model.dimensions, rel=1e-5)
    assert metrics["loss"].item() == pytest.approx(-terms.elbo.mean().item(), rel=1e-5)
    half, _ = ELBO(model, Config(objective=ObjectiveConfig(beta=0.5)))(images, random_inputs)
    kl = terms.kl.sum(1).mean().item() / model.dimensions
    assert loss.item() - half.item() == pytest.approx(0.5 * kl, rel=1e-2)


def test_bits_per_dim() -> None:
    assert bits_per_dim(math.log(256) * 27_648, 27_648) == pytest.approx(8)


def test_samples_do_not_depend_on_the_batch_size_or_their_number() -> None:
    model = tiny()
    torch.nn.init.normal_(model.decoder.head.weight, std=0.1)  # type: ignore[union-attr]
    few, many = model.sample(5, seed=7, batch_size=5), model.sample(12, seed=7, batch_size=4)
    assert few.std() > 0.01
    assert torch.allclose(few, many[:5], atol=1e-5)
    assert not torch.allclose(few, model.sample(5, seed=8), atol=1e-2)
    assert torch.equal(model.sample(2, temperature=0.0)[0], model.sample(2, temperature=0.0)[1])


def test_slerp_preserves_the_norm() -> None:
    first, last = torch.randn(2, 8, 1, 1)
    first, last = first / first.norm(), last / last.norm()
    for t in (0.0, 0.3, 1.0):
        assert slerp(first, last, t).norm().item() == pytest.approx(1, abs=1e-4)
    assert torch.allclose(slerp(first, last, 0.0), first, atol=1e-5)
    assert torch.allclose(slerp(first, last, 1.0), last, atol=1e-5)


def test_a_model_is_saved_and_loaded_with_its_prior(tmp_path: Path) -> None:
    model = tiny(latent="vector", latent_channels=4)
    torch.nn.init.normal_(model.decoder.head.weight, std=0.1)  # type: ignore[union-attr]
    model.mixture = GaussianMixture.fit(torch.randn(200, 4), torch.rand(200, 4), seed=0)
    model.save_pretrained(tmp_path)
    loaded = ResNetVAE.from_pretrained(tmp_path)
    assert torch.equal(model.sample(3), loaded.sample(3))
    assert not torch.equal(loaded.sample(3), loaded.sample(3, prior="normal"))
    assert "mixture" in loaded.describe_prior()
    assert loaded.describe_prior("normal") == "N(0, I)"


def test_load_reads_a_saved_model_a_checkpoint_and_a_run(tmp_path: Path) -> None:
    model = tiny()
    averaged = {name: torch.full_like(tensor, 0.5) for name, tensor in model.state_dict().items()}
    writer = checkpoint.CheckpointWriter(tmp_path, keep=3)
    for images_seen in (100, 200, 300):
        writer.save(images_seen, {"model": model.state_dict(), "ema": averaged}, {}, dict(model.to_config()))
        writer.wait()
    (checkpoint.checkpoint_folder(tmp_path, 300) / "ema.safetensors").write_bytes(b"truncated")
    model.save_pretrained(tmp_path / "saved")
    for name in (tmp_path, checkpoint.checkpoint_folder(tmp_path, 200)):
        assert all(torch.equal(tensor, averaged[key]) for key, tensor in vae_scale.load(name).state_dict().items())
    checkpoint_weights = vae_scale.load(tmp_path, "model.safetensors").state_dict()
    for state in (vae_scale.load(tmp_path / "saved").state_dict(), checkpoint_weights):
        assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in state.items())


def test_a_model_of_another_format_version_raises_a_one_line_error(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model.to_config() | {"format_version": 2}))
    with pytest.raises(UserError, match="has format version 2, and this version of vae_scale reads 4") as caught:
        VAE.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_invalid_model_raises_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: missing"):
        VAE.from_pretrained(tmp_path)
    model = tiny()
    model.save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="not a model"):
        VAE.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="no/such-model"):
        VAE.from_pretrained("no/such-model")
    with pytest.raises(UserError, match="prior gmm"):
        model.sample(1, prior="gmm")


def test_a_mixture_fits_the_clusters_of_the_latents() -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[4.0, 0.0], [-4.0, 1.0], [0.0, -5.0]])
    points = centres[torch.randint(3, (600,))] + 0.3 * torch.randn(600, 2)
    mixture = GaussianMixture.fit(points, torch.full_like(points, 0.1), seed=0)
    samples = mixture.sample(range(500), seed=1, temperature=1.0)
    assert torch.cdist(samples, centres).amin(1).max() < 2
    assert mixture.log_prob(samples).mean() > mixture.log_prob(4 * torch.randn(500, 2)).mean() + 5
    assert torch.equal(mixture.sample(range(7), 1, 1.0), samples[:7])
    without_noise = mixture.sample(range(500), seed=1, temperature=0.0)
    assert len(without_noise.unique(dim=0)) <= len(mixture.weights)


def test_the_density_of_a_mixture_equals_pytorchs() -> None:
    torch.manual_seed(0)
    mixture = GaussianMixture.fit(torch.randn(300, 3), torch.rand(300, 3), seed=0)
    reference = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(mixture.weights),
        torch.distributions.MultivariateNormal(mixture.means, scale_tril=mixture.factors),
    )
    points = torch.randn(10, 3)
    assert torch.allclose(mixture.log_prob(points), reference.log_prob(points), atol=1e-4)


def test_a_mixture_includes_the_variance_of_each_posterior() -> None:
    """A collapsed channel has means near 0 and sigma near 1; its aggregate is N(0, 1), not a point."""
    torch.manual_seed(0)
    mean = torch.cat([torch.randn(50, 1), 1e-3 * torch.randn(50, 1)], 1)
    mixture = GaussianMixture.fit(mean, torch.tensor([0.1, 1.0]).expand(50, 2), seed=0)
    samples = mixture.sample(range(4000), seed=0, temperature=1.0)
    assert samples[:, 1].std().item() == pytest.approx(1, abs=0.1)
