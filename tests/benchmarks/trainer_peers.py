"""Other training loops with the same images, batch, precision and network, each written as its documentation recommends.

EMA, logging, checkpoints, augmentation except flips, and updates of the likelihood's scale are omitted, which can only make
these loops faster. Gradients are clipped where the library's example does.
"""

import contextlib
import io
import itertools
import logging
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from libraries import create_peers
from plain_network import Loss, plain
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Subset

from vae_scale.benchmark.data import InMemorySTL10
from vae_scale.benchmark.measuring import Speeds, synchronize
from vae_scale.benchmark.training import DTYPES, TRAIN
from vae_scale.config.options import Config
from vae_scale.data.images import Images
from vae_scale.errors import UserError
from vae_scale.models.kl import KLVAE
from vae_scale.models.networks import build_model
from vae_scale.models.vae import VAE
from vae_scale.training.trainer import Trainer

IMAGES = 2_000  # training images of the peers, rounded down to full batches
MIN_STEPS = 6  # per run; the first is not measured
NUM_WORKERS = os.cpu_count() or 1

OnStepEnd = Callable[[Tensor], None]  # called with the loss, a scalar


@dataclass
class Peer:
    """A training loop. Each run continues the previous one; loops that differ only in their workers share a model.

    Attributes:
        name: Name in tables.
        family: notebook, torch, lightning, diffusers or pythae.
        model: The trained model.
        train: Runs a number of steps.
        device: Device of the model.
        batch: Images per step.
        seconds: Approximate duration of a run; the first has few steps.
        losses: Losses of all steps so far.
    """

    name: str
    family: str
    model: nn.Module
    train: Callable[[int, OnStepEnd], None]
    device: torch.device
    batch: int
    seconds: float
    losses: list[float] = field(default_factory=list)
    _steps: int = MIN_STEPS

    def run(self) -> float:
        """Returns images per second from the end of the first step, which includes the start of workers, to the last step."""
        times: list[float] = []
        losses: list[Tensor] = []

        def on_step_end(loss: Tensor) -> None:
            losses.append(loss.detach().float())
            if len(losses) in (1, self._steps):
                synchronize(self.device)
                times.append(time.perf_counter())

        self.train(self._steps, on_step_end)
        begin, end = times
        speed = (self._steps - 1) * self.batch / (end - begin)
        self.losses += torch.stack(losses).tolist()
        self._steps = max(MIN_STEPS, math.ceil(speed * self.seconds / self.batch))
        return speed

    @property
    def learns(self) -> bool:
        """Whether the loss of the last quarter of all steps is below that of the first."""
        quarter = max(1, len(self.losses) // 4)
        return statistics.fmean(self.losses[-quarter:]) < statistics.fmean(self.losses[:quarter])


def peers(trainer: Trainer, seconds: float, scratch: Path, families: Sequence[str] = ()) -> tuple[list[Peer], dict[str, str]]:
    """Creates training loops with the configuration of a trainer.

    Args:
        trainer: The reference.
        seconds: Approximate duration of a run.
        scratch: Output folder.
        families: Libraries; all of them if empty.

    Returns:
        The loops, and for each library that is not available, the reason in one line.

    Raises:
        UserError: the trainer trains a prior, there are too few images, or a library is unknown.
    """
    config, train_set = trainer.config, trainer.train_set
    known = {"notebook": _notebook, "torch": _torch, "lightning": _lightning, "diffusers": _diffusers, "pythae": _pythae}
    if unknown := set(families) - set(known):
        raise UserError(f"--peers has no {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    if config.prior.vae is not None:
        raise UserError("--peers requires a VAE without prior.vae")
    batch = config.train.global_batch_size
    count = min(len(train_set), max(IMAGES, batch)) // batch * batch
    if not count:
        raise UserError(f"{train_set.location}: {len(train_set):,} images are too few for batches of {batch}")
    images = train_set.load_images(np.arange(count))
    mixed, compiled = trainer.accelerator.mixed_precision, trainer.forward is not trainer.objective
    common = _Common(config, images, scratch, trainer.device, mixed, compiled, seconds)
    with _quiet():
        return create_peers({name: partial(known[name], common) for name in families or known})


def compare(loops: list[Peer], speeds: Speeds) -> tuple[dict[str, float], dict[str, str]]:
    """Returns the speed of the trainer over the best of each library and over the fastest loop; and loops that do not learn.

    Args:
        loops: Loops after their runs.
        speeds: Their measurements and those of the trainer.
    """
    not_learning = {peer.name: "does not learn: its loss did not decrease" for peer in loops if not peer.learns}
    best: dict[str, float] = {}
    for peer in loops:
        if peer.name not in not_learning:
            best[peer.family] = max(best.get(peer.family, 0.0), statistics.median(speeds[peer.name]))
    ratios = {f"over_{family}": statistics.median(speeds[TRAIN]) / speed for family, speed in best.items()}
    if ratios:
        ratios["over_fastest_peer"] = min(ratios.values())
    return ratios, not_learning


@dataclass
class _Common:
    """Settings common to all peers."""

    config: Config
    images: Images
    scratch: Path
    device: torch.device
    mixed: str  # Accelerate's mixed_precision: no, bf16 or fp16
    compiled: bool  # whether to compile loops whose documentation recommends it, as the trainer is compiled
    seconds: float

    def network(self) -> VAE:
        return plain(build_model(self.config.model, self.images.shape[1])).to(self.device)

    def loader(self, workers: int, *transforms: Any) -> "DataLoader[Any]":
        """Shuffled batches of torchvision's STL10, with `transforms` after ToTensor."""
        from torchvision.transforms import Compose, RandomHorizontalFlip, ToTensor

        flip = [RandomHorizontalFlip()] if self.config.data.horizontal_flip else []
        stl10 = InMemorySTL10(self.images, Compose([*flip, ToTensor(), *transforms]))
        pinned = workers > 0 and self.device.type == "cuda"
        settings: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": pinned}
        return DataLoader(stl10, self.config.train.global_batch_size, shuffle=True, **settings)

    def peer(self, family: str, name: str, model: nn.Module, train: Callable[[int, OnStepEnd], None]) -> Peer:
        batch = self.config.train.global_batch_size
        return Peer(f"{family}, {name}", family, model, train, self.device, batch, self.seconds)


def _notebook(common: _Common) -> list[Peer]:
    """The loop of the seed notebook: Adam, no workers, and loss.item() in every step; fp32 for the notebook's network."""
    is_notebook = common.config.model.network == "seed_notebook"
    common = replace(common, mixed="no") if is_notebook else common
    loss_fn = Loss(common.network())
    optimizer = torch.optim.Adam(loss_fn.parameters(), lr=common.config.optimizer.lr)
    train = _loop(common, loss_fn, optimizer, common.loader(0), torch.contiguous_format, torch.Tensor.item)
    return [common.peer("notebook", "its own loop in fp32" if is_notebook else "its loop, 0 workers", loss_fn, train)]


def _torch(common: _Common) -> list[Peer]:
    """A loop as in PyTorch's performance tuning guide.

    Fused optimizer, no device synchronization, pinned memory, torch.compile if the trainer uses it, workers and
    channels_last. The last two are not always faster, so a second variant omits them.
    """

    def peer(layout: torch.memory_format, workers: int) -> Peer:
        loss_fn = Loss(common.network()).to(memory_format=layout)
        if common.compiled:
            loss_fn.compile()
        optimizer = torch.optim.Adam(loss_fn.parameters(), lr=common.config.optimizer.lr, fused=True)
        train = _loop(common, loss_fn, optimizer, common.loader(workers), layout, lambda loss: None)
        name = "channels_last" if layout == torch.channels_last else "contiguous"
        return common.peer("torch", f"its tuning guide, {name}, {workers} workers", loss_fn, train)

    return [peer(torch.channels_last, NUM_WORKERS), peer(torch.contiguous_format, 0)]


def _loop(
    common: _Common,
    loss_fn: Loss,
    optimizer: torch.optim.Optimizer,
    loader: "DataLoader[Any]",
    layout: torch.memory_format,
    read: Callable[[Tensor], object],
) -> Callable[[int, OnStepEnd], None]:
    """Returns a plain training loop that calls `read` with the loss of each step."""
    kind = common.device.type
    scaler = torch.amp.GradScaler(kind, enabled=common.mixed == "fp16")

    def train(steps: int, on_step_end: OnStepEnd) -> None:
        for images, _ in itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), steps):
            images = images.to(common.device, non_blocking=True).to(memory_format=layout)
            with torch.autocast(kind, DTYPES.get(common.mixed), enabled=common.mixed != "no"):
                loss = loss_fn(images)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            read(loss)
            on_step_end(loss)

    return train


