"""Variational autoencoders of images."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vae_scale.config import MOST_BLOCKS, VAEConfig, as_dict, model_from_dict
from vae_scale.errors import UserError, one_line
from vae_scale.models.blocks import chunk_channels
from vae_scale.models.critic import Critic
from vae_scale.models.flow import Flow, Solver
from vae_scale.models.likelihoods import make_likelihood
from vae_scale.models.prior import GaussianMixture
from vae_scale.randomness import noise_of_each

SOFT_CLAMP = 5.0  # bound of log sigma, reached smoothly (NVAE, Vahdat & Kautz, 2020)
CRITIC = "critic."  # of its weights, which only training needs
WEIGHTS, CONFIG, MIXTURE = "model.safetensors", "config.json", "mixture.safetensors"
FORMAT_VERSION = 2  # of what config.json and the weights mean: networks of version 1 had groups of other sizes in their norms
MOST_SIZE = 2**16  # of what config.json describes: pixels, channels
Prior = Literal["auto", "normal", "gmm", "flow"]


@dataclass
class Posterior:
    """q(latent | image): independent Gaussians, in fp32.

    Attributes:
        mean: [b, c, h, w].
        log_sigma: Logarithm of the standard deviation, in the same shape.
    """

    mean: Tensor
    log_sigma: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + sigma * noise, with noise from N(0, I) (Kingma & Welling, 2014, sec. 2.4)."""
        return self.mean + self.log_sigma.exp() * noise

    def kl(self) -> Tensor:
        """KL(q || N(0, I)) in nats per image and latent channel: [b, c] (Kingma & Welling, 2014, appendix B)."""
        kl = 0.5 * (self.mean.square() + (2 * self.log_sigma).exp() - 1) - self.log_sigma
        return kl.sum((2, 3))

    def log_ratio(self, noise: Tensor) -> Tensor:
        """log p(latent) - log q(latent | image) of `sample(noise)` under p = N(0, I), in nats per image: [b]."""
        ratio = self.log_sigma + 0.5 * (noise.square() - self.sample(noise).square())
        return ratio.sum((1, 2, 3))


@dataclass
class Terms:
    """The two terms of the ELBO of each image, in nats, and what came out on the way.

    Attributes:
        log_prob: log p(image | latent): [b].
        kl: KL(q || p) of each latent channel: [b, c].
        log_ratio: log p(latent) - log q(latent | image) of the latent that was drawn: [b].
        output: The decoder's output: [b, likelihood.channels, h, w].
    """

    log_prob: Tensor
    kl: Tensor
    log_ratio: Tensor
    output: Tensor

    @property
    def elbo(self) -> Tensor:
        """Evidence lower bound in nats per image: [b]."""
        return self.log_prob - self.kl.sum(1)


@dataclass(frozen=True)
class Sampler:
    """How the flow is followed from noise to a latent.

    Attributes:
        steps: Of the solver.
        solver: euler evaluates the flow once per step, heun twice.
        label: Class wanted; None for any.
        guidance: How strongly the class is wanted; 1 as it was learned.
    """

    steps: int = 25
    solver: Solver = "heun"
    label: int | None = None
    guidance: float = 1.0


