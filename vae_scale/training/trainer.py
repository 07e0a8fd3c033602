"""The training loop."""

import contextlib
import math
import sys
import time
from collections.abc import Generator
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from tqdm import tqdm

from vae_scale import __version__
from vae_scale.config import Config, as_dict, as_yaml, check_processes, check_resolution
from vae_scale.data.shards import ShardSet
from vae_scale.data.storage import Cache
from vae_scale.data.stream import Batch, Stream, default_window
from vae_scale.errors import UserError
from vae_scale.models.vae import VAE
from vae_scale.randomness import key
from vae_scale.training import checkpoint, launching, pictures
from vae_scale.training.ema import EMA
from vae_scale.training.evaluation import Processes
from vae_scale.training.objective import to_model
from vae_scale.training.schedules import learning_rate
from vae_scale.training.stages import FlowStage, Stage, VAEStage, trained
from vae_scale.training.tracking import Tracker

PICTURED = 32  # held-out images shown beside their reconstructions


class Trainer:
    """Trains one stage of a VAE. Everything it does follows from the configuration and the number of images seen.

    Attributes:
        images_seen: Progress, in images, over all processes.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.accelerator: Accelerator = launching.start(config.train)
        self.device: torch.device = self.accelerator.device
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        check_processes(config, self.ranks)
        shards = ShardSet.open(config.data.shards, Cache.configured(config.data.cache_dir, config.data.cache_gib))
        self.train_set = shards.select(*config.data.train_splits)
        self.test_set = shards.select(config.data.test)

        told = ", ".join(f"{name} {count:,}" for name, count in self.train_set.splits.items())
        self._say(f"training on {told}; {len(self.test_set):,} images of {config.data.test} held out")
        if not shards.storage.local:
            self._say(f"fetching shards from {shards.location}; the first step waits for the first ones")

        self.processes = Processes.of(self.accelerator)
        torch.manual_seed(key(config.seed, "weights"))
        self.stage = self._choose_stage()
        self.model = self.stage.model
        self.ema = EMA(self.model, config.train.ema)
        self.optimizer = torch.optim.AdamW(
            self.stage.groups(),
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        self.images_seen = 0
        # A run keeps its order of images, should its shards have moved to where another window is the default.
        self.window = config.data.window or default_window(self.train_set)
        wandb_id = self._resume()
        self.objective, self.stepper = self.accelerator.prepare(self.stage.objective, self.optimizer)
        self.forward = self._compiled(self.objective)
        self.stream = Stream(
            self.train_set,
            config.train.batch_size,
            config.seed,
            self.rank,
            self.ranks,
            self.device,
            self.images_seen,
            self.window,
            config.data.prefetch,
            config.data.cache,
            config.data.streams,
        )
        if self.accelerator.is_main_process:
            config.folder.mkdir(parents=True, exist_ok=True)
            (config.folder / "config.yaml").write_text(as_yaml(config))
        self.writer = checkpoint.Writer(config.folder, config.checkpoint.keep)
        self.tracker = Tracker(config, self.images_seen, wandb_id) if self.accelerator.is_main_process else None
        self.sums = torch.zeros(self.stage.measured + 1, device=self.device)
        self.evaluated_at = -1

    def _choose_stage(self) -> Stage:
        config = self.config
        if config.prior.vae is not None:
            return FlowStage(config, self.device, self.train_set, config.train.batch_size // self.ranks, self.processes)
        check_resolution(config.model, self.train_set.image_shape)
        return VAEStage(config, self.device, self.train_set)

    def run(self) -> None:
        """Trains until `train.images` images were seen."""
        config = self.config
        if self.images_seen >= config.train.images:
            self._say(f"{config.folder} has seen {self.images_seen:,} images already; raise train.images to go on")
        with self._progress() as bar:
            self._begin_interval()
            for batch in self._batches():
                self._advance(batch, bar)
            self.writer.wait()
        if self.tracker:
            self.tracker.close()
        self.accelerator.end_training()

    def _advance(self, batch: Batch, bar: "tqdm[Any]") -> None:
        """One step, and what is due after it."""
        config = self.config
        self._step(batch)
        before, self.images_seen = self.images_seen, self.images_seen + config.train.batch_size
        bar.update(config.train.batch_size)
        if self._due(config.train.log_every * config.train.batch_size, before):
            self._log(bar)
        if self._due(config.evaluate.every, before):
            self._evaluate(bar)
        if self._due(config.checkpoint.every, before):
            self._save()

    def _due(self, every: int, before: int) -> bool:
        """Whether a multiple of `every` images, or the end, came with the last step."""
        return self.images_seen >= self.config.train.images or before // every < self.images_seen // every

    def _batches(self) -> Generator[Batch, None, None]:
        if self.images_seen >= self.config.train.images:
            return
        for batch in self.stream:
            yield batch
            if self.images_seen >= self.config.train.images:
                return

    def _step(self, batch: Batch) -> None:
        """One optimizer step on a global batch, of which this process has its share."""
        config = self.config
        lr = learning_rate(config.optimizer, self.images_seen, config.train.images)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        measured = self._gradients(batch.images, self._draws(batch), self.stage.arguments(self.images_seen))
        norm = self._update()
        measured = self.accelerator.reduce(measured, "mean")
        self.stage.stepped(measured)
        self.ema.update(self.images_seen // config.train.batch_size + 1)
        self.sums += torch.cat([measured, norm.reshape(1)])

    def _gradients(self, images: Tensor, draws: dict[str, Tensor], arguments: tuple[Tensor, ...]) -> Tensor:
        """Gradients of the loss of this process's images, taken in pieces; returns what was measured."""
        pieces = self.config.train.accumulation
        size = len(images) // pieces
        measured = torch.zeros(self.stage.measured, device=self.device)
        for piece in range(pieces):
            part = slice(piece * size, (piece + 1) * size)
            drawn = {name: numbers[part] for name, numbers in draws.items()}
            last = piece == pieces - 1
            # Gradients of all processes are averaged with the last piece only.
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.objective):
                loss, values = self.forward(images[part], drawn, *arguments)
                self.accelerator.backward(loss / pieces)
            measured += values / pieces
        return measured

    def _update(self) -> Tensor:
        """Moves the weights along the gradients, once these are clipped; returns their norm: a scalar."""
        limit = self.config.optimizer.clip or float("inf")
        norm, *_ = [self.accelerator.clip_grad_norm_(group["params"], limit) for group in self.stepper.param_groups]
        self.stepper.step()
        self.stepper.zero_grad(set_to_none=True)
        return norm

    def _draws(self, batch: Batch) -> dict[str, Tensor]:
        """This process's share of the global batch's random numbers, so that any number of processes draws the same."""
        share = self.config.train.batch_size // self.ranks
        mine = slice(self.rank * share, (self.rank + 1) * share)
        drawn = self.stage.draws(self.images_seen, self.config.train.batch_size)
        return self.stage.labelled({name: numbers[mine] for name, numbers in drawn.items()}, batch.rows)

    def _begin_interval(self) -> None:
        self.sums.zero_()
        self.stream.wait_seconds = 0.0
        self.interval = (time.perf_counter(), self.images_seen)

    def _log(self, bar: "tqdm[Any]") -> None:
        """Means over the steps since the last call. The only place where the loop waits for the device."""
        began, seen = self.interval
        steps = (self.images_seen - seen) // self.config.train.batch_size
        *means, norm = (self.sums / steps).tolist()
        seconds = time.perf_counter() - began
        if not math.isfinite(means[0]):
            raise UserError(
                f"the loss became {means[0]} by image {self.images_seen:,}; lower optimizer.lr or optimizer.clip, or use "
                "train.precision fp32, and run again: training goes on from the last checkpoint"
            )
        config, speed = self.config, (self.images_seen - seen) / seconds
        values, shown = self.stage.logged(means, self.images_seen)
        values |= {
            "train/lr": learning_rate(config.optimizer, self.images_seen, config.train.images),
            "train/grad_norm": norm,
            "train/epoch": self.images_seen / len(self.train_set),
            "speed/images_per_second": speed,
            "data/wait_share": self.stream.wait_seconds / seconds,
            "speed/memory_bytes": _memory(self.device),
        }
        bar.set_postfix_str(f"{shown}, {speed:,.0f} images/s, waits {values['data/wait_share']:.1%}")
        if self.tracker:
            self.tracker.log(self.images_seen, values)
        self._begin_interval()

    def _evaluate(self, bar: "tqdm[Any]") -> None:
        """Measures the averaged model on held-out images, and draws reconstructions and samples."""
        share = self.config.train.batch_size // self.ranks // self.config.train.accumulation
        with self.accelerator.autocast():
            found = self.stage.evaluate(self.ema.model, self.test_set, share, self.processes)
        self.evaluated_at = self.images_seen
        if self.tracker:
            self.tracker.log(self.images_seen, {f"eval/{name}": value for name, value in found.items()})
            told = ", ".join(f"{name} {value:,.3f}" for name, value in found.items())
            bar.write(f"{self.images_seen:,} images: held-out {told}", file=sys.stderr)
            self._draw(self.tracker)
        self._begin_interval()

    def _draw(self, tracker: Tracker) -> None:
        folder, model = self.config.folder / "samples", self.ema.model
        pictured = self.test_set.images(np.arange(min(PICTURED, len(self.test_set))))
        originals = to_model(torch.from_numpy(pictured).to(self.device))
        with torch.no_grad():
            reconstructions = model.reconstruct(originals)
        drawn = {
            "samples": (model.sample(self.config.evaluate.samples, self.config.seed), None),
            "reconstructions": (pictures.side_by_side(originals, reconstructions), 8),
        }
        for name, (images, columns) in drawn.items():
            path = folder / f"{name}_{self.images_seen:09d}.png"
            pictures.save_grid(images, path, columns)
            tracker.picture(self.images_seen, f"samples/{name}", path)

    def _save(self) -> None:
        """Hands a checkpoint to the writer, once all processes are found to hold the same weights."""
        fingerprints = self.accelerator.gather(_fingerprint(self.model)[None])
        if not bool((fingerprints == fingerprints[0]).all()):
            raise RuntimeError(f"processes differ in their weights after {self.images_seen} images: {fingerprints.tolist()}")
        if not self.tracker:
            return
        optimizer = {
            f"{part}.{name}": value
            for name, parameter in trained(self.model)
            for part, value in self.optimizer.state[parameter].items()
        }
        scaler = self.accelerator.scaler
        state = {
            "images_seen": self.images_seen,
            "processes": self.ranks,
            "weights": fingerprints.tolist(),
            "wandb_id": self.tracker.wandb_id,
            "scaler": scaler.state_dict() if scaler else None,
            "shards": self.train_set.fingerprint,
            "window": self.window,
            "config": as_dict(self.config),
            "versions": {"vae_scale": __version__, "torch": torch.__version__},
        }
        tensors = {"model": self.model.state_dict(), "ema": self.ema.model.state_dict(), "optimizer": optimizer}
        mixture = self.ema.model.mixture
        fresh = self.evaluated_at == self.images_seen or not self.stage.fits_mixture
        if mixture and fresh:  # one fitted to older weights would mislead
            tensors["mixture"] = vars(mixture)
        self.writer.save(self.images_seen, tensors, state, self.model.describe())

    def _resume(self) -> str | None:
        """Goes on from the newest whole checkpoint, if there is one; returns its wandb run's id."""
        found = checkpoint.newest(self.config.folder) if self.accelerator.is_main_process else None
        # Rank 0 decides, so that all go on from the same one.
        images = torch.tensor(-1 if found is None else checkpoint.images_of(found), device=self.device)
        images_seen = int(broadcast(images))
        if images_seen < 0:
            return None
        folder = checkpoint.folder_of(self.config.folder, images_seen)
        state, tensors = checkpoint.load(folder, "model", "ema", "optimizer")
        was, now = _fixed(state["config"]), _fixed(as_dict(self.config))
        if different := sorted(name for name, value in now.items() if was.get(name, value) != value):
            raise UserError(f"{folder}: was trained with another {', '.join(different)}; choose another --run")
        if state["shards"] != self.train_set.fingerprint:
            raise UserError(f"{folder}: was trained on other shards than {self.train_set.location}; choose another --run")
        self.model.load_state_dict(tensors["model"])
        self.ema.model.load_state_dict(tensors["ema"])
        for name, parameter in trained(self.model):
            for part in ("step", "exp_avg", "exp_avg_sq"):
                saved = tensors["optimizer"][f"{part}.{name}"]
                like = parameter.detach() if saved.ndim else torch.zeros((), device=self.device)
                self.optimizer.state[parameter][part] = torch.empty_like(like).copy_(saved)
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.images_seen, self.window = images_seen, state.get("window", self.window)
        self._say(f"resuming {self.config.folder} at {self.images_seen:,} images")
        return state["wandb_id"]

    def _compiled(self, objective: Any) -> Any:
        wanted = self.config.train.compile
        on = wanted == "on" or (wanted == "auto" and self.device.type == "cuda")
        if not on:
            return objective
        self._say("compiling; the first step takes a minute or two")
        return torch.compile(objective)

    def _progress(self) -> "tqdm[Any]":
        return tqdm(
            total=self.config.train.images,
            initial=self.images_seen,
            unit=" images",
            unit_scale=True,
            desc=str(self.config.folder),
            disable=not self.accelerator.is_main_process,
            bar_format="{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
            dynamic_ncols=True,
        )

    def _say(self, text: str) -> None:
        self.accelerator.print(text, flush=True)


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    """The options that a run cannot change on its way: its network, and what decides the order of images."""
    network = {f"model.{name}": value for name, value in config["model"].items()}
    order = {f"data.{name}": config["data"][name] for name in ("train", "window", "streams")}
    flow = {
        f"prior.{name}": config["prior"][name] for name in ("width", "depth", "patch") if config["prior"]["vae"] is not None
    }
    return network | order | flow | {"seed": config["seed"], "prior.vae": config["prior"]["vae"] is not None}


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(psutil.Process().memory_info().rss)


@torch.no_grad()
def _fingerprint(model: VAE) -> Tensor:
    """A number that differs wherever a single bit of the weights does, in practice: int64 scalar."""
    sums = [(part.contiguous().view(torch.int32).long() * 1_000_003).sum() for part in model.parameters()]
    places = torch.arange(1, len(sums) + 1, device=sums[0].device)
    return (torch.stack(sums) * places).sum()


def train(config: Config) -> None:
    """Trains as configured, in the run's folder; goes on where an earlier call stopped."""
    Trainer(config).run()
