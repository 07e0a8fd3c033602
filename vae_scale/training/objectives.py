"""Training objectives. The whole loss is computed in one module, so that DDP, autocast and torch.compile cover all of it."""

import torch
from torch import Tensor, nn

from vae_scale.config.options import Config
from vae_scale.data.transfer import normalize_images
from vae_scale.models.vae import VAE, Posterior
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
    """The loss -log p(x | z) + beta KL(q(z | x) || p(z)) (Kingma & Welling, 2014, eq. 3, with beta = 1)."""

    def __init__(self, model: VAE, config: Config) -> None:
        super().__init__(model, config)
        self.beta = config.objective.beta

    def forward(self, images: Tensor, random_inputs: Tensors) -> tuple[Tensor, Tensors]:
        """Returns the loss and the metrics, scalars without gradient.

        Args:
            images: uint8 [b, h, w, 3].
            random_inputs: `noise`, N(0, I) in the latents' shape; optionally `flips` [b] and `augmentation` [b, 6].

        Returns:
            The loss in nats per image and dimension, so that gradients stay in fp16's range. The metrics `loss`,
            `reconstruction` (-log p(x | z)) and `kl` in nats per image, and `reconstruction_error` (see `Likelihood`).
        """
        x = self.preprocess(images, random_inputs)
        terms = self.model(x, random_inputs["noise"])
        loss = (self.beta * terms.kl.sum(1) - terms.log_prob).mean()
        metrics = {
            "loss": loss.detach(),
            "reconstruction": -terms.log_prob.detach().mean(),
            "kl": terms.kl.detach().sum(1).mean(),
            "reconstruction_error": self.model.likelihood.reconstruction_error(terms.output, x),
        }
        return loss / self.model.dimensions, metrics


class FlowMatching(Objective):
    """Mean squared error of the flow's velocity (Liu et al., 2023, eq. 1), in units of normalized latents."""

    def forward(self, images: Tensor, inputs: Tensors) -> tuple[Tensor, Tensors]:
        """Returns the loss and the metric `loss`.

        Args:
            images: uint8 [b, h, w, 3]; not used if the inputs have `posterior`.
            inputs: See `velocity_error`; and `posterior`, mean and log sigma of encoded images, [b, 2, h, w, c], or optionally
                `flips` [b].
        """
        if "posterior" in inputs:
            posterior = Posterior(*inputs["posterior"].float().permute(0, 1, 4, 2, 3).unbind(1))
        else:
            with torch.no_grad():
                posterior = self.model.encode(self.preprocess(images, inputs))
        loss = self.velocity_error(posterior, inputs).mean()
        return loss, {"loss": loss.detach()}

    def velocity_error(self, posterior: Posterior, inputs: Tensors) -> Tensor:
        """Returns the mean squared error for each image: [b].

        Args:
            posterior: Of each image.
            inputs: `noise` of the posterior and `start` of the flow, N(0, I) in the latents' shape; `time` in (0, 1) and
                `label` of the images, [b]; `augmentation` [b, 6].
        """
        assert self.model.flow is not None
        with torch.no_grad():
            latent = self.model.flow.normalize(posterior.sample(inputs["noise"]))
            label = self.model.flow.assign_classes(inputs["label"], posterior.mean)
        start, time = inputs["start"], inputs["time"]
        t = time[:, None, None, None]
        velocity = self.model.flow((1 - t) * latent + t * start, time, label, inputs["augmentation"])
        # Permuted, so that gradients are in channels_last memory.
        error = velocity.permute(0, 2, 3, 1).float() - (start - latent).permute(0, 2, 3, 1)
        return error.square().mean((1, 2, 3))
