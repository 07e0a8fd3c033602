"""Every option and its default, in typed dataclasses: preset < YAML file < command line.

Nothing here imports torch, so that `--help` and a mistyped key answer at once.
"""

import argparse
import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from vae_scale.errors import UserError, one_line, shown

FILE_BYTES, FILE_DEPTH = 2**20, 8  # of a configuration file, at most
LARGEST = 2**63 - 1  # number in an option
MOST_LEVELS, MOST_BLOCKS = 16, 1000  # of a network, whose description may come from strangers

Preset = Literal["tiny", "small", "base", "large", "ladder", "kl", "seed_notebook"]
Network = Literal["resnet", "ladder", "kl", "seed_notebook"]

# One line per model. A preset only moves defaults: a YAML file and the command line are stronger.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"patch": 4, "width": 32, "multipliers": [1, 2], "blocks": 1, "latent_channels": 4},
    "small": {"patch": 4, "width": 64, "multipliers": [1, 2, 4], "blocks": 1, "latent_channels": 16},
    "base": {"patch": 2, "width": 128, "multipliers": [1, 2, 4], "blocks": 2, "latent_channels": 8, "attention": True},
    "large": {"patch": 2, "width": 192, "multipliers": [1, 2, 4], "blocks": 3, "latent_channels": 8, "attention": True},
    "ladder": {"network": "ladder", "patch": 2, "width": 64, "multipliers": [1, 2, 3, 4], "blocks": 2, "latent_channels": 8},
    "kl": {"network": "kl", "width": 128, "multipliers": [1, 2, 4, 4], "blocks": 2, "latent_channels": 4},
    "seed_notebook": {"network": "seed_notebook", "latent": "vector", "latent_channels": 10, "likelihood": "mse"},
}


@dataclass
class VAEConfig:
    """The network. `preset` fills in the others; each can be set on its own as well.

    Attributes:
        preset: Named size: tiny (tests), small (CPU), base, large, ladder, kl (Stable Diffusion's), or the seed notebook's.
        network: resnet (residual encoder and decoder), ladder (a hierarchy of latents), kl (the autoencoder of latent
            diffusion, which diffusers can load), or the seed notebook's.
        patch: Side of the square of pixels the first layer folds into channels (space to depth).
        width: Channels at the finest level.
        multipliers: Channels of each level as multiples of `width`; each level halves the one before. ladder goes on down to
            one position, with the last.
        blocks: Residual blocks per level in the encoder; the decoder has one more. ladder: layers of latents per level.
        attention: Self-attention at the coarsest level.
        latent: A map of latents (spatial), or one vector for the whole image (vector).
        latent_channels: Channels of the latent map, or of each layer of ladder, or length of the latent vector.
        likelihood: p(image | latent). mse and bce are the classic losses of a sigmoid output.
        scale: Scale of gaussian and laplace: optimal (follows the error, sigma-VAE), learned, or a number in [-1, 1] units.
    """

    preset: Preset = "base"
    network: Network = "resnet"
    patch: int = 2
    width: int = 128
    multipliers: list[int] = field(default_factory=lambda: [1, 2, 4])
    blocks: int = 2
    attention: bool = False
    latent: Literal["spatial", "vector"] = "spatial"
    latent_channels: int = 8
    likelihood: Literal["gaussian", "laplace", "logistic_mixture", "mse", "bce"] = "gaussian"
    scale: Literal["optimal", "learned"] | float = "optimal"

    @property
    def factor(self) -> int:
        """Side of the image over side of the coarsest feature map (for spatial latents, the latent map): 'f'."""
        halvings = 2 ** (len(self.multipliers) - 1)
        factors = {"resnet": self.patch * halvings, "kl": halvings, "ladder": self.patch, "seed_notebook": 4}
        return factors[self.network]


