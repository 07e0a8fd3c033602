"""The whole loss path in one module, so that DDP, autocast and torch.compile see all of it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_scale.config import Config
from vae_scale.models.vae import VAE, Terms
from vae_scale.training.augmentation import augment


def to_model(images: Tensor, flips: Tensor | None = None) -> Tensor:
    """uint8 [b, h, w, 3] to [-1, 1], [b, 3, h, w] in channels_last memory; those with `flips` [b] are mirrored."""
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return x if flips is None else torch.where(flips[:, None, None, None], x.flip(3), x)


def bits_per_dim(nats: float, dimensions: int) -> float:
    """Nats per image in bits per number of the image."""
    return nats / (dimensions * math.log(2))


class Objective(nn.Module):
    """A loss of images: their way to the network, and what `measure` makes of it.

    Args:
        model: The VAE.
        config: Of the run.
    """

    def __init__(self, model: VAE, config: Config) -> None:
        super().__init__()
        self.model = model
        self.crop, self.colour = config.data.crop, config.data.colour

    def prepare(self, images: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """uint8 [b, h, w, 3] to what the network sees, [b, 3, h, w] in [-1, 1]: mirrored and augmented."""
        x = to_model(images, draws.get("flips"))
        return augment(x, draws["augmentation"], self.crop, self.colour) if "augmentation" in draws else x


class ELBO(Objective):
    """-log p(image | latent) + beta KL(q || p), in nats per image (Kingma & Welling, 2014, eq. 3, for beta = 1).

    With a critic, the decoder also follows what the critic says against its images, and the critic learns at the same time.
    """

    def __init__(self, model: VAE, config: Config) -> None:
        super().__init__(model, config)
        self.free_bits = config.objective.free_bits
        self.adversarial, self.perceptual = config.objective.adversarial, config.objective.perceptual

    def forward(self, images: Tensor, draws: dict[str, Tensor], beta: Tensor, heard: Tensor) -> tuple[Tensor, Tensor]:
        """The loss to minimise and what was measured.

        Args:
            images: uint8 [b, h, w, 3].
            draws: `noise`, N(0, I) in the latents' shape; where wanted `flips` [b] and `augmentation` [b, 6].
            beta: Weight of the KL divergence, a scalar.
            heard: 1 where the decoder listens to the critic, 0 where not yet: a scalar.

        Returns:
            The loss in nats per image and dimension, so that gradients stay in fp16's range; and, in nats per image
            and without gradient: loss, -log p(image | latent), KL divergence; the likelihood's deviation; and the critic's
            loss where there is one: [4] or [5].
            The KL divergence of a channel is not pressed below `free_bits` nats (Kingma et al., 2016, appendix C.8).
        """
        x = self.prepare(images, draws)
        terms = self.model(x, draws["noise"])
        pressed = terms.kl.clamp(min=self.free_bits) if self.free_bits else terms.kl
        loss = (beta * pressed.sum(1) - terms.log_prob).mean()
        deviation = self.model.likelihood.deviation(terms.output, x)
        kl = terms.kl.detach().sum(1).mean()
        measured = [loss.detach(), -terms.log_prob.detach().mean(), kl, deviation]
        if self.model.critic is not None:
            with torch.autocast(x.device.type, enabled=False):
                push, critic_loss = self._criticised(x, terms)
            measured.append(critic_loss.detach())
            return (loss + heard * push) / self.model.dimensions + critic_loss, torch.stack(measured)
        return loss / self.model.dimensions, torch.stack(measured)

    # The compiler takes no gradients within a forward pass.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _criticised(self, x: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
        """A term whose gradient pushes the decoder's images where the critic wants them, and the critic's own loss.

        The push on each image is `adversarial` (towards a verdict of real) and `perceptual` (towards the critic's features of
        the original, Larsen et al., 2016, eq. 5) times as strong as that of the reconstruction: the adaptive weight of
        Esser et al. (2021, eq. 7), taken image by image at the image itself, so it depends on no batch and costs no
        second pass. The critic's loss is the hinge (Lim & Ye, 2017). All of it is computed in fp32: its inner gradients are not
        scaled, and would be subnormal or infinite in fp16.
        """
        assert self.model.critic is not None
        rebuilt = self.model.likelihood.mean(terms.output.float())
        shown = rebuilt.detach().requires_grad_()
        verdict, features = self.model.critic(shown)
        real, wanted = self.model.critic(x)
        critic_loss = F.relu(1 - real).mean() + F.relu(1 + verdict).mean()
        output = terms.output.detach().float().requires_grad_()
        pull = torch.autograd.grad(self.model.likelihood.log_prob(output, x).sum(), output)[0]
        strength = pull.flatten(1).norm(dim=1)
        push = torch.zeros_like(shown)
        apart = sum(((ours - theirs.detach()).abs().flatten(1).mean(1) for ours, theirs in zip(features, wanted, strict=True)))
        wishes = ((self.adversarial, -verdict.flatten(1).mean(1)), (self.perceptual, apart))
        for weight, wish in wishes:
            if weight:
                gradient = torch.autograd.grad(wish.sum(), shown, retain_graph=True)[0]
                length = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
                push += (weight * strength / length)[:, None, None, None] * gradient
        return (rebuilt * push).flatten(1).sum(1).mean(), critic_loss


class FlowMatching(Objective):
    """Mean squared error of the flow's velocity (Liu et al., 2023, eq. 1), in units of normalised latents."""

    def forward(self, images: Tensor, draws: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss to minimise and what was measured: [1].

        Args:
            images: uint8 [b, h, w, 3].
            draws: `noise` and `start`, N(0, I) in the latents' shape, for the posterior and for the flow; `time` in (0, 1) and
                `label`, [b]; `augmentation` [b, 6]; where wanted `flips` [b].
        """
        loss = self.velocity_error(self.prepare(images, draws), draws).mean()
        return loss, loss.detach()[None]

    def velocity_error(self, x: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """The error of each of the images [b, 3, h, w]: [b]."""
        assert self.model.flow is not None
        with torch.no_grad():
            latent = self.model.flow.normalise(self.model.encode(x).sample(draws["noise"]))
        start, time = draws["start"], draws["time"]
        way = time[:, None, None, None]
        velocity = self.model.flow((1 - way) * latent + way * start, time, draws["label"], draws["augmentation"])
        return (velocity.float() - (start - latent)).square().flatten(1).mean(1)