class VAE(nn.Module):
    """What every VAE here can do. Images are [b, 3, side, side] in [-1, 1], latents [b, *latent_shape].

    Args:
        config: The network's configuration.
        resolution: Side of its images in pixels.
        latent_shape: (c, h, w).
        encoder: Image to the mean and log sigma of its latent, stacked: [b, 2c, h, w].
        decoder: Latent to the likelihood's parameters.

    Attributes:
        likelihood: p(image | latent).
        mixture: The learned prior of the first stage, once one was fitted.
        flow: The learned prior of the second stage, once one was trained.
        class_names: Of the labels that the flow knows.
        critic: What the decoder was trained against, if it was.
    """

    def __init__(
        self,
        config: VAEConfig,
        resolution: int,
        latent_shape: tuple[int, int, int],
        encoder: nn.Module,
        decoder: nn.Module,
    ) -> None:
        super().__init__()
        self.config, self.resolution, self.latent_shape = config, resolution, latent_shape
        self.encoder, self.decoder = encoder, decoder
        self.likelihood = make_likelihood(config.likelihood, config.scale)
        self.mixture: GaussianMixture | None = None
        self.flow: Flow | None = None
        self.class_names: tuple[str, ...] = ()
        self.critic: Critic | None = None

    @property
    def dimensions(self) -> int:
        """Numbers in an image, the 'dim' of bits/dim."""
        return 3 * self.resolution**2

    def encode(self, images: Tensor) -> Posterior:
        """The posterior of each image."""
        mean, log_sigma = chunk_channels(self.encoder(images).float())
        return Posterior(mean, SOFT_CLAMP * torch.tanh(log_sigma / SOFT_CLAMP))

    def decode(self, latents: Tensor) -> Tensor:
        """The expected image of each latent."""
        return self.likelihood.mean(self.decoder(latents))

    def reconstruct(self, images: Tensor) -> Tensor:
        """The expected image of each image's posterior mean."""
        return self.decode(self.encode(images).mean)

    def forward(self, images: Tensor, noise: Tensor) -> Terms:
        """The terms of the ELBO, estimated with one latent per image; `noise` is N(0, I) in the latents' shape."""
        posterior = self.encode(images)
        output = self.decoder(posterior.sample(noise))
        return Terms(self.likelihood.log_prob(output, images), posterior.kl(), posterior.log_ratio(noise), output)

    def choose_prior(self, prior: Prior = "auto") -> Prior:
        """The prior to draw from: `prior` itself, or for auto the best that the model has.

        Raises:
            UserError: there is no such prior.
        """
        has = {"flow": self.flow is not None, "gmm": self.mixture is not None, "normal": True}
        best: Prior = next(name for name in ("flow", "gmm", "normal") if has[name])
        if prior != "auto" and not has[prior]:
            raise UserError(f"prior {prior}: this model has none; use prior {best}")
        return best if prior == "auto" else prior

    def draw_latents(
        self,
        num: int | range,
        seed: int = 0,
        temperature: float = 1.0,
        prior: Prior = "auto",
        sampler: Sampler | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Latents of a prior, on the CPU: the first `num`, or those of the numbers given, [num, *latent_shape].

        That of number i depends on `seed` and i alone. Only the flow works on `batch_size` at a time.

        Raises:
            UserError: there is no such prior.
        """
        prior, numbers = self.choose_prior(prior), range(num) if isinstance(num, int) else num
        if prior == "gmm":
            assert self.mixture is not None
            return self.mixture.draw(numbers, seed, temperature).reshape(-1, *self.latent_shape)
        noise = temperature * noise_of_each(numbers, self.latent_shape, seed, "sample")
        if prior == "normal":
            return noise
        assert self.flow is not None
        sampler, device = sampler or Sampler(), next(self.parameters()).device
        label = torch.full((len(numbers),), self.flow.classes if sampler.label is None else sampler.label)
        parts = zip(noise.split(batch_size), label.split(batch_size), strict=True)
        draw = partial(self.flow.draw, guidance=sampler.guidance, steps=sampler.steps, solver=sampler.solver)
        return torch.cat([draw(part.to(device), which.to(device)).cpu() for part, which in parts])

    def name_prior(self, prior: Prior = "auto", sampler: Sampler | None = None) -> str:
        """What `draw_latents` draws from."""
        prior, sampler = self.choose_prior(prior), sampler or Sampler()
        if prior == "flow":
            return f"rectified flow ({sampler.steps} {sampler.solver} steps)"
        if prior == "gmm":
            assert self.mixture is not None
            return f"mixture of {len(self.mixture.weights)} Gaussians"
        return "N(0, I)"

    @torch.inference_mode()
    def decode_all(self, latents: Tensor, batch_size: int = 64) -> Tensor:
        """Decodes any number of latents, `batch_size` at a time, into images on the CPU."""
        device = next(self.parameters()).device
        return torch.cat([self.decode(part.to(device)).float().cpu() for part in latents.split(batch_size)])

    def sample(
        self,
        num: int,
        seed: int = 0,
        temperature: float = 1.0,
        batch_size: int = 64,
        prior: Prior = "auto",
        sampler: Sampler | None = None,
    ) -> Tensor:
        """New images, on the CPU: [num, 3, side, side].

        Args:
            num: How many.
            seed: Image i depends on it and on i alone, not on `num` or `batch_size`.
            temperature: Scale of the noise; below 1 gives more typical images.
            batch_size: Images decoded at a time.
            prior: normal for N(0, I), gmm for the mixture, flow, or auto for the best that the model has.
            sampler: How the flow is followed.
        """
        return self.decode_all(self.draw_latents(num, seed, temperature, prior, sampler, batch_size), batch_size)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json`, `model.safetensors` and the prior into `folder`, which `from_pretrained` reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(self.describe(), indent=2))
        if self.mixture:
            save_file(vars(self.mixture), folder / MIXTURE)

    def describe(self) -> dict[str, object]:
        """What `config.json` holds."""
        described: dict[str, object] = {"library": "vae_scale", "format_version": FORMAT_VERSION}
        described |= {"resolution": self.resolution, "model": as_dict(self.config)}
        if self.flow is not None:
            described["flow"] = {"width": self.flow.width, "depth": self.flow.depth, "patch": self.flow.patch}
            described["classes"] = list(self.class_names)
        return described

    def add_flow(self, width: int, depth: int, patch: int, class_names: Sequence[str]) -> Flow:
        """Gives the model an untrained flow over its latents, in place of any it had."""
        self.flow, self.class_names = Flow(width, depth, patch, self.latent_shape, len(class_names)), tuple(class_names)
        return self.flow

    def push_to_hub(self, repo: str, private: bool = False) -> str:
        """Uploads the model to the repository `repo` of the Hugging Face Hub; returns its address."""
        from tempfile import TemporaryDirectory

        hub = HfApi()
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            url = hub.create_repo(repo, private=private, exist_ok=True)
            hub.upload_folder(repo_id=url.repo_id, folder_path=folder)
        return str(url)

    @classmethod
    def from_pretrained(cls, name: str | Path, weights: str = WEIGHTS) -> Self:
        """A model in evaluation mode, from a folder (a checkpoint, say) or a repository of the Hugging Face Hub.

        Args:
            name: Folder or repository.
            weights: File of the weights in it; a checkpoint also has the averaged `ema.safetensors`.

        Raises:
            UserError: it is not there, damaged, or of another kind.
        """
        folder = Path(name)
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(str(name), allow_patterns=[CONFIG, weights, MIXTURE]))
            except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
                raise UserError(f"{name}: neither a folder nor a model on the Hub ({type(error).__name__})") from None
        from vae_scale.models.networks import build

        try:
            description = json.loads((folder / CONFIG).read_text("utf-8"))
            check_version(description, folder)
            config = model_from_dict(description["model"], str(folder / CONFIG))

            def make() -> VAE:
                model = build(config, _size(description, "resolution"))
                if flow := description.get("flow"):
                    sizes = [_size(flow, name) for name in ("width", "depth", "patch")]
                    model.add_flow(sizes[0], sizes[1], sizes[2], [str(name) for name in description["classes"]])
                return model

            state = load_file(folder / weights)
            state = {name: tensor for name, tensor in state.items() if not name.startswith(CRITIC)}
            with torch.device("meta"):  # takes no memory, whatever sizes the description claims
                _check_shapes(make(), state)
            model = make()
            model.load_state_dict(state)
            if (folder / MIXTURE).is_file():
                model.mixture = GaussianMixture(**load_file(folder / MIXTURE))
                model.mixture.check(math.prod(model.latent_shape))
        except FileNotFoundError as error:
            raise UserError(f"{error.filename or folder / weights}: missing; give the folder of a model") from None
        except (LookupError, TypeError, ValueError, AttributeError, OSError, RuntimeError, SafetensorError) as error:
            reason = f"{type(error).__name__} {one_line(error):.300}"
            raise UserError(f"{folder}: not a model of vae_scale, or damaged ({reason})") from None
        if not isinstance(model, cls):
            raise UserError(f"{folder}: holds a {type(model).__name__}, not a {cls.__name__}")
        return model.eval().to(memory_format=torch.channels_last)


def check_version(description: Any, folder: Path) -> None:
    """Refuses what `VAE.describe` of another version wrote.

    Raises:
        UserError: naming `folder`.
    """
    version = description.get("format_version", 1)
    if version != FORMAT_VERSION:
        raise UserError(
            f"{folder}: has format version {version!r:.20}, and this version of vae_scale reads {FORMAT_VERSION}: networks "
            "have changed; train again in another folder, or install the version that wrote it"
        )


def _size(description: dict[str, object], name: str) -> int:
    value, most = description[name], MOST_BLOCKS if name == "depth" else MOST_SIZE
    if type(value) is not int or not 0 < value <= most:
        raise ValueError(f"{name} is {value!r:.40}, not a whole number from 1 to {most:,}")
    return value


def _check_shapes(model: VAE, state: dict[str, Tensor]) -> None:
    """Refuses weights that are not those of a model, before memory is taken for it.

    Raises:
        ValueError: naming the first difference.
    """
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in state.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            here, there = (list(shapes[name]) if name in shapes else "nothing" for shapes in (found, wanted))
            raise ValueError(f"{name} is {here}, its configuration says {there}")


def slerp(first: Tensor, last: Tensor, way: float) -> Tensor:
    """The latent `way` (0 to 1) along the great circle from `first` to `last` (White, 2016).

    Unlike a straight line it stays at the distance from the origin where N(0, I) has its mass.
    """
    cosine = F.cosine_similarity(first.flatten(), last.flatten(), dim=0).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = torch.acos(cosine)
    return (torch.sin((1 - way) * angle) * first + torch.sin(way * angle) * last) / torch.sin(angle)
