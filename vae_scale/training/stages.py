"""What is trained: first the VAE, then a flow over its latents. The loop is the same for both."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vae_scale.config import Config
from vae_scale.data.plan import Rows
from vae_scale.data.shards import ShardSet
from vae_scale.data.transfer import to_device
from vae_scale.errors import UserError
from vae_scale.models.critic import Critic
from vae_scale.models.ladder import LadderVAE
from vae_scale.models.networks import build
from vae_scale.models.vae import CRITIC, VAE
from vae_scale.randomness import generator
from vae_scale.training import augmentation, checkpoint
from vae_scale.training.evaluation import Processes, evaluate
from vae_scale.training.latents import evaluate_flow, fit_prior, measure_latents
from vae_scale.training.objective import ELBO, FlowMatching, Objective, bits_per_dim
from vae_scale.training.schedules import kl_weight


class Stage(ABC):
    """What the loop trains.

    Attributes:
        model: All weights, the frozen ones of an earlier stage included.
        objective: From a share of a batch to the loss and what was measured.
        measured: Length of what was measured.
        fits_mixture: Samples are drawn from a mixture, which has to be fitted anew once the latents have moved.
    """

    model: VAE
    objective: Objective
    measured: int
    fits_mixture = False

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device

    @abstractmethod
    def draws(self, images_seen: int, count: int) -> dict[str, Tensor]:
        """The random numbers of the global batch of `count` images that starts after `images_seen`."""

    @abstractmethod
    def logged(self, means: list[float], images_seen: int) -> tuple[dict[str, float], str]:
        """The metrics of some steps, and the one that the progress bar shows."""

    @abstractmethod
    def evaluate(self, model: VAE, test_set: ShardSet, batch: int, processes: Processes) -> Mapping[str, float | list[float]]:
        """How good `model`, the averaged one, is on held-out images."""

    def fit_mixture(self, model: VAE, batch: int, processes: Processes) -> None:
        """Gives `model` the mixture of its latents, if the stage `fits_mixture`."""
        return

    def labelled(self, draws: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
        """The random numbers of a share of the batch, and what follows from which images these are."""
        return draws

    def arguments(self, images_seen: int) -> tuple[Tensor, ...]:
        """What else the objective takes."""
        return ()

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups of parameters."""
        return [{"params": [parameter for _, parameter in trained(self.model)]}]

    def stepped(self, measured: Tensor, taken: Tensor) -> None:
        """Called after each step with what was measured on the global batch, and whether the step was `taken`: a scalar."""
        return

    def _source(self, images_seen: int, purpose: str) -> torch.Generator:
        return generator(self.device, self.config.seed, images_seen, purpose)

    def _normal(self, images_seen: int, purpose: str, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._source(images_seen, purpose), device=self.device)

    def _uniform(self, images_seen: int, purpose: str, count: int) -> Tensor:
        return torch.rand(count, generator=self._source(images_seen, purpose), device=self.device)

    def _flips(self, images_seen: int, count: int) -> dict[str, Tensor]:
        return {"flips": self._uniform(images_seen, "flip", count) < 0.5} if self.config.data.flip else {}

    def _augmentation(self, images_seen: int, count: int) -> Tensor:
        return augmentation.draw(self.config.data, count, self._source(images_seen, "augmentation"))