def _lightning(common: _Common) -> list[Peer]:
    """Lightning's Trainer, with workers, and torch.compile if the trainer uses it, as its performance guide recommends.

    Each run is a separate fit with a new optimizer.
    """
    import lightning

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.loss_fn = Loss(common.network())
            if common.compiled:
                self.loss_fn.compile()

        def training_step(self, batch: list[Tensor], number: int) -> Tensor:
            return self.loss_fn(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=common.config.optimizer.lr)

    precision = {"no": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[common.mixed]
    settings = {"accelerator": common.device.type, "devices": 1, "precision": precision}
    disabled = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)

    module = Module()

    def peer(workers: int) -> Peer:
        loader = common.loader(workers)

        def train(steps: int, on_step_end: OnStepEnd) -> None:
            class StepEnd(lightning.Callback):  # type: ignore[misc]
                def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
                    on_step_end(outputs["loss"])

            with _quiet():
                trainer = lightning.Trainer(max_steps=steps, max_epochs=-1, callbacks=[StepEnd()], **settings, **disabled)
                trainer.fit(module, loader)

        return common.peer("lightning", f"Trainer, {workers} workers", module, train)

    return [peer(workers) for workers in (0, NUM_WORKERS)]


def _diffusers(common: _Common) -> list[Peer]:
    """AutoencoderKL in the Accelerate loop of diffusers' example, without the perceptual loss and the discriminator.

    The example has an option for the number of workers, 0 by default. Unlike there, images are read by torchvision's STL10
    instead of decoded from PNG, and weights stay fp32 under autocast instead of being converted to bf16.
    """
    model = build_model(common.config.model, common.images.shape[1])
    if not isinstance(model, KLVAE):
        raise UserError("its AutoencoderKL is a different network; use --model.network=kl")
    from accelerate import Accelerator
    from diffusers.optimization import get_scheduler
    from torchvision.transforms import Normalize

    vae = model.to_diffusers().train()
    accelerator = Accelerator(cpu=common.device.type == "cpu", mixed_precision=common.mixed)
    adamw = torch.optim.AdamW(vae.parameters(), lr=common.config.optimizer.lr, weight_decay=1e-2)
    vae, optimizer, scheduler = accelerator.prepare(vae, adamw, get_scheduler("constant", adamw))

    def peer(workers: int) -> Peer:
        loader = accelerator.prepare(common.loader(workers, Normalize([0.5], [0.5])))

        def train(steps: int, on_step_end: OnStepEnd) -> None:
            for images, _ in itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), steps):
                with accelerator.accumulate(vae):
                    with accelerator.autocast():
                        posterior = accelerator.unwrap_model(vae).encode(images).latent_dist
                        rebuilt = accelerator.unwrap_model(vae).decode(posterior.sample()).sample
                    error = nn.functional.mse_loss(rebuilt.float(), images, reduction="sum")
                    loss = (error + 1e-6 * posterior.kl().sum()) / len(images)
                    accelerator.backward(loss)
                    accelerator.clip_grad_norm_(vae.parameters(), 1.0)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                loss.item()
                on_step_end(loss)

        return common.peer("diffusers", f"AutoencoderKL with Accelerate, {workers} workers", vae, train)

    return [peer(workers) for workers in (0, NUM_WORKERS)]


