"""The training stages: the VAE, then a flow over its latents. Both run in the same training loop."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from vae_scale.config.options import Config, PriorConfig
from vae_scale.config.parsing import check_image_shape
from vae_scale.data.images import Rows
from vae_scale.data.shards import ShardSet
from vae_scale.data.transfer import to_device
from vae_scale.errors import UserError
from vae_scale.evaluation.evaluator import evaluate
from vae_scale.evaluation.latents import encode_images, evaluate_flow, fit_clusters, iterate_posteriors, measure_latents
from vae_scale.models.likelihoods import bits_per_dim
from vae_scale.models.networks import build_model
from vae_scale.models.vae import VAE
from vae_scale.randomness import derive_seed, make_generator
from vae_scale.runtime import checkpoint
from vae_scale.runtime.distributed import DistContext
from vae_scale.training import augmentation
from vae_scale.training.objectives import ELBO, FlowMatching, Objective, Tensors

MAX_ENCODED_BYTES = 4 * 2**30  # on each device; STL-10 in latents of 8 x 12 x 12 takes 1 GiB


class Stage(ABC):
    """A model, its objective, and the hooks that the training loop calls.

    Attributes:
        model: The model, with the frozen weights of an earlier stage.
        objective: Maps a batch to the loss and metrics.
        fits_mixture: Whether samples are drawn from a mixture, which is fitted for each checkpoint.
    """

    model: VAE
    objective: Objective
    fits_mixture = False

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device

    @abstractmethod
    def random_inputs(self, images_seen: int, batch_size: int) -> Tensors:
        """Returns the random inputs of the objective for the global batch that starts after `images_seen` images."""

    @abstractmethod
    def format_metrics(self, means: Mapping[str, float], images_seen: int) -> tuple[dict[str, float], str]:
        """Returns the metrics to log and the text of the progress bar."""

    @abstractmethod
    def evaluate(self, model: VAE, test_set: ShardSet, batch: int, dist: DistContext) -> Mapping[str, float | list[float]]:
        """Returns metrics of `model`, the averaged model, on held-out images."""

    def add_row_inputs(self, random_inputs: Tensors, rows: Rows) -> Tensors:
        """Adds what the objective uses of the images at `rows` besides their pixels."""
        return random_inputs

    def is_guide_due(self, images_seen: int) -> bool:
        """Whether the weights after `images_seen` images, or earlier ones, guide samples of the final model."""
        return False

    def on_train_start(self) -> None:
        """Called before the first step, when the weights of the checkpoint are loaded, if there is one."""
        return

    def on_step_end(self, metrics: Tensors, is_taken: Tensor) -> None:
        """Called after each step with the metrics of the global batch and whether the step was taken."""
        return

    def _normal(self, images_seen: int, purpose: str, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator(images_seen, purpose), device=self.device)

    def _uniform(self, images_seen: int, purpose: str, count: int) -> Tensor:
        return torch.rand(count, generator=self._generator(images_seen, purpose), device=self.device)

    def _flips(self, images_seen: int, count: int) -> Tensors:
        return {"flips": self._uniform(images_seen, "flip", count) < 0.5} if self.config.data.horizontal_flip else {}

    def _augmentation(self, images_seen: int, count: int) -> Tensor:
        return augmentation.random_parameters(self.config.data, count, self._generator(images_seen, "augmentation"))

    def _generator(self, images_seen: int, purpose: str) -> torch.Generator:
        return make_generator(self.device, self.config.seed, images_seen, purpose)


def trainable_parameters(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Returns names and values of the parameters that require gradients."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


class VAEStage(Stage):
    """The first stage: encoder and decoder."""

    fits_mixture = True

    def __init__(self, config: Config, device: torch.device, train_set: ShardSet) -> None:
        super().__init__(config, device)
        self.model = build_model(config.model, train_set.image_shape[0])
        self.model.to(device).to(memory_format=torch.channels_last)
        self.objective = ELBO(self.model, config)

    def random_inputs(self, images_seen: int, batch_size: int) -> Tensors:
        """See `Stage`."""
        inputs = {"noise": self._normal(images_seen, "posterior", batch_size, *self.model.latent_shape)}
        if self.config.data.random_crop or self.config.data.color_jitter:
            inputs["augmentation"] = self._augmentation(images_seen, batch_size)
        return inputs | self._flips(images_seen, batch_size)

    def on_step_end(self, metrics: Tensors, is_taken: Tensor) -> None:
        """Updates the scale of the likelihood."""
        self.model.likelihood.update_scale(metrics["reconstruction_error"], is_taken)

    def format_metrics(self, means: Mapping[str, float], images_seen: int) -> tuple[dict[str, float], str]:
        """See `Stage`."""
        neg_elbo = means["reconstruction"] + means["kl"]
        metrics = {
            "train/loss": means["loss"],
            "train/neg_elbo": neg_elbo,
            "train/reconstruction": means["reconstruction"],
            "train/kl": means["kl"],
        }
        metrics["train/bits_per_dim"] = bits_per_dim(neg_elbo, self.model.dimensions)
        return metrics, f"{metrics['train/bits_per_dim']:.3f} bits/dim"

    def evaluate(self, model: VAE, test_set: ShardSet, batch: int, dist: DistContext) -> Mapping[str, float | list[float]]:
        """Returns the ELBO and its terms."""
        return evaluate(model, test_set, self.config.evaluate.images, batch, self.config.seed, dist)


class FlowStage(Stage):
    """The second stage: a flow over the latents of a frozen VAE with its averaged weights.

    Raises:
        UserError: if the VAE does not exist, or has another image size.
    """

    def __init__(self, config: Config, device: torch.device, train_set: ShardSet, dist: DistContext) -> None:
        super().__init__(config, device)
        prior = config.prior
        assert prior.vae is not None
        self.model = VAE.from_pretrained(checkpoint.require_checkpoint(prior.vae, "prior.vae"), "ema.safetensors").to(device)
        size, resolution = train_set.image_shape[0], self.model.resolution
        if size != resolution:
            raise UserError(
                f"prior.vae {prior.vae}: was trained on {resolution}x{resolution} images, the shards have {size}x{size}"
            )
        self.model.requires_grad_(False).to(memory_format=torch.channels_last)
        config.model = self.model.config
        self.train_set, self.dist, self.labels = train_set, dist, torch.from_numpy(train_set.labels).to(device)
        self.encoded: Tensor | None = None
        flow = self.model.add_flow(prior.width, prior.depth, class_names(prior, train_set), prior.clusters is not None)
        flow.to(device).to(memory_format=torch.channels_last)
        self.encoding_batch = 64 if config.train.batch_size == "auto" else config.train.global_batch_size // dist.world_size
        num_images = min(config.evaluate.prior_fit_images, len(train_set))
        posteriors = list(iterate_posteriors(self.model, train_set, num_images, self.encoding_batch, dist))
        flow.latent_mean, flow.latent_std = measure_latents(posteriors)
        if prior.clusters is None:
            counts = torch.bincount(flow.mask_unknown(self.labels), minlength=flow.num_classes + 1)
            flow.class_probs = counts / len(self.labels)
        else:
            fit_clusters(flow, torch.cat([posterior.mean for posterior in posteriors]), config.seed, dist)
        self.objective = FlowMatching(self.model, config)

    def random_inputs(self, images_seen: int, batch_size: int) -> Tensors:
        """See `Stage`. Times are logit-normal (Esser et al., 2024, sec. 3.1)."""
        shape = (batch_size, *self.model.latent_shape)
        return {
            "noise": self._normal(images_seen, "posterior", *shape),
            "start": self._normal(images_seen, "flow", *shape),
            "time": self._normal(images_seen, "time", batch_size).sigmoid(),
            "augmentation": self._augmentation(images_seen, batch_size),
        } | self._flips(images_seen, batch_size)

    def add_row_inputs(self, random_inputs: Tensors, rows: Rows) -> Tensors:
        """Adds the labels of the images, and their posteriors instead of flips if they are encoded only once."""
        indices = to_device(rows, self.device)
        inputs = random_inputs | {"label": self.labels[indices]}
        if self.encoded is not None:
            flips = inputs.pop("flips", torch.zeros_like(indices))
            inputs["posterior"] = self.encoded[indices, flips.long()]
        return inputs

    def on_train_start(self) -> None:
        """Encodes all images, unless that is more work than encoding those of each step, or augmentations change them.

        Remote shards are not encoded in advance, since every node would download all of them.
        """
        data, train_set, dist = self.config.data, self.train_set, self.dist
        variants = len(train_set) * (1 + data.horizontal_flip)
        num_bytes = variants * 2 * math.prod(self.model.latent_shape) * torch.float16.itemsize
        is_fixed = train_set.is_local and not data.random_crop and not data.color_jitter
        if is_fixed and variants < self.config.train.images and num_bytes <= MAX_ENCODED_BYTES:
            progress = "" if self.config.log == "json" else "encoding"
            self.encoded = encode_images(self.model, train_set, data.horizontal_flip, self.encoding_batch, dist, progress)

    def is_guide_due(self, images_seen: int) -> bool:
        """Returns True after a quarter of the training."""
        return images_seen >= self.config.train.images // 4

    def format_metrics(self, means: Mapping[str, float], images_seen: int) -> tuple[dict[str, float], str]:
        """See `Stage`."""
        return {"train/loss": means["loss"]}, f"velocity error {means['loss']:.4f}"

    def evaluate(self, model: VAE, test_set: ShardSet, batch: int, dist: DistContext) -> Mapping[str, float | list[float]]:
        """Returns the velocity error, averaged over times."""
        velocity_error = FlowMatching(model, self.config).velocity_error
        return evaluate_flow(model, velocity_error, test_set, self.config.evaluate.images, batch, self.config.seed, dist)


def class_names(prior: PriorConfig, train_set: ShardSet) -> Sequence[str]:
    """Returns the names of the classes of the flow prior: those of the labels, or the numbers of the clusters."""
    return train_set.class_names if prior.clusters is None else [str(number) for number in range(prior.clusters)]


def build_stage(config: Config, device: torch.device, train_set: ShardSet, dist: DistContext) -> Stage:
    """Returns the stage that the configuration selects, with initial weights."""
    torch.manual_seed(derive_seed(config.seed, "weights"))
    if config.prior.vae is not None:
        return FlowStage(config, device, train_set, dist)
    check_image_shape(config.model, train_set.image_shape)
    return VAEStage(config, device, train_set)