@dataclass
class DataConfig:
    """Which shards are read and how.

    Attributes:
        shards: Folder that `python -m vae_scale.pack` wrote, or where it was put: a URL (http, https, s3, gs, hf), or pipe: and
            a command that writes the file named {} to its standard output.
        train: Splits to train on, separated by commas; those that the shards lack are left out.
        test: Split held out for evaluation. Never trained on.
        window: Shards among which rows are shuffled together; null for all of them (where they are fetched or decoded: 16).
        streams: Equal parts of a batch that come from different shards, so that many nodes need not each read all of them.
        prefetch: Batches gathered ahead of the trainer.
        cache: Where images wait: host (mapped files) or device (the whole set in the accelerator's memory).
        flip: Mirror a random half of the images.
        crop: Cut up to this share off a side, at random, and enlarge what is left; 0 to 0.9.
        colour: Change brightness, contrast and saturation at random by up to this share; 0 to 0.9.
        cache_dir: Folder for shards that are fetched; null for ~/.cache/vae_scale/shards.
        cache_gib: GiB that it may hold; null for 50.
        on_bad_shard: Of a shard that is missing, damaged or cannot be fetched: stop, or skip it, so that other images take the
            place of its images; each evaluation then tells how many (data/missing_images).
    """

    shards: str = "data/stl10"
    train: str = "train,unlabeled"
    test: str = "test"
    window: int | None = None
    streams: int = 1
    prefetch: int = 4
    cache: Literal["host", "device"] = "host"
    flip: bool = True
    crop: float = 0.0
    colour: float = 0.0
    cache_dir: str | None = None
    cache_gib: float | None = None
    on_bad_shard: Literal["stop", "skip"] = "stop"

    @property
    def train_splits(self) -> list[str]:
        """Names of the splits to train on."""
        return [name.strip() for name in self.train.split(",") if name.strip()]


@dataclass
class ObjectiveConfig:
    """The loss, in nats per image: -log p(image | latent) + beta KL. beta = 1 is the negative ELBO.

    Attributes:
        beta: Weight of the KL divergence, itself summed over the latents of an image.
        beta_warmup: Images over which beta grows linearly from 0.
        free_bits: Nats per latent channel and image below which the KL divergence is not pressed.
        adversarial: How strongly a critic of real and reconstructed patches pushes each image, as a multiple of how strongly
            the reconstruction pulls it; 0 for no critic.
        perceptual: The same for the critic's features of image and reconstruction, which are to be alike.
        critic_start: Images after which the decoder listens to the critic, which learns from the first.
        critic_width: Channels of the critic's first layer.
    """

    beta: float = 1.0
    beta_warmup: int = 0
    free_bits: float = 0.0
    adversarial: float = 0.0
    perceptual: float = 0.0
    critic_start: int = 50_000
    critic_width: int = 64

    @property
    def critic(self) -> bool:
        """Whether there is a critic."""
        return self.adversarial > 0 or self.perceptual > 0


@dataclass
class PriorConfig:
    """The second stage: a rectified flow over the latents of a trained VAE.

    Attributes:
        vae: Run of the VAE whose latents the flow learns; null to train a VAE.
        width: Channels of the flow's transformer, a multiple of 64.
        depth: Blocks of the transformer.
        patch: Side of the square of latents that is one token.
        hide_label: Share of labelled images learned without their label, so that guidance has something to compare with.
    """

    vae: str | None = None
    width: int = 512
    depth: int = 12
    patch: int = 1
    hide_label: float = 0.1


