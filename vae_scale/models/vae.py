"""The variational autoencoder (VAE), common to all networks."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_scale.config.options import MAX_BLOCKS, VAEConfig, to_dict
from vae_scale.config.parsing import vae_config_from_dict
from vae_scale.errors import UserError
from vae_scale.models.blocks import chunk_channels, soft_clamp
from vae_scale.models.flow import Flow
from vae_scale.models.likelihoods import Gaussian, SigmoidMSE
from vae_scale.models.mixture import GaussianMixture
from vae_scale.models.pretrained import FORMAT_VERSION, PretrainedModel, positive_int
from vae_scale.randomness import per_sample_noise

Prior = Literal["auto", "normal", "gmm", "flow"]
DEFAULT_GUIDANCE = 2.5


@dataclass
class Posterior:
    """The posterior q(latent | image): independent Gaussians, in fp32.

    Attributes:
        mean: [b, c, h, w].
        log_sigma: Logarithm of the standard deviation, [b, c, h, w].
    """

    mean: Tensor
    log_sigma: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Returns mean + sigma * noise, for noise from N(0, I) (Kingma & Welling, 2014, sec. 2.4)."""
        return self.mean + self.log_sigma.exp() * noise

    def kl(self) -> Tensor:
        """Returns KL(q || N(0, I)) in nats per image and latent channel, [b, c] (Kingma & Welling, 2014, appendix B)."""
        kl = 0.5 * (self.mean.square() + (2 * self.log_sigma).exp() - 1) - self.log_sigma
        return kl.sum((2, 3))

    def log_ratio(self, noise: Tensor) -> Tensor:
        """Returns log p(latent) - log q(latent | image) of `sample(noise)` under p = N(0, I), in nats per image: [b]."""
        ratio = self.log_sigma + 0.5 * (noise.square() - self.sample(noise).square())
        return ratio.sum((1, 2, 3))


@dataclass
class ELBOTerms:
    """The terms of the evidence lower bound (ELBO) of each image, in nats, and the decoder's output.

    Attributes:
        log_prob: log p(image | latent), [b].
        kl: KL(q || p) of each latent channel, [b, c].
        log_ratio: log p(latent) - log q(latent | image) of the sampled latent, [b].
        output: Output of the decoder, [b, 3, h, w].
    """

    log_prob: Tensor
    kl: Tensor
    log_ratio: Tensor
    output: Tensor

    @property
    def elbo(self) -> Tensor:
        """The ELBO in nats per image, [b]."""
        return self.log_prob - self.kl.sum(1)


@dataclass(frozen=True)
class SamplingConfig:
    """Options of sampling from the flow prior.

    Attributes:
        steps: Steps of Heun's method.
        label: Class label; None draws the class of each sample with the frequencies of the training images.
        guidance: Scale of guidance, 1 for none; None: `DEFAULT_GUIDANCE` if the model has a guide, else 1. See `Flow.sample`.
    """

    steps: int = 12
    label: int | None = None
    guidance: float | None = None


