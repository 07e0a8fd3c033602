"""Every option of training with its type, range, default and description. Nothing here imports torch."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from jsonargparse.typing import restricted_number_type

from vae_scale.errors import UserError, redact

MAX_BLOCKS = 1000  # in a network; configuration files may be untrusted
BELOW = ("<", 2**63)

if TYPE_CHECKING:  # mypy does not support types that are created at run time
    from builtins import float as Fraction
    from builtins import float as NonNegativeFloat
    from builtins import float as PositiveFloat
    from builtins import float as Ratio
    from builtins import int as BlockCount
    from builtins import int as NonNegativeInt
    from builtins import int as PositiveInt
else:  # the types of jsonargparse with these names have no upper bound

    def _number(kind: type, description: str, *bounds: tuple[str, float]) -> type:
        return restricted_number_type(description, kind, list(bounds))

    PositiveInt = _number(int, "a positive integer", (">", 0), BELOW)
    NonNegativeInt = _number(int, "a non-negative integer", (">=", 0), BELOW)
    BlockCount = _number(int, f"an integer from 1 to {MAX_BLOCKS}", (">", 0), ("<=", MAX_BLOCKS))
    PositiveFloat = _number(float, "a positive number", (">", 0), BELOW)
    NonNegativeFloat = _number(float, "a non-negative number", (">=", 0), BELOW)
    Ratio = _number(float, "a number from 0 to 0.9", (">=", 0), ("<=", 0.9))
    Fraction = _number(float, "a number from 0 to below 1", (">=", 0), ("<", 1))

Preset = Literal["tiny", "small", "base", "large", "kl", "seed_notebook"]
Network = Literal["resnet", "kl", "seed_notebook"]

# Defaults of `model` for each preset. YAML files and the command line override them.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"patch_size": 4, "width": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "latent_channels": 4},
    "small": {"patch_size": 4, "width": 64, "channel_mult": [1, 2, 4], "num_res_blocks": 1, "latent_channels": 16},
    "base": {"width": 128, "channel_mult": [1, 2, 4], "num_res_blocks": 2, "latent_channels": 8, "attention": True},
    "large": {"width": 192, "channel_mult": [1, 2, 4], "num_res_blocks": 3, "latent_channels": 8, "attention": True},
    "kl": {"network": "kl", "width": 128, "channel_mult": [1, 2, 4, 4], "num_res_blocks": 2, "latent_channels": 4},
    "seed_notebook": {"network": "seed_notebook", "latent": "vector", "latent_channels": 10, "likelihood": "mse"},
}


@dataclass
class VAEConfig:
    """The network.

    Attributes:
        preset: Defaults for the options of this section: tiny, small, base, large, kl or seed_notebook.
        network: resnet, kl (AutoencoderKL; extra diffusers) or seed_notebook.
        patch_size: Side in pixels of the patches that the first layer folds into channels (space to depth).
        width: Channels at the finest level.
        channel_mult: Channels of each level, as multiples of `width`. Each level halves the resolution of the previous one.
        num_res_blocks: Residual blocks per level (the decoder has one more).
        attention: Whether to use self-attention at the coarsest level.
        latent: spatial (a feature map) or vector (one vector per image).
        latent_channels: Channels of the latent map, or length of the latent vector.
        likelihood: Distribution p(image | latent). mse is the squared error of an output with a sigmoid.
    """

    preset: Preset = "base"
    network: Network = "resnet"
    patch_size: PositiveInt = 2
    width: PositiveInt = 128
    channel_mult: list[PositiveInt] = field(default_factory=lambda: [1, 2, 4])
    num_res_blocks: BlockCount = 2
    attention: bool = False
    latent: Literal["spatial", "vector"] = "spatial"
    latent_channels: PositiveInt = 8
    likelihood: Literal["gaussian", "mse"] = "gaussian"

    @property
    def downsampling_factor(self) -> int:
        """The factor f between the side of the image and the side of the coarsest feature map."""
        levels = 2 ** (len(self.channel_mult) - 1)
        factors = {"resnet": self.patch_size * levels, "kl": levels, "seed_notebook": 4}
        return factors[self.network]


@dataclass
class DataConfig:
    """The shards and how they are read.

    Attributes:
        shards: Folder of the shards, or its URL (http, https, s3, gs, hf).
        train: Comma-separated splits to train on. Splits that the shards do not have are ignored.
        test: Split used for evaluation, never for training.
        shuffle_window: Number of shards whose samples are shuffled together. null: all, or 16 if they are remote or compressed.
        streams: Groups of shards from which each batch is drawn. With N streams, each of N nodes reads 1/N of the shards.
        prefetch_batches: Batches prepared in advance.
        cache: Memory that holds the images: host (memory-mapped files) or device (all images in GPU memory).
        horizontal_flip: Whether to flip images at random.
        random_crop: Largest fraction of each side removed by random cropping. The crop is resized to the original size.
        color_jitter: Largest relative change of brightness, contrast and saturation.
        cache_dir: Folder for downloaded shards. null: ~/.cache/vae_scale/shards.
        cache_size_gib: Maximum size of cache_dir in GiB. null: 50.
        on_bad_shard: For a missing or damaged shard: stop, or skip (replace its images by images of other shards).
    """

    shards: str = "data/stl10"
    train: str = "train,unlabeled"
    test: str = "test"
    shuffle_window: PositiveInt | None = None
    streams: PositiveInt = 1
    prefetch_batches: PositiveInt = 4
    cache: Literal["host", "device"] = "host"
    horizontal_flip: bool = True
    random_crop: Ratio = 0.0
    color_jitter: Ratio = 0.0
    cache_dir: str | None = None
    cache_size_gib: PositiveFloat | None = None
    on_bad_shard: Literal["stop", "skip"] = "stop"

    @property
    def train_splits(self) -> list[str]:
        """Names of the splits to train on."""
        return [name.strip() for name in self.train.split(",") if name.strip()]


@dataclass
class ObjectiveConfig:
    """The loss of a VAE in nats per image: -log p(image | latent) + beta KL.

    Attributes:
        beta: Weight of the KL divergence. 1 gives the negative ELBO; less keeps more latent channels in use.
    """

    beta: NonNegativeFloat = 1.0


@dataclass
class PriorConfig:
    """The second stage: a rectified flow over the latents of a trained VAE.

    Attributes:
        vae: Run of the VAE over whose latents a flow prior is trained. null: train a VAE.
        width: Channels of the U-Net; a multiple of 32.
        depth: Residual blocks before and after the middle of the U-Net, which has twice as many.
        clusters: Number of clusters of the latents that are the classes. null: the labels of the images are the classes.
    """

    vae: str | None = None
    width: PositiveInt = 256
    depth: BlockCount = 2
    clusters: PositiveInt | None = None


@dataclass
class OptimizerConfig:
    """AdamW and its learning rate schedule.

    Attributes:
        lr: Peak learning rate.
        warmup_images: Images over which the learning rate increases linearly from 0.
        schedule: cosine (decays to 1% of `lr` by the last image) or constant.
        betas: Decay rates of the first and second moment.
        max_grad_norm: Gradients of the loss per dimension are clipped to this norm. null: no clipping.
        skip_threshold: Steps with a larger or non-finite gradient norm are skipped. null: only non-finite.
    """

    lr: PositiveFloat = 5e-4
    warmup_images: NonNegativeInt = 20_000
    schedule: Literal["cosine", "constant"] = "cosine"
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    max_grad_norm: PositiveFloat | None = 1.0
    skip_threshold: PositiveFloat | None = 100.0


@dataclass
class TrainConfig:
    """The training loop.

    Attributes:
        images: Images to train on in total, including repetitions.
        batch_size: Images per optimizer step over all processes, or auto: the largest batch that fits into memory.
        gradient_accumulation_steps: Forward and backward passes per optimizer step and process. More passes need less memory.
        precision: Numeric precision. auto: bf16 if the hardware supports it, otherwise fp16 on GPUs and fp32 on CPUs.
        grad_reduce_dtype: Data type in which gradients are averaged over processes. bf16 halves the traffic, but rounds.
        compile: Use of torch.compile. auto: on for GPUs. cuda_graphs: with CUDA graphs, for few images per GPU.
        ema_decay: Decay per step of the averaged weights, which evaluation and sampling use.
        log_every: Optimizer steps between log lines.
        timeout: Seconds without progress after which the run is aborted.
    """

    images: PositiveInt = 10_000_000
    batch_size: PositiveInt | Literal["auto"] = 256
    gradient_accumulation_steps: PositiveInt = 1
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = "auto"
    grad_reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    compile: Literal["auto", "on", "off", "cuda_graphs"] = "auto"
    ema_decay: Fraction = 0.999
    log_every: PositiveInt = 50
    timeout: PositiveInt = 600

    @property
    def global_batch_size(self) -> int:
        """Images per optimizer step over all processes.

        Raises:
            UserError: `batch_size` is auto and has not been resolved yet.
        """
        if self.batch_size == "auto":
            raise UserError("train.batch_size is auto, which is only supported for training; give a number")
        return self.batch_size


@dataclass
class EvaluateConfig:
    """Evaluation on held-out images during training.

    Attributes:
        every: Images between evaluations. Training also ends with an evaluation.
        images: Maximum number of held-out images.
        samples: Images in the grid of samples, which is written with every checkpoint.
        early: Whether to also write samples and reconstructions after 256, 512, 1024, ... images before the first evaluation.
        prior_fit_images: Maximum number of training images to whose latents the mixture prior is fitted.
    """

    every: PositiveInt = 500_000
    images: PositiveInt = 2_000
    samples: PositiveInt = 64
    early: bool = True
    prior_fit_images: PositiveInt = 10_000


@dataclass
class CheckpointConfig:
    """Checkpoints.

    Attributes:
        every: Images between checkpoints. Training also ends with a checkpoint.
        keep: Number of newest checkpoints to keep.
        keep_every: Also keep the first checkpoint after each multiple of this number of images. null: keep no others.
    """

    every: PositiveInt = 500_000
    keep: PositiveInt = 3
    keep_every: PositiveInt | None = None


@dataclass
class TrackConfig:
    """Experiment tracking, in addition to the files in the run folder.

    Attributes:
        tracker: wandb (offline if there is no API key), tensorboard or none.
        project: Name of the wandb project.
        artifacts: Whether to upload checkpoints and the manifest of the shards to wandb.
    """

    tracker: Literal["wandb", "tensorboard", "none"] = "wandb"
    project: str = "vae_scale"
    artifacts: bool = False


@dataclass
class Config:
    """The configuration of a run.

    Attributes:
        run: Folder of the run. null: runs/NAME, where NAME is the name of the configuration file.
        seed: Random seed.
        log: Console output: bar (progress bar and log lines) or json (one JSON object per line and nothing else).
    """

    run: str | None = None
    seed: NonNegativeInt = 0
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
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.run or "runs/default")


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a configuration as nested dictionaries and lists. Credentials in data.shards are removed."""
    values = dataclasses.asdict(config)
    if isinstance(config, Config):
        values["optimizer"]["betas"] = list(config.optimizer.betas)
        values["data"]["shards"] = redact(config.data.shards)
    return values


def to_yaml(config: Config) -> str:
    """Returns a configuration as YAML that `--config` accepts."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)