@dataclass
class OptimizerConfig:
    """AdamW.

    Attributes:
        lr: Highest learning rate.
        warmup: Images over which the learning rate grows linearly from 0.
        schedule: cosine falls to a hundredth of `lr` by the last image; constant stays.
        betas: Decay of the two moments.
        weight_decay: Decoupled weight decay.
        clip: Largest norm of the gradient of the loss per dimension; longer ones are scaled down. null leaves all alone.
        skip: Norm beyond which a step is left out altogether, as are those whose gradient is not finite; null for those only.
    """

    lr: float = 5e-4
    warmup: int = 20_000
    schedule: Literal["cosine", "constant"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip: float | None = 1.0
    skip: float | None = 100.0


@dataclass
class TrainConfig:
    """The loop.

    Attributes:
        images: Images to train on in all, counting every repetition.
        batch_size: Images per optimizer step, over all processes and accumulation steps together; auto for as many as fit into
            memory, found when a run begins and kept for the rest of it.
        accumulation: Pieces in which each process takes its share of a batch, to save memory.
        precision: auto is bf16 where the hardware has it, else fp32.
        exchange: Precision in which processes average their gradients; bf16 halves what goes over the network, and rounds.
        compile: torch.compile; auto is on for GPUs. cuda_graphs also replays forward and backward pass as CUDA graphs, which
            saves the host's time where a GPU has few images per step; it goes without objective.adversarial, .perceptual,
            train.accumulation and FSDP2.
        ema: Decay per step of the averaged weights that evaluation and sampling use.
        log_every: Optimizer steps between two log lines.
        timeout: Seconds for which processes wait for one that gets no further; then the run ends and names it.
    """

    images: int = 10_000_000
    batch_size: int | Literal["auto"] = 256
    accumulation: int = 1
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = "auto"
    exchange: Literal["fp32", "bf16"] = "fp32"
    compile: Literal["auto", "on", "off", "cuda_graphs"] = "auto"
    ema: float = 0.999
    log_every: int = 50
    timeout: int = 600

    @property
    def batch(self) -> int:
        """Images per optimizer step.

        Raises:
            UserError: it is auto, and was not found yet.
        """
        if self.batch_size == "auto":
            raise UserError("train.batch_size is auto, which only training finds out; give a number here")
        return self.batch_size


@dataclass
class EvaluateConfig:
    """Evaluation on held-out images during training, with a picture of reconstructions.

    Attributes:
        every: Images between two evaluations (there is always one at the end).
        images: Held-out images used, at most.
        samples: Images in the grid of samples, which is drawn with every checkpoint (of a flow or a ladder: every evaluation).
        early: Draw samples and reconstructions also after 256, 512, 1024, ... images, up to the first evaluation.
        latents: Training images whose latents the learned prior is fitted to, at most.
    """

    every: int = 500_000
    images: int = 2_000
    samples: int = 64
    early: bool = True
    latents: int = 10_000


@dataclass
class CheckpointConfig:
    """What is kept.

    Attributes:
        every: Images between two checkpoints (there is always one at the end). For each the mixture is fitted anew.
        keep: Newest checkpoints kept.
        keep_every: Images of which the first checkpoint after each multiple is kept, too; null for no others.
    """

    every: int = 500_000
    keep: int = 3
    keep_every: int | None = None


@dataclass
class TrackConfig:
    """Where curves and pictures go, besides the run's own folder.

    Attributes:
        tracker: wandb (offline where no key is found, never a prompt), tensorboard or none.
        project: wandb project.
        artifacts: Hand checkpoints and the shards' manifest to wandb, too.
    """

    tracker: Literal["wandb", "tensorboard", "none"] = "wandb"
    project: str = "vae_scale"
    artifacts: bool = False


@dataclass
class Config:
    """Options of training.

    Attributes:
        run: Folder of the run; null for runs/NAME with the name of the configuration file.
        seed: Keys every random draw, together with the images seen and what the draw is for.
        log: What is printed: a progress bar and lines, or json: one object a line on standard output and nothing else.
        model: The network.
        data: The images.
        objective: The loss of a VAE.
        prior: The second stage.
        optimizer: AdamW and its schedule.
        train: The loop.
        evaluate: Evaluation on held-out images.
        checkpoint: What is kept.
        track: Curves and pictures.
    """

    run: str | None = None
    seed: int = 0
    log: Literal["bar", "json"] = "bar"
    model: VAEConfig = field(default_factory=VAEConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.run or "runs/default")


def parse(argv: Sequence[str] | None = None) -> tuple[Config, bool]:
    """The configuration of a command line, and whether it asks for a dry run.

    Raises:
        UserError: naming the key that is unknown, of a wrong type or impossible.
    """
    parser = ArgumentParser(
        prog="python -m vae_scale.train",
        usage="python -m vae_scale.train [--config FILE] [--dry-run] [--OPTION VALUE ...]",
        description="Train a VAE. To resume, run the same command again.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and stop")
    parser.add_class_arguments(Config, None)
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    files.add_argument("--config", action="append", default=[])
    try:
        for name in files.parse_known_args(argv)[0].config:
            _check_file(name, parser)
        parsed = parser.parse_args(argv)
        for part in dataclasses.fields(Config):
            if dataclasses.is_dataclass(part.type) and not isinstance(parsed[part.name], Namespace):
                raise UserError(f"{part.name} is {parsed[part.name]!r}; it is a section, with keys below it")
        # A preset moves the defaults, so it must be known before the options stronger than it are read.
        parser.set_defaults({f"model.{key}": value for key, value in PRESETS[parsed.model.preset].items()})
        parsed = parser.parse_args(argv)
        settings = parser.instantiate(parsed)
    except ArgumentError as error:
        raise UserError(f"{_plain(one_line(error))}; see --help for the options") from None
    values = {part.name: getattr(settings, part.name) for part in dataclasses.fields(Config)}
    config = Config(**values)
    if config.run is None and parsed.config:
        config.run = f"runs/{Path(str(parsed.config[-1])).stem}"
    check(config)
    return config, bool(parsed.dry_run)


def _check_file(name: str, parser: ArgumentParser) -> None:
    """Refuses a configuration file that is not just options, before anything is made of it.

    Raises:
        UserError: naming the file.
    """
    try:
        with Path(name).open("rb") as file:
            content = file.read(FILE_BYTES + 1)
        if len(content) > FILE_BYTES:
            raise ValueError(f"more than {FILE_BYTES:,} bytes, which no configuration has")
        depth = 0
        for event in yaml.parse(content.decode(), yaml.SafeLoader):
            # Ten aliases that each stand for ten others, and so on, are a few lines and fill the memory.
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"aliases (*{event.anchor}) are not read")
            if "\0" in str(getattr(event, "value", "")):  # no path and no name has one
                raise ValueError("a value holds a NUL")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > FILE_DEPTH:
                raise ValueError(f"its values lie in each other more than {FILE_DEPTH} deep")
        values = yaml.safe_load(content)
        if not isinstance(values, dict):
            raise ValueError("holds no options, as in  train: {images: 1000}")
        sections = [part.name for part in dataclasses.fields(Config) if dataclasses.is_dataclass(part.type)]
        for key, value in values.items():
            if key == "config":
                raise ValueError("config goes on the command line; a file names no others")
            if key in sections and not isinstance(value, dict):
                raise ValueError(f"{key} is {value!r:.80}; it is a section, with keys below it")
            if key in sections:
                _check_lists(value)
        parser.parse_object(values)
    except OSError as error:
        raise UserError(f"--config {name}: {error.strerror}") from None
    except (ArgumentError, yaml.YAMLError, ValueError, TypeError) as error:
        raise UserError(f"--config {name}: {_plain(one_line(error)):.400}; see --help for the options") from None


