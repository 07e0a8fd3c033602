"""Adversarial training: disabled by default; otherwise gradients have the configured norm."""

from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

from launch import losses, train
from vae_scale.config.options import Config, ObjectiveConfig, VAEConfig
from vae_scale.config.parsing import parse
from vae_scale.errors import UserError
from vae_scale.models.discriminator import Discriminator
from vae_scale.models.networks import build_model
from vae_scale.models.vae import VAE
from vae_scale.runtime import checkpoint
from vae_scale.training.objectives import ELBO
from vae_scale.training.trainer import Trainer

MODEL = VAEConfig(
    preset="tiny", patch_size=4, width=8, channel_mult=[1, 2], num_res_blocks=1, latent_channels=4, likelihood_scale=0.5
)
ADVERSARIAL = [
    "--objective.adversarial_weight=0.5",
    "--objective.feature_matching_weight=0.5",
    "--objective.discriminator_width=8",
    "--objective.discriminator_start=60",
]
IMAGES = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
NOISE = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(2))


def build_objective(**weights: float) -> ELBO:
    torch.manual_seed(0)
    config = Config(model=MODEL, objective=ObjectiveConfig(**weights))  # type: ignore[arg-type]
    model = build_model(MODEL, 32)
    for parameter in model.decoder.parameters():  # a zero-initialized last layer would block gradients
        torch.nn.init.normal_(parameter, std=0.1)
    model.discriminator = Discriminator(8)
    return ELBO(model, config)


def gradients(objective: ELBO, adversarial_factor: float) -> dict[str, torch.Tensor]:
    objective.zero_grad()
    objective(IMAGES, {"noise": NOISE}, torch.tensor(1.0), torch.tensor(adversarial_factor))[0].backward()
    return {name: p.grad.clone() for name, p in objective.model.named_parameters() if p.grad is not None}


def test_there_is_no_discriminator_by_default(shards: Path, tmp_path: Path) -> None:
    trainer = Trainer(parse([f"--data.shards={shards}", f"--run={tmp_path}", *TINY, "--track.tracker=none"])[0])
    assert trainer.model.discriminator is None
    assert not any(name.startswith("discriminator") for name in trainer.model.state_dict())


@pytest.mark.parametrize("weights", [{"adversarial_weight": 0.5}, {"feature_matching_weight": 0.5}])
def test_the_vae_gets_adversarial_gradients_only_if_the_factor_is_one(weights: dict[str, float]) -> None:
    objective = build_objective(**weights)
    off, on = gradients(objective, 0), gradients(objective, 1)
    plain = build_objective()
    plain.model.load_state_dict(objective.model.state_dict())
    plain.model.discriminator = None
    reference = gradients(plain, 0)
    assert all(torch.allclose(off[name], gradient, atol=1e-7) for name, gradient in reference.items())
    for name in ("encoder.stem.weight", "decoder.head.weight"):
        assert (on[name] - off[name]).norm() > 0.01 * off[name].norm()
    for name in off:
        if name.startswith("discriminator."):
            assert off[name].norm() > 0 or name == "discriminator.head.bias"  # the two terms of the hinge loss cancel
            assert torch.allclose(on[name], off[name], atol=1e-7), "the decoder's loss must not change the discriminator"


@pytest.mark.parametrize("weight", [0.25, 2.0])
def test_the_adversarial_gradient_of_each_image_has_the_configured_norm(weight: float) -> None:
    objective = build_objective(adversarial_weight=weight)
    model, x = objective.model, objective.preprocess(IMAGES, {})
    terms = model(x, NOISE)
    loss = objective.adversarial_terms(x, terms)[0]
    adversarial = torch.autograd.grad(loss, terms.output, retain_graph=True)[0] * len(x)
    reconstruction = torch.autograd.grad(terms.log_prob.sum(), terms.output)[0]
    in_range = terms.output.abs().flatten(1).amax(1) < 1  # clamped values have no gradient
    assert in_range.any()
    ratio = adversarial.flatten(1).norm(dim=1) / reconstruction.flatten(1).norm(dim=1)
    assert torch.allclose(ratio[in_range], torch.full_like(ratio[in_range], weight), rtol=1e-3)


