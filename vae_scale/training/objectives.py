"""Training objectives. The whole loss is computed in one module, so that DDP, autocast and torch.compile cover all of it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_scale.config.options import Config
from vae_scale.data.transfer import normalize_images
from vae_scale.models.vae import VAE, ELBOTerms
from vae_scale.training.augmentation import augment

Tensors = dict[str, Tensor]  # by name


class Objective(nn.Module):
    """Base class of objectives: maps images to a loss and a dict of named scalars.

    Args:
        model: The VAE.
        config: Configuration of the run.
    """

    def __init__(self, model: VAE, config: Config) -> None:
        super().__init__()
        self.model = model
        self.random_crop, self.color_jitter = config.data.random_crop, config.data.color_jitter

    def preprocess(self, images: Tensor, random_inputs: Tensors) -> Tensor:
        """Converts uint8 images [b, h, w, 3] to [b, 3, h, w] in [-1, 1], flipped and augmented."""
        x = normalize_images(images, random_inputs.get("flips"))
        if "augmentation" not in random_inputs:
            return x
        return augment(x, random_inputs["augmentation"], self.random_crop, self.color_jitter)


class ELBO(Objective):
    """The loss -log p(x | z) + beta KL(q(z | x) || p(z)) (Kingma & Welling, 2014, eq. 3, with beta = 1).

    If the model has a discriminator, its loss and the adversarial terms of the decoder are added.
    """

    def __init__(self, model: VAE, config: Config) -> None:
        super().__init__(model, config)
        self.free_bits = config.objective.free_bits
        self.adversarial_weight = config.objective.adversarial_weight
        self.feature_matching_weight = config.objective.feature_matching_weight

    def forward(
        self, images: Tensor, random_inputs: Tensors, beta: Tensor, adversarial_factor: Tensor
    ) -> tuple[Tensor, Tensors]:
        """Returns the loss and the metrics, scalars without gradient.

        Args:
            images: uint8 [b, h, w, 3].
            random_inputs: `noise`, N(0, I) in the latents' shape; optionally `flips` [b] and `augmentation` [b, 6].
            beta: Weight of the KL divergence, a scalar.
            adversarial_factor: Factor of the adversarial terms of the decoder, 0 or 1: a scalar.

        Returns:
            The loss in nats per image and dimension, so that gradients stay in fp16's range. The metrics `loss`,
            `reconstruction` (-log p(x | z)) and `kl` in nats per image, `reconstruction_error` (see `Likelihood`),
            and `discriminator_loss` if there is a discriminator. In the loss, the KL divergence of each channel is at least
            `free_bits` nats (Kingma et al., 2016, appendix C.8).
        """
        x = self.preprocess(images, random_inputs)
        terms = self.model(x, random_inputs["noise"])
        kl = terms.kl.clamp(min=self.free_bits) if self.free_bits else terms.kl
        loss = (beta * kl.sum(1) - terms.log_prob).mean()
        metrics = {
            "loss": loss.detach(),
            "reconstruction": -terms.log_prob.detach().mean(),
            "kl": terms.kl.detach().sum(1).mean(),
            "reconstruction_error": self.model.likelihood.reconstruction_error(terms.output, x),
        }
        if self.model.discriminator is None:
            return loss / self.model.dimensions, metrics
        with torch.autocast(x.device.type, enabled=False):
            adversarial_loss, discriminator_loss = self.adversarial_terms(x, terms)
        metrics["discriminator_loss"] = discriminator_loss.detach()
        return (loss + adversarial_factor * adversarial_loss) / self.model.dimensions + discriminator_loss, metrics

    # torch.compile does not support torch.autograd.grad within a forward pass.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def adversarial_terms(self, x: Tensor, terms: ELBOTerms) -> tuple[Tensor, Tensor]:
        """Returns the adversarial loss of the decoder and the hinge loss of the discriminator (Lim & Ye, 2017).

        The decoder's terms are the negative logits of the reconstruction, and the distance between the discriminator's features
        of the reconstruction and of the image (Larsen et al., 2016, eq. 5). Each is scaled so that its gradient has
        `adversarial_weight` or `feature_matching_weight` times the norm of the likelihood's gradient. This is the adaptive
        weight of Esser et al. (2021, eq. 7), but for each image and at the decoder's output, so that it does not depend on the
        batch and needs no second backward pass. Everything is computed in fp32: the inner gradients are not scaled, and would
        underflow or overflow in fp16.
        """
        assert self.model.discriminator is not None
        reconstruction = self.model.likelihood.mean(terms.output.float())
        fake = reconstruction.detach().requires_grad_()
        fake_logits, fake_features = self.model.discriminator(fake)
        real_logits, real_features = self.model.discriminator(x)
        discriminator_loss = F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
        output = terms.output.detach().float().requires_grad_()
        reconstruction_grad = torch.autograd.grad(self.model.likelihood.log_prob(output, x).sum(), output)[0]
        reconstruction_norm = reconstruction_grad.flatten(1).norm(dim=1)
        feature_distance = sum(
            (features - target.detach()).abs().flatten(1).mean(1)
            for features, target in zip(fake_features, real_features, strict=True)
        )
        grad = torch.zeros_like(fake)
        losses = (
            (self.adversarial_weight, -fake_logits.flatten(1).mean(1)),
            (self.feature_matching_weight, feature_distance),
        )
        for weight, loss in losses:
            if weight:
                loss_grad = torch.autograd.grad(loss.sum(), fake, retain_graph=True)[0]
                norm = loss_grad.flatten(1).norm(dim=1).clamp(min=1e-12)
                grad += (weight * reconstruction_norm / norm)[:, None, None, None] * loss_grad
        return (reconstruction * grad).flatten(1).sum(1).mean(), discriminator_loss


class FlowMatching(Objective):
    """Mean squared error of the flow's velocity (Liu et al., 2023, eq. 1), in units of normalized latents."""

    def forward(self, images: Tensor, random_inputs: Tensors) -> tuple[Tensor, Tensors]:
        """Returns the loss and the metric `loss`.

        Args:
            images: uint8 [b, h, w, 3].
            random_inputs: See `velocity_error`; optionally `flips` [b].
        """
        loss = self.velocity_error(self.preprocess(images, random_inputs), random_inputs).mean()
        return loss, {"loss": loss.detach()}

    def velocity_error(self, x: Tensor, random_inputs: Tensors) -> Tensor:
        """Returns the mean squared error for each image: [b].

        Args:
            x: [b, 3, h, w] in [-1, 1].
            random_inputs: `noise` of the posterior and `start` of the flow, N(0, I) in the latents' shape; `time` in (0, 1) and
                `label`, [b]; `augmentation` [b, 6].
        """
        assert self.model.flow is not None
        with torch.no_grad():
            latent = self.model.flow.normalize(self.model.encode(x).sample(random_inputs["noise"]))
        start, time = random_inputs["start"], random_inputs["time"]
        t = time[:, None, None, None]
        velocity = self.model.flow((1 - t) * latent + t * start, time, random_inputs["label"], random_inputs["augmentation"])
        return (velocity.float() - (start - latent)).square().flatten(1).mean(1)
