"""The training loop."""

import contextlib
import dataclasses
import itertools
import json
import math
import time
import warnings
from collections.abc import Generator, Iterator
from functools import partial
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from vae_scale.config import Config, as_dict, as_yaml, check_processes, check_resolution
from vae_scale.data.shards import ShardSet
from vae_scale.data.storage import Cache
from vae_scale.data.stream import Batch, Stream, default_window
from vae_scale.errors import UserError, one_line
from vae_scale.models.vae import VAE
from vae_scale.randomness import key
from vae_scale.training import checkpoint, compiling, gallery, launching, sharding
from vae_scale.training.batch_size import largest_batch
from vae_scale.training.consistency import check_same, combine, fingerprint
from vae_scale.training.ema import EMA
from vae_scale.training.evaluation import Processes
from vae_scale.training.launching import resolve_precision
from vae_scale.training.meters import Meters, Reading
from vae_scale.training.objective import Objective
from vae_scale.training.picture_writer import PictureWriter
from vae_scale.training.resuming import changes, locked
from vae_scale.training.schedules import learning_rate
from vae_scale.training.stages import FlowStage, Stage, VAEStage, trained
from vae_scale.training.stopping import Stopping
from vae_scale.training.terminal import Terminal
from vae_scale.training.tracking import Tracker
from vae_scale.training.update import Update
from vae_scale.training.versions import versions
from vae_scale.training.watch import Pace, Watch

ENCODED = 64  # images at a time and process, before the batch's size is known
EARLIEST = 256  # images before the first pictures
REQUEUE = "requeue.json"  # in the run's folder, where a cluster stopped it and is to start it again
MOST_LEFT_OUT = 30  # steps in a row; the search for fp16's scale leaves out fewer