def _check_lists(values: dict[str, Any]) -> None:
    """Refuses lists that are longer than any option's, which the parser takes minutes for."""
    for key, value in values.items():
        if isinstance(value, list) and len(value) > MOST_LEVELS:
            raise ValueError(f"{key} has {len(value):,} values; at most {MOST_LEVELS} are read")


def _plain(text: str) -> str:
    """jsonargparse's message with the classes' names taken out."""
    text = re.sub(r"<class '(\w+)'>", r"\1", text.replace("typing.Literal", "one of "))
    return re.sub(r'^Parser key "([\w.]+)":', r"\1:", text)


def check(config: Config) -> None:
    """Refuses what cannot be trained.

    Raises:
        UserError: naming the key.
    """
    _check_nulls(config)
    model, train = config.model, config.train
    positive = {
        "model.patch": model.patch,
        "model.width": model.width,
        "model.blocks": model.blocks,
        "model.latent_channels": model.latent_channels,
        "objective.critic_width": config.objective.critic_width,
        "data.prefetch": config.data.prefetch,
        "prior.depth": config.prior.depth,
        "prior.patch": config.prior.patch,
        "optimizer.lr": config.optimizer.lr,
        "train.images": train.images,
        "train.accumulation": train.accumulation,
        "train.log_every": train.log_every,
        "train.timeout": train.timeout,
        "evaluate.every": config.evaluate.every,
        "evaluate.images": config.evaluate.images,
        "evaluate.samples": config.evaluate.samples,
        "evaluate.latents": config.evaluate.latents,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
    }
    for key, value in positive.items():
        _require(0 < value <= LARGEST, key, f"is {value}; it must be greater than 0, and below 2^63")
    not_negative = {
        "seed": config.seed,
        "objective.beta": config.objective.beta,
        "objective.beta_warmup": config.objective.beta_warmup,
        "objective.free_bits": config.objective.free_bits,
        "objective.adversarial": config.objective.adversarial,
        "objective.perceptual": config.objective.perceptual,
        "objective.critic_start": config.objective.critic_start,
        "optimizer.warmup": config.optimizer.warmup,
        "optimizer.weight_decay": config.optimizer.weight_decay,
    }
    for key, value in not_negative.items():
        _require(0 <= value <= LARGEST, key, f"is {value}; it must not be negative, and be below 2^63")
    for key, value in {"model.blocks": model.blocks, "prior.depth": config.prior.depth}.items():
        _require(value <= MOST_BLOCKS, key, f"is {value}; it must be at most {MOST_BLOCKS}")
    levels = len(model.multipliers)
    _require(0 < levels <= MOST_LEVELS, "model.multipliers", f"are {levels} numbers; there must be 1 to {MOST_LEVELS}")
    _require(min(model.multipliers) > 0, "model.multipliers", "must be numbers above 0")
    _require(isinstance(model.scale, str) or 0 < model.scale < math.inf, "model.scale", "must be greater than 0, and finite")
    _require(config.data.window is None or config.data.window > 0, "data.window", "must be greater than 0, or null")
    parts = config.data.streams
    _require(parts > 0, "data.streams", f"is {parts}; it must be greater than 0")
    if train.batch_size != "auto":
        _require(0 < train.batch <= LARGEST, "train.batch_size", f"is {train.batch}; it must be greater than 0, and below 2^63")
        divides = train.batch % parts == 0
        _require(divides, "data.streams", f"is {parts}; it must divide train.batch_size ({train.batch})")
    kept = config.checkpoint.keep_every
    _require(kept is None or kept > 0, "checkpoint.keep_every", f"is {kept}; it must be greater than 0, or null")
    gib = config.data.cache_gib
    _require(gib is None or gib > 0, "data.cache_gib", f"is {gib}; it must be greater than 0, or null")
    _require(bool(config.data.train_splits), "data.train", "names no split")
    clash = config.data.test in config.data.train_splits
    _require(
        not clash,
        "data.test",
        f"split '{config.data.test}' is also in data.train; held-out images are never trained on",
    )
    shares = {"data.crop": config.data.crop, "data.colour": config.data.colour, "prior.hide_label": config.prior.hide_label}
    for key, value in shares.items():
        _require(0 <= value <= 0.9, key, f"is {value}; it must be 0 to 0.9")
    if train.compile == "cuda_graphs":
        _require(train.accumulation == 1, "train.compile", "cuda_graphs goes with train.accumulation 1")
        _require(not config.objective.critic, "train.compile", "cuda_graphs goes without objective.adversarial and .perceptual")
    width = config.prior.width
    _require(width > 0 and width % 64 == 0, "prior.width", f"is {width}; it must be a multiple of 64")
    _require(0 <= train.ema < 1, "train.ema", f"is {train.ema}; it must be at least 0 and below 1")
    _require(all(0 <= beta < 1 for beta in config.optimizer.betas), "optimizer.betas", "must be at least 0 and below 1")
    for key, limit in {"clip": config.optimizer.clip, "skip": config.optimizer.skip}.items():
        _require(limit is None or limit > 0, f"optimizer.{key}", f"is {limit}; it must be greater than 0, or null")
    if config.objective.critic:
        key = "objective.adversarial" if config.objective.adversarial else "objective.perceptual"
        _require(model.likelihood in ("gaussian", "laplace"), key, "goes with model.likelihood gaussian or laplace")
    if model.network in ("ladder", "kl"):
        _require(model.latent == "spatial", "model.latent", f"vector goes with network resnet, not {model.network}")
    if model.network == "seed_notebook":
        classic = model.likelihood in ("mse", "bce") and model.latent == "vector"
        _require(classic, "model.network", "seed_notebook goes with latent vector and likelihood mse or bce")


