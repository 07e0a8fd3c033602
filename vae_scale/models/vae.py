"""Variational autoencoders of images."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
import torch.nn.functional as F
from einops.layers.torch import Rearrange
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vae_scale.config import VAEConfig, as_dict, model_from_dict
from vae_scale.errors import UserError
from vae_scale.models.blocks import (
    Attention,
    Downsample,
    ResBlock,
    Upsample,
    conv,
    depth_to_space,
    norm,
    space_to_depth,
)
from vae_scale.models.likelihoods import make_likelihood
from vae_scale.models.prior import GaussianMixture
from vae_scale.randomness import noise_of_each

SOFT_CLAMP = 5.0  # bound of log sigma, reached smoothly (NVAE, Vahdat & Kautz, 2020)
FIRST_LOG_SIGMA = -2.0
WEIGHTS, CONFIG, MIXTURE = "model.safetensors", "config.json", "mixture.safetensors"
Prior = Literal["auto", "normal", "gmm"]


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
        return kl.flatten(2).sum(2)


@dataclass
class Terms:
    """The two terms of the ELBO of each image, in nats, and what came out on the way.

    Attributes:
        log_prob: log p(image | latent): [b].
        kl: KL(q || p) of each latent channel: [b, c].
        output: The decoder's output: [b, likelihood.channels, h, w].
    """

    log_prob: Tensor
    kl: Tensor
    output: Tensor

    @property
    def elbo(self) -> Tensor:
        """Evidence lower bound in nats per image: [b]."""
        return self.log_prob - self.kl.sum(1)


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
        mixture: The learned prior, once one was fitted.
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

    @property
    def dimensions(self) -> int:
        """Numbers in an image, the 'dim' of bits/dim."""
        return 3 * self.resolution**2

    def encode(self, images: Tensor) -> Posterior:
        """The posterior of each image."""
        mean, log_sigma = self.encoder(images).float().chunk(2, 1)
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
        return Terms(self.likelihood.log_prob(output, images), posterior.kl(), output)

    def draw_latents(self, num: int, seed: int = 0, temperature: float = 1.0, prior: Prior = "auto") -> Tensor:
        """Latents of a prior, on the CPU: [num, *latent_shape]. The i-th depends on `seed` and i alone.

        Raises:
            UserError: there is no such prior.
        """
        if prior == "gmm" and self.mixture is None:
            raise UserError("prior gmm: this model has none; use prior normal")
        if prior == "normal" or self.mixture is None:
            return temperature * noise_of_each(range(num), self.latent_shape, seed, "sample")
        return self.mixture.draw(num, seed, temperature).reshape(num, *self.latent_shape)

    def name_prior(self, prior: Prior = "auto") -> str:
        """What `draw_latents` draws from."""
        if prior == "normal" or self.mixture is None:
            return "N(0, I)"
        return f"mixture of {len(self.mixture.weights)} Gaussians"

    @torch.inference_mode()
    def decode_all(self, latents: Tensor, batch_size: int = 64) -> Tensor:
        """Decodes any number of latents, `batch_size` at a time, into images on the CPU."""
        device = next(self.parameters()).device
        return torch.cat([self.decode(part.to(device)).float().cpu() for part in latents.split(batch_size)])

    def sample(self, num: int, seed: int = 0, temperature: float = 1.0, batch_size: int = 64, prior: Prior = "auto") -> Tensor:
        """New images, on the CPU: [num, 3, side, side].

        Args:
            num: How many.
            seed: Image i depends on it and on i alone, not on `num` or `batch_size`.
            temperature: Scale of the latents; below 1 gives more typical images.
            batch_size: Images decoded at a time.
            prior: normal for N(0, I), gmm for the mixture, auto for the best that the model has.
        """
        return self.decode_all(self.draw_latents(num, seed, temperature, prior), batch_size)

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
        return {"library": "vae_scale", "resolution": self.resolution, "model": as_dict(self.config)}

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
        try:
            description = json.loads((folder / CONFIG).read_text())
            config = model_from_dict(description["model"], str(folder / CONFIG))
            model = build(config, int(description["resolution"]))
            state = load_file(folder / weights)
            model.load_state_dict(state)
            if (folder / MIXTURE).is_file():
                model.mixture = GaussianMixture(**load_file(folder / MIXTURE))
        except FileNotFoundError as error:
            raise UserError(f"{error.filename or folder / weights}: missing; give the folder of a model") from None
        except (KeyError, TypeError, ValueError, SafetensorError, RuntimeError) as error:
            raise UserError(f"{folder}: not a model of vae_scale, or damaged ({error})") from None
        if not isinstance(model, cls):
            raise UserError(f"{folder}: holds a {type(model).__name__}, not a {cls.__name__}")
        return model.eval()


class ResNetVAE(VAE):
    """A residual encoder and decoder around a map of latents, or around one latent vector.

    The first layer folds `patch` x `patch` pixels into channels, so that no convolution works at full resolution,
    where most time would go for little.
    """

    def __init__(self, config: VAEConfig, resolution: int) -> None:
        side = resolution // config.factor
        vector = config.latent == "vector"
        widths = [config.width * multiplier for multiplier in config.multipliers]
        encoder = _Encoder(config, widths, side)
        outputs = make_likelihood(config.likelihood, config.scale).channels
        decoder = _Decoder(config, widths, side, outputs)
        shape = (config.latent_channels, 1, 1) if vector else (config.latent_channels, side, side)
        super().__init__(config, resolution, shape, encoder, decoder)


def slerp(first: Tensor, last: Tensor, way: float) -> Tensor:
    """The latent `way` (0 to 1) along the great circle from `first` to `last` (White, 2016).

    Unlike a straight line it stays at the distance from the origin where N(0, I) has its mass.
    """
    cosine = F.cosine_similarity(first.flatten(), last.flatten(), dim=0).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = torch.acos(cosine)
    return (torch.sin((1 - way) * angle) * first + torch.sin(way * angle) * last) / torch.sin(angle)


def _flat(c: int, side: int) -> Rearrange:
    return Rearrange("b c h w -> b (c h w)", c=c, h=side, w=side)


class _Encoder(nn.Module):
    def __init__(self, config: VAEConfig, widths: list[int], side: int) -> None:
        super().__init__()
        self.patch = config.patch
        self.stem = conv(3 * config.patch**2, widths[0])
        layers: list[nn.Module] = []
        for level, width in enumerate(widths):
            if level:
                layers.append(Downsample(widths[level - 1], width))
            layers += [ResBlock(width) for _ in range(config.blocks)]
        if config.attention:
            layers.append(Attention(widths[-1]))
        self.layers = nn.Sequential(*layers)
        self.norm = norm(widths[-1])
        outputs = 2 * config.latent_channels
        last: nn.Linear | nn.Conv2d
        if config.latent == "vector":
            last = nn.Linear(widths[-1] * side**2, outputs)
            self.head: nn.Module = nn.Sequential(_flat(widths[-1], side), last, Rearrange("b c -> b c 1 1"))
        else:
            self.head = last = conv(widths[-1], outputs, size=1)
        # Posteriors start narrow. With a map of latents the first hundred steps went further so (a single run: 0.4% fewer
        # nats); with a vector it made no difference.
        assert last.bias is not None
        nn.init.constant_(last.bias[config.latent_channels :], FIRST_LOG_SIGMA)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.layers(self.stem(space_to_depth(images, self.patch)))
        return self.head(F.silu(self.norm(hidden)))


class _Decoder(nn.Module):
    def __init__(self, config: VAEConfig, widths: list[int], side: int, outputs: int) -> None:
        super().__init__()
        self.patch = config.patch
        if config.latent == "vector":
            grid = Rearrange("b (c h w) -> b c h w", h=side, w=side)
            flat = nn.Linear(config.latent_channels, widths[-1] * side**2)
            self.stem: nn.Module = nn.Sequential(_flat(config.latent_channels, 1), flat, grid)
        else:
            self.stem = conv(config.latent_channels, widths[-1])
        layers: list[nn.Module] = [Attention(widths[-1])] if config.attention else []
        for level, width in reversed(list(enumerate(widths))):
            layers += [ResBlock(width) for _ in range(config.blocks + 1)]
            if level:
                layers.append(Upsample(width, widths[level - 1]))
        self.layers = nn.Sequential(*layers)
        self.norm = norm(widths[0])
        self.head = conv(widths[0], outputs * config.patch**2, zero=True)

    def forward(self, latents: Tensor) -> Tensor:
        hidden = self.layers(self.stem(latents))
        return depth_to_space(self.head(F.silu(self.norm(hidden))), self.patch)


def build(config: VAEConfig, resolution: int) -> VAE:
    """The network of a configuration, freshly initialised, for images of `resolution` pixels a side."""
    from vae_scale.models.notebook import NotebookVAE

    return (NotebookVAE if config.preset == "seed_notebook" else ResNetVAE)(config, resolution)