class Trainer:
    """Trains one stage of a VAE. Everything it does follows from the configuration and the number of images seen.

    Attributes:
        images_seen: Progress, in images, over all processes.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.accelerator: Accelerator = launching.start(config.train)
        self.device = launching.device_of(self.accelerator)
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        self.terminal = Terminal(config.log, self.accelerator.is_main_process)
        if config.train.batch_size != "auto":
            check_processes(config, self.ranks)
        cache = Cache.configured(config.data.cache_dir, config.data.cache_gib)
        shards = ShardSet.open(config.data.shards, cache, on_bad_shard=config.data.on_bad_shard)
        self.train_set = shards.select(*config.data.train_splits)
        self.test_set = shards.select(config.data.test)

        told = ", ".join(f"{name} {count:,}" for name, count in self.train_set.splits.items())
        self.terminal.say(f"training on {told}; {len(self.test_set):,} images of {config.data.test} held out")
        if not shards.storage.local:
            self.terminal.say(f"fetching shards from {shards.location}; the first step waits for the first ones")

        self.processes = Processes.of(self.accelerator)
        torch.manual_seed(key(config.seed, "weights"))
        self.stage = self._choose_stage()
        self.model = self.stage.model
        self.ema = EMA(self.model, config.train.ema)
        self.images_seen = 0
        self.meters = Meters(self.stage.measured, self.device)
        # A run keeps its order of images, should its shards have moved to where another window is the default.
        self.window = config.data.window or default_window(self.train_set)
        self.lock = locked(config.folder, self.accelerator.is_main_process, self.device)
        if self.accelerator.is_main_process:
            (config.folder / REQUEUE).unlink(missing_ok=True)
        self.state, moments = self._resume()
        if config.train.batch_size == "auto":
            self._find_batch_size()
        self.objective = self._distributed(self.stage.objective)
        self.update = Update(self.stage.groups(), config.optimizer, self.accelerator.scaler)
        if moments:
            self.update.load(trained(self.model), moments)
        self.ema.follow(self.model)
        self.forward = self._compiled(self.objective)
        self.stream = Stream(
            self.train_set,
            config.train.batch,
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
            (config.folder / "config.yaml").write_text(as_yaml(config))
        self.tracker = self._track() if self.accelerator.is_main_process else None
        not_saved = partial(self._happened, "not_saved")
        self.pictures = PictureWriter(config.folder / "samples", self.tracker.picture, not_saved) if self.tracker else None
        self.writer = checkpoint.Writer(
            config.folder,
            config.checkpoint.keep,
            config.checkpoint.keep_every,
            not_saved,
            self.tracker.checkpoint if self.tracker else None,
        )
        self.stopping = Stopping(self.device)
        self.watch = Watch(self.rank, self.ranks, config.train.timeout, partial(self._happened, "failed"))
        self.pace = Pace(self.device)
        self.processes = dataclasses.replace(self.processes, mark=self.watch.mark)
        self.fitted_at = -1  # images seen

    def _choose_stage(self) -> Stage:
        config = self.config
        if config.prior.vae is not None:
            batch = ENCODED if config.train.batch_size == "auto" else config.train.batch // self.ranks
            return FlowStage(config, self.device, self.train_set, batch, self.processes)
        check_resolution(config.model, self.train_set.image_shape)
        return VAEStage(config, self.device, self.train_set)

    def _find_batch_size(self) -> None:
        config = self.config
        pieces = self.ranks * config.train.accumulation
        config.train.batch_size = largest_batch(
            self.stage,
            self._compiled(self.stage.objective),
            self.train_set.image_shape,
            math.lcm(pieces, config.data.streams),
            len(self.train_set),
            pieces,
            self.accelerator.autocast,
            self.processes,
        )
        self.terminal.say(f"train.batch_size auto: {config.train.batch:,} images")

    def _distributed(self, objective: Objective) -> Any:
        """The objective, whose gradients are those of all processes."""
        if sharding.wanted():
            return sharding.shard(objective, self.device, self.ranks, self.config.train.exchange)
        with warnings.catch_warnings():  # newer versions of torch have another name for what Accelerate calls broadcast_buffers
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return self.accelerator.prepare(objective)

    def run(self) -> None:
        """Trains until `train.images` images were seen."""
        config = self.config
        if self.images_seen >= config.train.images:
            self.terminal.say(f"{config.folder} has seen {self.images_seen:,} images already; raise train.images to go on")
        try:
            with self.stopping, self._progress(), compiling.shown(self.terminal.status, self.watch.compiling):
                self._begin_interval()
                with self.watch:
                    for batch in self._batches():
                        self._advance(batch)
                        if self._leaving():
                            break
                self.writer.wait()
                self._finish_pictures()
        except Exception as error:
            self._happened("failed", one_line(error))
            with contextlib.suppress(Exception):
                self._finish_pictures()
            if self.tracker:
                self.tracker.close(failed=True)
            raise
        self._end()
        self.lock.release()

    def _end(self) -> None:
        """Tells whoever may start the run again how far it came."""
        if not self._leaving():
            self._happened("finished", "finished")
        else:
            if self.stopping.preempted and self.accelerator.is_main_process:
                (self.config.folder / REQUEUE).write_text(json.dumps({"images_seen": self.images_seen}) + "\n")
            self._happened("stopped", "stopped by a signal, and saved; to go on, run the same command again")
        if self.tracker:
            self.tracker.close()
        self.accelerator.end_training()

    def _finish_pictures(self) -> None:
        if self.pictures:
            self.pictures.wait()

    def _leaving(self) -> bool:
        """Whether a signal ends the run before its time."""
        return self.stopping.agreed and self.images_seen < self.config.train.images

    def _happened(self, kind: str, text: str) -> None:
        """Tells of an event in the run's life; see `Tracker.event`."""
        if self.tracker:
            self.tracker.event(self.images_seen, kind, text)

    def _advance(self, batch: Batch) -> None:
        """One step, and what is due after it: only a checkpoint, where the run has to stop."""
        config = self.config
        self.watch.mark(f"the step after {self.images_seen:,} images")
        self._step(batch)
        before, self.images_seen = self.images_seen, self.images_seen + config.train.batch
        self.terminal.advance(config.train.batch)
        if self._due(config.train.log_every * config.train.batch, before):
            self._log()
        if self._leaving():
            self._save()
            return
        evaluating, saving = (self._due(every, before) for every in (config.evaluate.every, config.checkpoint.every))
        if evaluating or saving or self._early(before):
            with self.ema.gathered() as model, self.accelerator.autocast():
                self._assess(model, evaluating, saving)
        if saving:
            self._save()
        self.watch.mark(f"the wait for the batch after {self.images_seen:,} images")

    def _due(self, every: int, before: int) -> bool:
        """Whether a multiple of `every` images, or the end, came with the last step."""
        return self.images_seen >= self.config.train.images or before // every < self.images_seen // every

    def _early(self, before: int) -> bool:
        """Whether the last step passed a power of two, up to the first evaluation: most is learned at the beginning."""
        wanted = self.config.evaluate.early and EARLIEST <= self.images_seen < self.config.evaluate.every
        return wanted and self.images_seen.bit_length() > before.bit_length()

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
        measured = self._gradients(batch.images, self._draws(batch), self.stage.arguments(self.images_seen))
        total = torch.cat([measured, self.stopping.said()])
        # Begun before the optimizer's step, during which it is under way.
        reduction = torch.distributed.all_reduce(total, async_op=True) if self.ranks > 1 else None
        lr = learning_rate(config.optimizer, self.images_seen, config.train.images)
        norm, taken = self.update.step(lr, self.pace.timed(sharding.wanted()))
        if reduction:
            reduction.wait()
        measured = total[:-1] / self.ranks
        self.stopping.heard(total[-1:])
        self.stage.stepped(measured, taken)
        self.ema.update(self.images_seen // config.train.batch + 1)
        self.meters.count(measured, norm, taken, self.images_seen)

    def _gradients(self, images: Tensor, draws: dict[str, Tensor], arguments: tuple[Tensor, ...]) -> Tensor:
        """Gradients of the loss of this process's images, taken in pieces; returns what was measured."""
        pieces = self.config.train.accumulation
        size = len(images) // pieces
        if self.config.train.compile == "cuda_graphs":
            torch.compiler.cudagraph_mark_step_begin()
        measured = torch.zeros(self.stage.measured, device=self.device)
        for piece in range(pieces):
            part = slice(piece * size, (piece + 1) * size)
            drawn = {name: numbers[part] for name, numbers in draws.items()}
            last = piece == pieces - 1
            # Gradients of all processes are averaged with the last piece only.
            with self._exchange(last):
                # Sharded weights are gathered within the forward pass, where fast processes wait for slow ones.
                with self.accelerator.autocast(), self.pace.timed(not sharding.wanted()):
                    loss, values = self.forward(images[part], drawn, *arguments)
                self.accelerator.backward(loss / pieces)
            measured += values / pieces
        return measured

    def _exchange(self, now: bool) -> contextlib.AbstractContextManager[None]:
        """Within it, whether a backward pass averages the gradients of all processes."""
        if sharding.wanted():
            self.objective.set_requires_gradient_sync(now)
        elif not now:
            return self.accelerator.no_sync(self.objective)
        return contextlib.nullcontext()

    def _draws(self, batch: Batch) -> dict[str, Tensor]:
        """This process's share of the global batch's random numbers, so that any number of processes draws the same.

        On GPUs: as long as all are of one model (see `vae_scale.randomness`).
        """
        share = self.config.train.batch // self.ranks
        mine = slice(self.rank * share, (self.rank + 1) * share)
        drawn = self.stage.draws(self.images_seen, self.config.train.batch)
        return self.stage.labelled({name: numbers[mine] for name, numbers in drawn.items()}, batch.rows)

    def _begin_interval(self) -> None:
        self.stream.wait_seconds = 0.0
        self.interval = (time.perf_counter(), self.images_seen)

    def _log(self) -> None:
        """Means over the steps since the last call. The only place where the loop waits for the device."""
        began, seen = self.interval
        found = self.meters.read()
        self._check_left_out(found)
        seconds = time.perf_counter() - began
        config, speed = self.config, (self.images_seen - seen) / seconds
        values: dict[str, float] = {}
        shown = "all steps left out"
        if found.taken:
            values, shown = self.stage.logged(found.means, self.images_seen)
            values["train/grad_norm"] = found.grad_norm
        values |= {
            "train/lr": learning_rate(config.optimizer, self.images_seen, config.train.images),
            "train/left_out": found.left_out,
            "train/epoch": self.images_seen / len(self.train_set),
            "speed/images_per_second": speed,
            "data/wait_share": self.stream.wait_seconds / seconds,
            "speed/memory_bytes": _memory(self.device),
        }
        self._name_straggler()
        self.terminal.status(f"{shown}, {speed:,.0f} images/s, waits {values['data/wait_share']:.1%}", speed)
        if self.tracker:
            self.tracker.log(self.images_seen, values)
        self._begin_interval()

    def _name_straggler(self) -> None:
        """Tells which process is slow by itself. What the others do meanwhile is to wait for it."""
        own = torch.tensor([self.stream.wait_seconds + self.pace.seconds()], device=self.device)
        if told := self.pace.straggler(self.accelerator.gather(own).tolist()):
            self._happened("straggler", told)

    def _check_left_out(self, found: Reading) -> None:
        """Tells of steps that were left out, and stops a run whose steps all are, telling where that began."""
        if found.left_out:
            told = f"{found.left_out} of {found.left_out + found.taken} steps left out"
            self._happened("left_out", f"{told}: gradients not finite, or longer than optimizer.skip")
        steps, first = found.row, found.first
        if steps < MOST_LEFT_OUT:
            return
        held = self.train_set.names(self.stream.plan.rows(first))
        listed = self.config.folder / "left_out.json"
        if self.accelerator.is_main_process:
            listed.write_text(json.dumps({"images_seen": first, "images": held}, indent=2))
        self.writer.wait()  # so that the newest checkpoint is there, and named
        saved = checkpoint.checkpoints(self.config.folder)
        raise UserError(
            f"{steps} steps in a row were left out, from step {first // self.config.train.batch + 1:,} "
            f"(image {first:,}) on: their gradients were not finite, or longer than optimizer.skip; lower optimizer.lr, or use "
            "train.precision fp32, and run again: training goes on from "
            f"{saved[-1] if saved else 'the start, as there is no checkpoint yet'}. The first of these batches held "
            f"{', '.join(held[:3])}, ... (all in {listed})"
        )

    def _assess(self, model: VAE, evaluating: bool, saving: bool) -> None:
        """What is due of the averaged model: figures on held-out images; the mixture, which a checkpoint needs; pictures."""
        share = self.config.train.batch // self.ranks // self.config.train.accumulation
        if evaluating:
            self._evaluate(model, share)
        if saving and self.stage.fits_mixture:
            self.watch.mark(f"the fit of the mixture after {self.images_seen:,} images")
            self.stage.fit_mixture(model, share, self.processes)
            self.fitted_at = self.images_seen
        self._draw(model, with_samples=saving or not evaluating or not self.stage.fits_mixture)
        self._begin_interval()

    def _evaluate(self, model: VAE, share: int) -> None:
        """Measures `model` on held-out images, `share` at a time and process."""
        self.watch.mark(f"the evaluation after {self.images_seen:,} images")
        found = self.stage.evaluate(model, self.test_set, share, self.processes)
        missing = self._missing()
        if self.tracker:
            self.tracker.log(self.images_seen, {f"eval/{name}": value for name, value in found.items()} | missing)
        told = ", ".join(f"{name} {value:,.3f}" for name, value in found.items() if isinstance(value, float))
        self.terminal.say(f"{self.images_seen:,} images: held-out {told}")

    def _missing(self) -> dict[str, float]:
        """How many images of bad shards all processes had replaced since they began, if such shards are skipped."""
        if self.train_set.missing is None:
            return {}
        images = int(self.processes.add_up(torch.tensor(self.train_set.missing.images, device=self.device)))
        if images:
            self._happened("missing_images", f"{images:,} images of bad shards were replaced by others since the run began")
        return {"data/missing_images": images}

    def _draw(self, model: VAE, with_samples: bool) -> None:
        """Pictures of reconstructions, and of samples, by rank 0. They are written while training goes on.

        Samples of a mixture that was fitted to older weights would mislead: there are none between two checkpoints.
        """
        if self.pictures:
            samples = self.config.evaluate.samples if with_samples else 0
            self.pictures.write(self.images_seen, gallery.progress(model, self.test_set, samples, self.config.seed))

    def _save(self) -> None:
        """Hands a checkpoint to the writer, once all processes are found to hold the same weights."""
        self.watch.mark(f"the checkpoint after {self.images_seen:,} images")
        seen: list[Tensor] = []
        tensors = {
            "model": self._fingerprinted(seen),
            "ema": self.ema.tensors(),
            "optimizer": self.update.tensors(trained(self.model)),
        }
        mixture = self.ema.model.mixture
        if mixture and (self.fitted_at == self.images_seen or not self.stage.fits_mixture):  # an older one would mislead
            tensors["mixture"] = iter(vars(mixture).items())
        if self.tracker:
            self.writer.stage(tensors)
        else:  # takes part in gathering
            for _, tensor in itertools.chain.from_iterable(tensors.values()):
                sharding.whole(tensor)
        fingerprints = self.accelerator.gather(combine(seen)[None])
        check_same(fingerprints, self.images_seen)
        if not self.tracker:
            return
        scaler = self.accelerator.scaler
        state = {
            "images_seen": self.images_seen,
            "processes": self.ranks,
            "weights": fingerprints.tolist(),
            "wandb_id": self.tracker.run_id,
            "scaler": scaler.state_dict() if scaler else None,
            "shards": self.train_set.fingerprint,
            "window": self.window,
            "sums": self.meters.state(),
            "config": as_dict(self.config),
            "versions": self.versions,
        }
        self.writer.write(self.images_seen, state, self.model.describe())

    def _fingerprinted(self, seen: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The model's tensors, whole; adds a fingerprint of each to `seen`."""
        for name, value in self.model.state_dict().items():
            tensor = sharding.whole(value)
            seen.append(fingerprint(tensor))
            yield name, tensor

    def _resume(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Goes on from the newest whole checkpoint, if there is one; returns its state and the optimizer's."""
        found = checkpoint.newest(self.config.folder) if self.accelerator.is_main_process else None
        # Rank 0 decides, so that all go on from the same one.
        images = torch.tensor(-1 if found is None else checkpoint.images_of(found), device=self.device)
        images_seen = int(broadcast(images))
        if images_seen < 0:
            return {}, {}
        folder = checkpoint.folder_of(self.config.folder, images_seen)
        state, tensors = checkpoint.load(folder, "model", "ema", "optimizer")
        if self.config.train.batch_size == "auto":
            self.config.train.batch_size = state["config"]["train"]["batch_size"]
            check_processes(self.config, self.ranks)
        changed = changes(state["config"], as_dict(self.config), folder)
        if state["shards"] != self.train_set.fingerprint:
            raise UserError(f"{folder}: was trained on other shards than {self.train_set.location}; choose another --run")
        if unlike := checkpoint.unlike(trained(self.model), tensors["optimizer"]):
            raise UserError(f"{folder}: optimizer.safetensors has no {unlike} of this network; delete it to use the one before")
        try:
            self.model.load_state_dict(tensors["model"])
            self.ema.model.load_state_dict(tensors["ema"])
        except RuntimeError as error:
            raise UserError(
                f"{folder}: not of this network ({one_line(error):.200}); delete it to use the one before"
            ) from None
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.images_seen, self.window = images_seen, state.get("window", self.window)
        self.meters.load(state.get("sums", self.meters.state()))
        self.terminal.say(f"resuming {self.config.folder} at {self.images_seen:,} images")
        if changed:
            self.terminal.say(f"resuming with {', '.join(changed)}")
        return state, tensors["optimizer"]

    def _compiled(self, objective: Any) -> Any:
        """The objective as `train.compile` wants it."""
        wanted, on_gpu = self.config.train.compile, self.device.type == "cuda"
        if wanted == "cuda_graphs" and (not on_gpu or sharding.wanted()):
            raise UserError("train.compile cuda_graphs needs a GPU, and weights that are not sharded; use train.compile on")
        if wanted == "off" or (wanted == "auto" and not on_gpu):
            return objective
        return compiling.compiled(objective, cuda_graphs=wanted == "cuda_graphs")

    def _track(self) -> Tracker:
        """Opens the run's books."""
        config, parameters = self.config, sum(part.numel() for part in self.model.parameters())
        self.versions = versions()
        about = {"versions": self.versions, "parameters": parameters, "shards": self.train_set.fingerprint}
        tracker = Tracker(config, self.images_seen, self.state.get("wandb_id"), about, self.terminal)
        precision, device = resolve_precision(config.train.precision), self.device.type
        kind = "resumed" if self.images_seen else "started"
        told = f"{parameters:,} parameters, {self.ranks} x {device}, {precision}, batches of {config.train.batch:,}"
        tracker.event(self.images_seen, kind, f"{kind}: {told}")
        return tracker

    def _progress(self) -> contextlib.AbstractContextManager[None]:
        """Within it the progress bar is drawn."""
        return self.terminal.progress(str(self.config.folder), self.config.train.images, self.images_seen)


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(psutil.Process().memory_info().rss)


def train(config: Config) -> None:
    """Trains as configured, in the run's folder; goes on where an earlier call stopped."""
    Trainer(config).run()