def test_a_step_against_the_adversarial_gradient_raises_the_logits() -> None:
    objective = build_objective(adversarial_weight=1.0)
    model, x = objective.model, objective.preprocess(IMAGES, {})
    terms = model(x, NOISE)
    gradient = torch.autograd.grad(objective.adversarial_terms(x, terms)[0], terms.output)[0]
    assert model.discriminator is not None
    images = terms.output.detach()
    step = 1e-2 * gradient / gradient.norm()
    assert model.discriminator(images - step)[0].mean() > model.discriminator(images)[0].mean()


@pytest.mark.parametrize("adversarial_factor", [0.0, 1.0])
def test_gradients_in_fp16_are_finite_and_close_to_fp32(adversarial_factor: float) -> None:
    objective = build_objective(adversarial_weight=0.5, feature_matching_weight=0.5)
    with torch.no_grad():
        objective.model.likelihood.log_scale.fill_(-5.8)  # type: ignore[operator,union-attr]
    assert objective.model.discriminator is not None
    for layer in objective.model.discriminator.layers:  # small logits, whose gradients would underflow in fp16
        torch.nn.init.normal_(layer.weight, std=2e-3)  # type: ignore[arg-type]
    exact = gradients(objective, adversarial_factor)
    with torch.autocast("cpu", torch.float16):
        lowered = gradients(objective, adversarial_factor)
    assert all(gradient.isfinite().all() for gradient in lowered.values())
    for name in ("discriminator.layers.0.weight", "discriminator.head.weight", "decoder.head.weight"):
        assert torch.nn.functional.cosine_similarity(lowered[name].flatten(), exact[name].flatten(), dim=0) > 0.98


def test_a_discriminator_learns_to_separate_real_and_fake_images() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(8)
    optimizer = torch.optim.Adam(discriminator.parameters(), 2e-3)
    for _ in range(60):
        real, fake = torch.rand(8, 3, 32, 32).round() * 2 - 1, torch.rand(8, 3, 32, 32) - 0.5
        loss = (1 - discriminator(real)[0]).relu().mean() + (1 + discriminator(fake)[0]).relu().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5


def test_resuming_adversarial_training_is_bit_identical(shards: Path, tmp_path: Path) -> None:
    def words(run: str, images: int) -> list[str]:
        more = ["--train.log_every=1", "--checkpoint.every=60", f"--train.images={images}", "--optimizer.schedule=constant"]
        return [f"--data.shards={shards}", f"--run={tmp_path / run}", *TINY, *ADVERSARIAL, *more, "--track.tracker=none"]

    Trainer(parse(words("uninterrupted", 120))[0]).run()
    for images in (60, 120):
        Trainer(parse(words("resumed", images))[0]).run()
    assert losses(tmp_path / "uninterrupted") == losses(tmp_path / "resumed")
    folders = [checkpoint.checkpoint_folder(tmp_path / run, 120) for run in ("uninterrupted", "resumed")]
    uninterrupted, resumed = (load_file(folder / "model.safetensors") for folder in folders)
    assert any(name.startswith("discriminator.") for name in uninterrupted)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items())
    assert VAE.from_pretrained(folders[0], "ema.safetensors").discriminator is None


def test_one_and_two_processes_give_the_same_losses(shards: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        words = [f"--data.shards={shards}", f"--run={tmp_path / str(processes)}", *TINY, *ADVERSARIAL, "--track.tracker=none"]
        train(processes, *words, "--train.images=120", "--train.log_every=1")
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert list(two.values()) == pytest.approx(list(one.values()), rel=2e-4)


def test_a_discriminator_requires_a_likelihood_whose_output_is_an_image() -> None:
    with pytest.raises(UserError, match=r"objective\.adversarial_weight requires model\.likelihood gaussian or laplace"):
        parse(["--objective.adversarial_weight=0.5", "--model.likelihood=logistic_mixture"])