def _check_nulls(options: Any, prefix: str = "") -> None:
    """Refuses null where an option has no such value: the parser takes it for all that YAML leaves empty."""
    for name, kind in get_type_hints(type(options)).items():
        value = getattr(options, name)
        if dataclasses.is_dataclass(value):
            _check_nulls(value, f"{name}.")
        else:
            _require(value is not None or type(None) in get_args(kind), f"{prefix}{name}", "is null; it must have a value")


def check_processes(config: Config, processes: int) -> None:
    """Refuses a batch that `processes` processes cannot share evenly.

    Raises:
        UserError: naming the key.
    """
    train = config.train
    pieces = processes * train.accumulation
    parts = f"{processes} processes x train.accumulation {train.accumulation}"
    text = f"is {train.batch}; it must be a multiple of {pieces} ({parts})"
    _require(train.batch % pieces == 0, "train.batch_size", text)


def check_resolution(config: VAEConfig, shape: tuple[int, int, int]) -> None:
    """Refuses images [H, W, C] that the network cannot halve down to its coarsest level.

    Raises:
        UserError: naming the key.
    """
    height, width, channels = shape
    size = f"the shards' images are {height}x{width}"
    _require(height == width, "data.shards", f"{size}; they must be square")
    _require(channels == 3, "data.shards", f"has {channels} channels; it must have 3")
    text = (
        f"{size}, not divisible by f = {config.factor} (model.patch x 2 per further level); "
        "use other levels, or pack with another --resolution"
    )
    _require(height % config.factor == 0, "model.multipliers", text)


def _require(holds: bool, key: str, text: str) -> None:
    if not holds:
        raise UserError(f"{key} {text}")


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dictionaries and lists, as YAML and JSON know them; without what is secret in data.shards."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value

    values = plain(dataclasses.asdict(config))
    if isinstance(config, Config):
        values["data"]["shards"] = shown(config.data.shards)
    return values


def as_yaml(config: Config) -> str:
    """A configuration as a YAML file that `--config` reads."""
    return yaml.safe_dump(as_dict(config), sort_keys=False)


def model_from_dict(values: Any, name: str) -> VAEConfig:
    """The network's configuration from a JSON file's content, checked as strictly as the command line.

    Raises:
        UserError: naming the file `name` and the key.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(VAEConfig, None)
    try:
        if not isinstance(values, dict):
            raise UserError("the network's configuration is not an object")
        _check_lists(values)
        config: VAEConfig = VAEConfig(**vars(parser.instantiate(parser.parse_object(values))))
        check(Config(model=config))
    except (ArgumentError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: {_plain(one_line(error)):.300}") from None
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return config