def _pythae(common: _Common) -> list[Peer]:
    """pythae's VAE and loss with the same encoder and decoder, and its defaults: images in memory, no workers, Adam.

    A run is one epoch of its BaseTrainer, without the checkpoint that `train` would pickle. Its `amp` is CUDA autocast in
    fp16, so on a CPU it always trains in fp32.
    """
    from pythae.data.preprocessors import DataProcessor
    from pythae.models import VAE as PythaeVAE
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    network, config = common.network(), common.config

    class Encoder(BaseEncoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.vae = network

        def forward(self, images: Tensor) -> Any:
            posterior = self.vae.encode(2 * images - 1)
            return ModelOutput(embedding=posterior.mean.flatten(1), log_covariance=2 * posterior.log_sigma.flatten(1))

    class Decoder(BaseDecoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.vae = network

        def forward(self, latents: Tensor, levels: None = None) -> Any:
            return ModelOutput(reconstruction=(self.vae.decode(latents.unflatten(1, network.latent_shape)) + 1) / 2)

    settings = VAEConfig(input_dim=(3, *common.images.shape[1:3]), latent_dim=math.prod(network.latent_shape))
    model = PythaeVAE(settings, encoder=Encoder(), decoder=Decoder())
    amp = common.device.type == "cuda" and common.mixed != "no"
    training = BaseTrainerConfig(
        output_dir=str(common.scratch / "pythae"),
        num_epochs=1,
        learning_rate=config.optimizer.lr,
        per_device_train_batch_size=config.train.global_batch_size,
        amp=amp,
        no_cuda=common.device.type == "cpu",
    )
    dataset = DataProcessor.to_dataset(torch.from_numpy(common.images).permute(0, 3, 1, 2) / 255)

    def train(steps: int, on_step_end: OnStepEnd) -> None:
        losses: list[Tensor] = []

        class StepEnd(TrainingCallback):  # type: ignore[misc]
            def on_train_step_end(self, *args: Any, **options: Any) -> None:
                on_step_end(losses[-1])

        count = steps * config.train.global_batch_size
        rows = list(RandomSampler(dataset, num_samples=count))
        with _quiet():
            trainer = BaseTrainer(model, Subset(dataset, rows), training_config=training, callbacks=[StepEnd()])
            trainer.prepare_training()
            hook = model.register_forward_hook(lambda _, inputs, output: losses.append(output.loss.detach()))
            try:
                trainer.train_step(1)
            finally:
                hook.remove()

    return [common.peer("pythae", f"BaseTrainer, {'fp16' if amp else 'fp32'}", model, train)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses messages of the libraries."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(level)
