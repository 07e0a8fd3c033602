"""Training against a critic: off by default, and doing what it says when it is on."""

from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

from launch import losses, train
from vae_scale.config import Config, ObjectiveConfig, VAEConfig, parse
from vae_scale.errors import UserError
from vae_scale.models.critic import Critic
from vae_scale.models.networks import build
from vae_scale.models.vae import VAE
from vae_scale.training import checkpoint
from vae_scale.training.objective import ELBO
from vae_scale.training.trainer import Trainer

MODEL = VAEConfig(preset="tiny", patch=4, width=8, multipliers=[1, 2], blocks=1, latent_channels=4, scale=0.5)
ON = ["--objective.adversarial=0.5", "--objective.perceptual=0.5", "--objective.critic_width=8", "--objective.critic_start=60"]


def objective(**weights: float) -> ELBO:
    torch.manual_seed(0)
    config = Config(model=MODEL, objective=ObjectiveConfig(**weights))  # type: ignore[arg-type]
    model = build(MODEL, 32)
    for parameter in model.decoder.parameters():  # its last layer starts at zero, where nothing flows
        torch.nn.init.normal_(parameter, std=0.1)
    model.critic = Critic(8)
    return ELBO(model, config)


def gradients(loss_of: ELBO, heard: float, images: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
    loss_of.zero_grad()
    loss_of(images, {"noise": noise}, torch.tensor(1.0), torch.tensor(heard))[0].backward()
    return {name: p.grad.clone() for name, p in loss_of.model.named_parameters() if p.grad is not None}


IMAGES = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
NOISE = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(2))


def test_there_is_no_critic_unless_it_is_asked_for(shards: Path, tmp_path: Path) -> None:
    trainer = Trainer(parse([f"--data.shards={shards}", f"--run={tmp_path}", *TINY, "--track.tracker=none"])[0])
    assert trainer.model.critic is None
    assert not any(name.startswith("critic") for name in trainer.model.state_dict())


@pytest.mark.parametrize("weights", [{"adversarial": 0.5}, {"perceptual": 0.5}])
def test_its_gradients_reach_encoder_and_decoder_only_when_it_is_heard(weights: dict[str, float]) -> None:
    loss_of = objective(**weights)
    deaf, heard = gradients(loss_of, 0, IMAGES, NOISE), gradients(loss_of, 1, IMAGES, NOISE)
    plain = objective()
    plain.model.load_state_dict(loss_of.model.state_dict())
    plain.model.critic = None
    alone = gradients(plain, 0, IMAGES, NOISE)
    assert all(torch.allclose(deaf[name], gradient, atol=1e-7) for name, gradient in alone.items())
    for part in ("encoder.stem.weight", "decoder.head.weight"):
        assert (heard[part] - deaf[part]).norm() > 0.01 * deaf[part].norm()
    for name in deaf:
        if name.startswith("critic."):
            assert deaf[name].norm() > 0 or name == "critic.head.bias"  # as many real as rebuilt: it cancels out
            assert torch.allclose(heard[name], deaf[name], atol=1e-7), "the decoder's wishes must not move the critic"


@pytest.mark.parametrize("share", [0.25, 2.0])
def test_the_push_on_each_image_is_the_stated_multiple_of_the_reconstructions_pull(share: float) -> None:
    loss_of = objective(adversarial=share)
    model, x = loss_of.model, loss_of.prepare(IMAGES, {})
    terms = model(x, NOISE)
    push = torch.autograd.grad(loss_of._criticised(x, terms)[0], terms.output, retain_graph=True)[0] * len(x)
    pull = torch.autograd.grad(terms.log_prob.sum(), terms.output)[0]
    inside = terms.output.abs().flatten(1).amax(1) < 1  # clamping an image takes gradients away
    assert inside.any()
    ratio = push.flatten(1).norm(dim=1) / pull.flatten(1).norm(dim=1)
    assert torch.allclose(ratio[inside], torch.full_like(ratio[inside], share), rtol=1e-3)


def test_the_push_makes_images_look_more_real_to_the_critic() -> None:
    loss_of = objective(adversarial=1.0)
    model, x = loss_of.model, loss_of.prepare(IMAGES, {})
    terms = model(x, NOISE)
    direction = torch.autograd.grad(loss_of._criticised(x, terms)[0], terms.output)[0]
    assert model.critic is not None
    shown = terms.output.detach()
    step = 1e-2 * direction / direction.norm()
    assert model.critic(shown - step)[0].mean() > model.critic(shown)[0].mean()


@pytest.mark.parametrize("heard", [0.0, 1.0])
def test_in_fp16_it_is_finite_and_pushes_as_in_fp32(heard: float) -> None:
    loss_of = objective(adversarial=0.5, perceptual=0.5)
    with torch.no_grad():
        loss_of.model.likelihood.log_scale.fill_(-5.8)  # type: ignore[operator,union-attr]
    assert loss_of.model.critic is not None
    for layer in loss_of.model.critic.layers:  # whose verdicts say hardly anything: their gradients are below fp16's range
        torch.nn.init.normal_(layer.weight, std=2e-3)  # type: ignore[arg-type]
    exact = gradients(loss_of, heard, IMAGES, NOISE)
    with torch.autocast("cpu", torch.float16):
        lowered = gradients(loss_of, heard, IMAGES, NOISE)
    assert all(gradient.isfinite().all() for gradient in lowered.values())
    for name in ("critic.layers.0.weight", "critic.head.weight", "decoder.head.weight"):
        assert torch.nn.functional.cosine_similarity(lowered[name].flatten(), exact[name].flatten(), dim=0) > 0.98


def test_a_critic_learns_to_tell_real_images_from_others() -> None:
    torch.manual_seed(0)
    critic = Critic(8)
    optimizer = torch.optim.Adam(critic.parameters(), 2e-3)
    for _ in range(60):
        real, fake = torch.rand(8, 3, 32, 32).round() * 2 - 1, torch.rand(8, 3, 32, 32) - 0.5
        loss = (1 - critic(real)[0]).relu().mean() + (1 + critic(fake)[0]).relu().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5


def test_a_run_with_a_critic_resumes_bit_for_bit_and_its_model_needs_none(shards: Path, tmp_path: Path) -> None:
    def words(run: str, images: int) -> list[str]:
        more = ["--train.log_every=1", "--checkpoint.every=60", f"--train.images={images}", "--optimizer.schedule=constant"]
        return [f"--data.shards={shards}", f"--run={tmp_path / run}", *TINY, *ON, *more, "--track.tracker=none"]

    Trainer(parse(words("whole", 120))[0]).run()
    for images in (60, 120):
        Trainer(parse(words("parts", images))[0]).run()
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    folders = [checkpoint.folder_of(tmp_path / run, 120) for run in ("whole", "parts")]
    whole, parts = (load_file(folder / "model.safetensors") for folder in folders)
    assert any(name.startswith("critic.") for name in whole)
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    assert VAE.from_pretrained(folders[0], "ema.safetensors").critic is None


def test_one_and_two_processes_train_against_a_critic_alike(shards: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        words = [f"--data.shards={shards}", f"--run={tmp_path / str(processes)}", *TINY, *ON, "--track.tracker=none"]
        train(processes, *words, "--train.images=120", "--train.log_every=1")
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert list(two.values()) == pytest.approx(list(one.values()), rel=2e-4)


def test_a_critic_goes_with_likelihoods_whose_output_is_an_image() -> None:
    with pytest.raises(UserError, match=r"objective\.adversarial goes with model\.likelihood gaussian or laplace"):
        parse(["--objective.adversarial=0.5", "--model.likelihood=logistic_mixture"])