class VAE(PretrainedModel):
    """Base class of the networks. Images are [b, 3, resolution, resolution] in [-1, 1], latents [b, *latent_shape].

    Args:
        config: Configuration of the network.
        resolution: Height and width of the images in pixels.
        latent_shape: (c, h, w).
        encoder: Maps images to the posterior's mean and log sigma, [b, 2c, h, w].
        decoder: Maps latents to the parameters of the likelihood.

    Attributes:
        networks: Subclasses by the value of `VAEConfig.network`.
        likelihood: p(image | latent).
        mixture: The Gaussian mixture prior, or None before it is fitted.
        flow: The flow prior, or None before the second training stage.
        guide: Earlier weights of the flow prior, which guide its samples; None early in its training.
        class_names: Names of the class labels of the flow prior.
    """

    networks: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, config: VAEConfig, resolution: int, latent_shape: tuple[int, int, int], encoder: nn.Module, decoder: nn.Module
    ) -> None:
        super().__init__()
        self.config, self.resolution, self.latent_shape = config, resolution, latent_shape
        self.encoder, self.decoder = encoder, decoder
        self.likelihood = Gaussian() if config.likelihood == "gaussian" else SigmoidMSE()
        self.mixture: GaussianMixture | None = None
        self.flow: Flow | None = None
        self.guide: dict[str, Tensor] | None = None
        self.class_names: tuple[str, ...] = ()

    @property
    def dimensions(self) -> int:
        """Number of values in an image, the 'dim' of bits/dim."""
        return 3 * self.resolution**2

    def encode(self, images: Tensor) -> Posterior:
        """Returns the posterior of each image."""
        mean, log_sigma = chunk_channels(self.encoder(images).float())
        return Posterior(mean, soft_clamp(log_sigma))

    def decode(self, latents: Tensor) -> Tensor:
        """Returns the expected image of each latent."""
        return self.likelihood.mean(self.decoder(latents))

    def reconstruct(self, images: Tensor) -> Tensor:
        """Returns the expected image of each image's posterior mean."""
        return self.decode(self.encode(images).mean)

    def forward(self, images: Tensor, noise: Tensor) -> ELBOTerms:
        """Returns the terms of the ELBO, estimated with one latent per image; `noise` from N(0, I) is [b, *latent_shape]."""
        posterior = self.encode(images)
        output = self.decoder(posterior.sample(noise))
        return ELBOTerms(self.likelihood.log_prob(output, images), posterior.kl(), posterior.log_ratio(noise), output)

    def resolve_prior(self, prior: Prior = "auto") -> Prior:
        """Returns `prior`, or for "auto" the best prior of the model: flow, else gmm, else normal.

        Raises:
            UserError: if the model has no such prior.
        """
        available = {"flow": self.flow is not None, "gmm": self.mixture is not None, "normal": True}
        best: Prior = next(name for name in ("flow", "gmm", "normal") if available[name])
        if prior != "auto" and not available[prior]:
            raise UserError(f"prior {prior}: this model has none; use prior {best}")
        return best if prior == "auto" else prior

    def describe_prior(self, prior: Prior = "auto", sampling: SamplingConfig | None = None) -> str:
        """Returns a description of the prior that `sample_latents` uses."""
        prior, sampling = self.resolve_prior(prior), sampling or SamplingConfig()
        if prior == "flow":
            guidance = self.resolve_guidance(sampling)
            return f"rectified flow ({sampling.steps} steps, guidance {guidance:g})"
        if prior == "gmm":
            assert self.mixture is not None
            return f"mixture of {len(self.mixture.weights)} Gaussians"
        return "N(0, I)"

    def resolve_guidance(self, sampling: SamplingConfig) -> float:
        """Returns the scale of guidance of the flow prior.

        Raises:
            UserError: if it is not 1 and the model has no guide.
        """
        if sampling.guidance is None:
            return DEFAULT_GUIDANCE if self.guide else 1.0
        if sampling.guidance != 1 and not self.guide:
            raise UserError(f"guidance {sampling.guidance:g}: the flow prior has no guide before a quarter of its training")
        return sampling.guidance

    def load_guide(self) -> Flow | None:
        """Returns the flow prior with the weights `guide`, or None if there are none."""
        if self.flow is None or self.guide is None:
            return None
        guide = copy.deepcopy(self.flow)
        guide.load_state_dict(self.guide)
        return guide

    def sample_latents(
        self,
        num: int | range,
        seed: int = 0,
        temperature: float = 1.0,
        prior: Prior = "auto",
        sampling: SamplingConfig | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Samples latents from a prior.

        Args:
            num: Number of latents, or a range of their indices. Latent i depends only on `seed` and i.
            seed: Random seed.
            temperature: Scale of the noise.
            prior: The prior; see `resolve_prior`.
            sampling: Options of the flow prior.
            batch_size: Number of latents that the flow prior computes at a time.

        Returns:
            [num, *latent_shape], on the CPU.

        Raises:
            UserError: if the model has no such prior, or if guidance requires a guide that it does not have.
        """
        prior, indices = self.resolve_prior(prior), range(num) if isinstance(num, int) else num
        if prior == "gmm":
            assert self.mixture is not None
            return self.mixture.sample(indices, seed, temperature).reshape(-1, *self.latent_shape)
        noise = temperature * per_sample_noise(indices, self.latent_shape, seed, "sample")
        if prior == "normal":
            return noise
        flow, guide, config = self.flow, self.load_guide(), sampling or SamplingConfig()
        guidance, device = self.resolve_guidance(config), next(self.parameters()).device
        assert flow is not None
        if config.label is None:
            uniform = torch.special.ndtr(per_sample_noise(indices, (1,), seed, "class")[:, 0].double())
            labels = flow.sample_labels(uniform.to(device))
        else:
            labels = torch.full((len(indices),), config.label, device=device)
        latents = [
            flow.sample(part.to(device), label, guidance, config.steps, guide).cpu()
            for part, label in zip(noise.split(batch_size), labels.split(batch_size), strict=True)
        ]
        return torch.cat(latents)

    @torch.inference_mode()
    def decode_batches(self, latents: Tensor, batch_size: int = 64) -> Tensor:
        """Decodes latents, `batch_size` at a time, to images on the CPU."""
        device = next(self.parameters()).device
        return torch.cat([self.decode(batch.to(device)).float().cpu() for batch in latents.split(batch_size)])

    def sample(
        self,
        num: int,
        seed: int = 0,
        temperature: float = 1.0,
        batch_size: int = 64,
        prior: Prior = "auto",
        sampling: SamplingConfig | None = None,
    ) -> Tensor:
        """Generates images, [num, 3, resolution, resolution] in [-1, 1], on the CPU.

        Args:
            num: Number of images. Image i depends only on `seed` and i, not on `num` or `batch_size`.
            seed: Random seed.
            temperature: Scale of the noise; values below 1 give more typical images.
            batch_size: Images computed at a time.
            prior: normal for N(0, I), gmm for the mixture, flow, or auto for the best available.
            sampling: Options of the flow prior.
        """
        return self.decode_batches(self.sample_latents(num, seed, temperature, prior, sampling, batch_size), batch_size)

    def add_flow(self, width: int, depth: int, class_names: Sequence[str], clustered: bool = False) -> Flow:
        """Adds an untrained flow prior, which replaces an existing one. See `Flow`."""
        self.class_names, self.guide = tuple(class_names), None
        self.flow = Flow(width, depth, self.latent_shape, len(class_names), clustered)
        return self.flow

    def to_config(self) -> dict[str, object]:
        """Returns the content of `config.json`."""
        config: dict[str, object] = {"library": "vae_scale", "format_version": FORMAT_VERSION}
        config |= {"resolution": self.resolution, "model": to_dict(self.config)}
        if self.flow is not None:
            clustered = self.flow.cluster_centers is not None
            config["flow"] = {"width": self.flow.width, "depth": self.flow.depth, "clustered": clustered}
            config["classes"] = list(self.class_names)
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], name: str) -> "VAE":
        """Builds an untrained model from the content of `config.json`; `name` is the file's name in error messages.

        Raises:
            UserError, LookupError, TypeError, ValueError: if the content is invalid.
        """
        options = vae_config_from_dict(config["model"], name)
        model: VAE = cls.networks[options.network](options, positive_int(config, "resolution"))
        if flow := config.get("flow"):
            width, depth = positive_int(flow, "width"), positive_int(flow, "depth", MAX_BLOCKS)
            model.add_flow(width, depth, [str(label) for label in config["classes"]], bool(flow["clustered"]))
        return model


def slerp(start: Tensor, end: Tensor, t: float) -> Tensor:
    """Interpolates spherically between two latents (White, 2016); `t` is 0 at `start` and 1 at `end`.

    Unlike linear interpolation, it preserves the norm, which is nearly constant for samples of N(0, I).
    """
    cosine = F.cosine_similarity(start.flatten(), end.flatten(), dim=0).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = torch.acos(cosine)
    return (torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end) / torch.sin(angle)