def trained(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """The parameters that are not frozen, with their names."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


class VAEStage(Stage):
    """The first stage: encoder and decoder."""

    def __init__(self, config: Config, device: torch.device, train_set: ShardSet) -> None:
        super().__init__(config, device)
        self.train_set = train_set
        self.model = build(config.model, train_set.image_shape[0])
        if config.objective.critic:
            self.model.critic = Critic(config.objective.critic_width)
        self.measured = 5 if config.objective.critic else 4
        self.fits_mixture = not isinstance(self.model, LadderVAE)  # whose latents are N(0, I) under its own learned prior
        self.model.to(device).to(memory_format=torch.channels_last)
        self.objective = ELBO(self.model, config)

    def draws(self, images_seen: int, count: int) -> dict[str, Tensor]:
        """See `Stage`."""
        drawn = {"noise": self._normal(images_seen, "posterior", count, *self.model.latent_shape)}
        if self.config.data.crop or self.config.data.colour:
            drawn["augmentation"] = self._augmentation(images_seen, count)
        return drawn | self._flips(images_seen, count)

    def arguments(self, images_seen: int) -> tuple[Tensor, ...]:
        """Beta, and whether the critic is heard."""
        heard = float(images_seen >= self.config.objective.critic_start)
        # Filled on the device: a copy from the host would wait for it.
        return tuple(
            torch.full((), value, device=self.device) for value in (kl_weight(self.config.objective, images_seen), heard)
        )

    def groups(self) -> list[dict[str, Any]]:
        """The critic's gradients have no long memory (betas 0 and 0.9): what it has to find changes all the time."""
        parameters = dict(trained(self.model))
        critic = [parameters.pop(name) for name in list(parameters) if name.startswith(CRITIC)]
        own = [{"params": critic, "betas": (0.0, 0.9)}] if critic else []
        return [{"params": list(parameters.values())}, *own]

    def stepped(self, measured: Tensor, taken: Tensor) -> None:
        """Moves the likelihood's scale."""
        self.model.likelihood.follow(measured[3], taken)

    def logged(self, means: list[float], images_seen: int) -> tuple[dict[str, float], str]:
        """See `Stage`."""
        loss, reconstruction, kl, _, *critic = means
        values = {
            "train/loss": loss,
            "train/nats": reconstruction + kl,
            "train/reconstruction_nats": reconstruction,
            "train/kl_nats": kl,
            "train/beta": kl_weight(self.config.objective, images_seen),
        }
        if critic:
            values["train/critic_loss"] = critic[0]
        if not self.model.likelihood.normalised:
            return values, f"loss {loss:,.0f} nats"
        values["train/bits_per_dim"] = bits_per_dim(reconstruction + kl, self.model.dimensions)
        return values, f"{values['train/bits_per_dim']:.3f} bits/dim"

    def evaluate(self, model: VAE, test_set: ShardSet, batch: int, processes: Processes) -> Mapping[str, float | list[float]]:
        """The ELBO."""
        return evaluate(model, test_set, self.config.evaluate.images, batch, self.config.seed, processes)

    def fit_mixture(self, model: VAE, batch: int, processes: Processes) -> None:
        """See `Stage`."""
        model.mixture = fit_prior(model, self.train_set, self.config.evaluate.latents, batch, self.config.seed, processes)


class FlowStage(Stage):
    """The second stage: a flow over the latents of a VAE, whose averaged weights are frozen.

    Raises:
        UserError: there is no such VAE, it has no map of latents, or it was trained on images of another size.
    """

    measured = 1

    def __init__(self, config: Config, device: torch.device, train_set: ShardSet, batch: int, processes: Processes) -> None:
        super().__init__(config, device)
        assert config.prior.vae is not None
        self.model = VAE.from_pretrained(checkpoint.newest_of(config.prior.vae, "prior.vae"), "ema.safetensors").to(device)
        side, resolution = train_set.image_shape[0], self.model.resolution
        if side != resolution:
            raise UserError(f"prior.vae {config.prior.vae}: is for {resolution} pixels a side; the shards' images have {side}")
        if isinstance(self.model, LadderVAE):
            raise UserError(f"prior.vae {config.prior.vae}: a ladder's latents have a learned prior already; give a VAE")
        self.model.requires_grad_(False).to(memory_format=torch.channels_last)
        config.model = self.model.config
        self.labels = torch.from_numpy(train_set.labels).to(device)
        prior = config.prior
        if self.model.latent_shape[1] % prior.patch:
            raise UserError(f"prior.patch is {prior.patch}; the latents are {self.model.latent_shape[1]} a side")
        flow = self.model.add_flow(prior.width, prior.depth, prior.patch, train_set.class_names).to(device)
        flow.shift, flow.scale = measure_latents(self.model, train_set, config.evaluate.latents, batch, processes)
        self.objective = FlowMatching(self.model, config)

    def draws(self, images_seen: int, count: int) -> dict[str, Tensor]:
        """See `Stage`. Times are logit-normal (Esser et al., 2024, sec. 3.1)."""
        shape = (count, *self.model.latent_shape)
        return {
            "noise": self._normal(images_seen, "posterior", *shape),
            "start": self._normal(images_seen, "flow", *shape),
            "time": self._normal(images_seen, "time", count).sigmoid(),
            "hidden": self._uniform(images_seen, "label", count),
            "augmentation": self._augmentation(images_seen, count),
        } | self._flips(images_seen, count)

    def labelled(self, draws: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
        """Adds the images' labels, some of them hidden."""
        assert self.model.flow is not None
        label = self.labels[to_device(rows, self.device)]
        named = (label >= 0) & (label < self.model.flow.classes)  # WebDatasets of others have labels without names
        unknown = ~named | (draws["hidden"] < self.config.prior.hide_label)
        return draws | {"label": label.masked_fill(unknown, self.model.flow.classes)}

    def logged(self, means: list[float], images_seen: int) -> tuple[dict[str, float], str]:
        """See `Stage`."""
        return {"train/loss": means[0]}, f"velocity error {means[0]:.4f}"

    def evaluate(self, model: VAE, test_set: ShardSet, batch: int, processes: Processes) -> Mapping[str, float | list[float]]:
        """The velocity error on held-out images, averaged over times."""
        objective = FlowMatching(model, self.config)
        return evaluate_flow(objective, test_set, self.config.evaluate.images, batch, self.config.seed, processes)
