"""The training loop."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Generator, Mapping
from functools import partial

import psutil
import torch
from torch import Tensor

from vae_scale.config.options import Config, to_dict, to_yaml
from vae_scale.config.parsing import check_batch_size
from vae_scale.data.stream import Batch, default_window
from vae_scale.errors import one_line
from vae_scale.evaluation import gallery
from vae_scale.evaluation.latents import fit_prior
from vae_scale.runtime import compiling, launching, sharding
from vae_scale.runtime.checkpoint import CheckpointWriter
from vae_scale.runtime.distributed import DistContext
from vae_scale.runtime.run_lock import acquire_run_lock
from vae_scale.runtime.signals import SignalHandler
from vae_scale.runtime.step_timer import StepTimer
from vae_scale.runtime.versions import get_versions
from vae_scale.runtime.watchdog import HangWatchdog
from vae_scale.tracking.terminal import Terminal
from vae_scale.tracking.tracker import Tracker
from vae_scale.training import checkpointing
from vae_scale.training.divergence import SKIP_REASON, divergence_error
from vae_scale.training.ema import EMA
from vae_scale.training.metrics import CONSECUTIVE_SKIPS, STEPS_SKIPPED, STEPS_TAKEN, AsyncAllReduce, MetricAccumulator
from vae_scale.training.objectives import Tensors
from vae_scale.training.optimizer_step import OptimizerStep, learning_rate
from vae_scale.training.setup import (
    build_stream,
    compile_objective,
    create_tracker,
    largest_batch_size,
    open_datasets,
    wrap_objective,
)
from vae_scale.training.stages import build_stage, trainable_parameters

FIRST_PREVIEW = 256  # images before the first image grids
REQUEUE_FILE = "requeue.json"  # in the run's folder: the job was preempted and should be restarted
MAX_SKIPPED_STEPS = 30  # in a row; the initial search for the loss scale of fp16 skips fewer


class Trainer:
    """Trains one stage. Training is deterministic, and all schedules depend on the number of images seen.

    Attributes:
        images_seen: Images seen so far by all processes together.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.accelerator = launching.create_accelerator(config.train)
        self.device = launching.get_device(self.accelerator)
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main_process: bool = self.accelerator.is_main_process
        self.terminal = Terminal(config.log, self.is_main_process)
        self.signal_handler, self.step_timer = SignalHandler(self.device), StepTimer(self.device)
        self.watchdog = HangWatchdog(self.rank, self.world_size, config.train.timeout, partial(self._log_event, "failed"))
        self.dist = dataclasses.replace(DistContext.from_accelerator(self.accelerator), heartbeat=self.watchdog.heartbeat)
        if config.train.batch_size != "auto":
            check_batch_size(config, self.world_size)
        self.train_set, self.test_set = open_datasets(config, self.terminal)
        self.stage = build_stage(config, self.device, self.train_set, self.dist)
        self.model = self.stage.model
        self.ema = EMA(self.model, config.train.ema_decay)
        lock = acquire_run_lock(config.run_dir, self.is_main_process, self.device)
        if self.is_main_process:
            (config.run_dir / REQUEUE_FILE).unlink(missing_ok=True)
        state, optimizer = checkpointing.resume(config, self.accelerator, self.model, self.ema, self.train_set, self.terminal)
        self.images_seen, self.mixture_fitted_at = state["images_seen"], -1
        if not self._is_finished():
            self.stage.on_train_start()
        if config.train.batch_size == "auto":
            config.train.batch_size = largest_batch_size(config, self.stage, self.train_set, self.accelerator, self.dist)
            self.terminal.print_message(f"train.batch_size auto: {config.train.batch_size:,} images")
        self.batch_size = config.train.global_batch_size

        self.objective = wrap_objective(self.stage.objective, config, self.accelerator, self.device)
        self.forward = compile_objective(self.objective, config, self.device)
        parameters = [parameter for _, parameter in trainable_parameters(self.model)]
        self.optimizer_step = OptimizerStep(parameters, config.optimizer, self.accelerator.scaler)
        if optimizer:
            self.optimizer_step.load(trainable_parameters(self.model), optimizer)
        self.ema.attach(self.model)
        self.metrics = MetricAccumulator(self.device, state["metric_sums"])
        self.shuffle_window = state["shuffle_window"] or config.data.shuffle_window or default_window(self.train_set)
        self.stream = build_stream(config, self.train_set, self.dist, self.device, self.images_seen, self.shuffle_window)
        self.versions = get_versions()
        self.tracker: Tracker | None = None
        on_saved = None
        if self.is_main_process:
            (config.run_dir / "config.yaml").write_text(to_yaml(config))
            metadata = {"versions": self.versions, "shards": self.train_set.fingerprint, "world_size": self.world_size}
            self.tracker = create_tracker(config, self.stage, self.images_seen, state["wandb_id"], metadata, self.terminal)
            on_saved = self.tracker.logger.log_checkpoint
        keep, keep_every = config.checkpoint.keep, config.checkpoint.keep_every
        on_failed = partial(self._log_event, "checkpoint_failed")
        self.writer = CheckpointWriter(config.run_dir, keep, keep_every, on_failed, on_saved)
        self.lock = lock  # only now, so that it is released if something above fails
        self.start_interval()

    def run(self) -> None:
        """Trains until `train.images` images have been seen or a signal stops the run."""
        if self._is_finished():
            message = f"{self.config.run_dir} has already seen {self.images_seen:,} images; raise train.images to continue"
            self.terminal.print_message(message)
        try:
            with (
                self.signal_handler,
                self.progress_bar(),
                compiling.report_compilation(self.terminal.set_status, self.watchdog.set_compiling),
            ):
                with self.watchdog:
                    for batch in self.batches():
                        self.train_iteration(batch)
                        if self._should_stop():
                            break
                self.writer.wait()
        except Exception as error:
            self._log_event("failed", one_line(error))
            if self.tracker:
                self.tracker.logger.close(failed=True)
            raise
        if self._should_stop():
            if self.signal_handler.preempted and self.is_main_process:
                (self.config.run_dir / REQUEUE_FILE).write_text(json.dumps({"images_seen": self.images_seen}) + "\n")
            self._log_event("stopped", "stopped by a signal after saving a checkpoint; run the same command again to continue")
        else:
            self._log_event("finished", "finished")
        if self.tracker:
            self.tracker.logger.close()
        self.accelerator.end_training()
        self.lock.release()

    def batches(self) -> Generator[Batch, None, None]:
        """Yields this process's part of each remaining global batch."""
        if not self._is_finished():
            for batch in self.stream:
                yield batch
                if self._is_finished():
                    return

    def train_iteration(self, batch: Batch) -> None:
        """Takes a training step, then logs, evaluates and saves a checkpoint if due. If the run should stop, only saves."""
        self.watchdog.heartbeat(f"the step after {self.images_seen:,} images")
        self.train_step(batch)
        self.terminal.update(self.batch_size)
        if self.stage.is_guide_due(self.images_seen) and self.ema.model.guide is None:
            self.keep_guide()
        if self._is_due(self.config.train.log_every * self.batch_size):
            self.log()
        if self._should_stop():
            self.save_checkpoint()
            return
        is_evaluation_due = self._is_due(self.config.evaluate.every)
        is_checkpoint_due = self._is_due(self.config.checkpoint.every)
        if is_evaluation_due or is_checkpoint_due or self._is_preview_due():
            self.evaluate(is_evaluation_due, is_checkpoint_due)
        if is_checkpoint_due:
            self.save_checkpoint()
        self.watchdog.heartbeat(f"the wait for the batch after {self.images_seen:,} images")

    def train_step(self, batch: Batch) -> None:
        """Takes one optimizer step on a global batch. `batch` is this process's part of it."""
        metrics = self.compute_gradients(batch.images, self.random_inputs(batch))
        # Overlaps with the optimizer step.
        reduction = AsyncAllReduce(metrics | {"stop": self.signal_handler.local_flag()}, self.world_size)
        lr = learning_rate(self.config.optimizer, self.images_seen, self.config.train.images)
        grad_norm, is_taken = self.optimizer_step.step(lr, self.step_timer.record(sharding.fsdp_enabled()))
        metrics = reduction.wait()
        self.signal_handler.update(metrics.pop("stop"))
        self.stage.on_step_end(metrics, is_taken)
        self.ema.update(self.images_seen // self.batch_size + 1)
        self.metrics.update(metrics | {"grad_norm": grad_norm}, is_taken)
        self.images_seen += self.batch_size

    def compute_gradients(self, images: Tensor, random_inputs: Tensors) -> Tensors:
        """Accumulates gradients over microbatches and averages them over processes.

        Returns:
            The metrics of this process; their sums over processes are the means over the global batch.
        """
        num_microbatches = self.config.train.gradient_accumulation_steps
        size = len(images) // num_microbatches
        if self.config.train.compile == "cuda_graphs":
            torch.compiler.cudagraph_mark_step_begin()
        sums: tuple[Tensor, ...] = ()
        for index in range(num_microbatches):
            part = slice(index * size, (index + 1) * size)
            inputs = {name: values[part] for name, values in random_inputs.items()}
            with self._grad_sync(index == num_microbatches - 1):
                # FSDP gathers weights in the forward pass, whose time then includes waiting for other processes.
                with self.accelerator.autocast(), self.step_timer.record(not sharding.fsdp_enabled()):
                    loss, metrics = self.forward(images[part], inputs)
                self.accelerator.backward(loss / num_microbatches)
            values = torch._foreach_div(list(metrics.values()), num_microbatches * self.world_size)
            sums = torch._foreach_add(sums, values) if sums else tuple(values)
        return dict(zip(metrics, sums, strict=True))

    def random_inputs(self, batch: Batch) -> Tensors:
        """Returns this process's part of the random inputs of the global batch, which do not depend on the world size.

        On GPUs, all GPUs must be of the same model (see `vae_scale.randomness`).
        """
        local_batch_size = self.batch_size // self.world_size
        part = slice(self.rank * local_batch_size, (self.rank + 1) * local_batch_size)
        random_inputs = self.stage.random_inputs(self.images_seen, self.batch_size)
        return self.stage.add_row_inputs({name: values[part] for name, values in random_inputs.items()}, batch.rows)

    def log(self) -> None:
        """Logs means over the steps since the last call. Other steps do not synchronize with the device."""
        start, images_before = self._interval_start
        stats = self.metrics.compute()
        taken, skipped, consecutive = (int(stats[name]) for name in (STEPS_TAKEN, STEPS_SKIPPED, CONSECUTIVE_SKIPS))
        if skipped:
            self._log_event("skipped_steps", f"{skipped} of {skipped + taken} steps skipped: {SKIP_REASON}")
        if consecutive >= MAX_SKIPPED_STEPS:
            self.writer.wait()  # so that the newest checkpoint is complete
            raise divergence_error(self.images_seen, consecutive, self.stream, self.config.run_dir, self.is_main_process)
        seconds = time.perf_counter() - start
        images_per_second = (self.images_seen - images_before) / seconds
        loading_fraction = self.stream.wait_seconds / seconds
        metrics: dict[str, float] = {}
        status = "all steps skipped"
        if taken:
            metrics, status = self.stage.format_metrics(stats, self.images_seen)
            metrics["train/grad_norm"] = stats["grad_norm"]
        metrics |= {
            "train/lr": learning_rate(self.config.optimizer, self.images_seen, self.config.train.images),
            "train/skipped_steps": skipped,
            "train/epoch": self.images_seen / len(self.train_set),
            "perf/images_per_second": images_per_second,
            "perf/data_loading_fraction": loading_fraction,
            "perf/memory_bytes": _memory_bytes(self.device),
        }
        local_seconds = torch.tensor([self.stream.wait_seconds + self.step_timer.pop_seconds()], device=self.device)
        if message := self.step_timer.detect_straggler(self.accelerator.gather(local_seconds).tolist()):
            self._log_event("straggler", message)
        status = f"{status}, {images_per_second:,.0f} images/s, loading {loading_fraction:.1%}"
        self.terminal.set_status(status, images_per_second)
        if self.tracker:
            self.tracker.log_metrics(self.images_seen, metrics)
        self.start_interval()

    def start_interval(self) -> None:
        """Starts the interval over which `log` measures speed."""
        self.stream.wait_seconds = 0.0
        self._interval_start = (time.perf_counter(), self.images_seen)

    def evaluate(self, with_metrics: bool, with_mixture: bool) -> None:
        """Draws image grids of the averaged model, optionally after computing held-out metrics and fitting the mixture."""
        batch = self.batch_size // self.world_size // self.config.train.gradient_accumulation_steps
        with self.ema.gathered() as model, self.accelerator.autocast():
            if with_metrics:
                self.watchdog.heartbeat(f"the evaluation after {self.images_seen:,} images")
                self._log_evaluation(self.stage.evaluate(model, self.test_set, batch, self.dist))
            if with_mixture and self.stage.fits_mixture:
                self.watchdog.heartbeat(f"the fit of the mixture after {self.images_seen:,} images")
                num_images, seed = self.config.evaluate.prior_fit_images, self.config.seed
                model.mixture = fit_prior(model, self.train_set, num_images, batch, seed, self.dist)
                self.mixture_fitted_at = self.images_seen
            if self.tracker:
                # Evaluations between two checkpoints draw no samples: the mixture is outdated.
                with_samples = with_mixture or not with_metrics or not self.stage.fits_mixture
                samples = self.config.evaluate.samples if with_samples else 0
                grids = gallery.make_training_grids(model, self.test_set, samples, self.config.seed)
                self.tracker.log_images(self.images_seen, grids)
        self.start_interval()

    def _log_evaluation(self, results: Mapping[str, float | list[float]]) -> None:
        metrics: dict[str, float | list[float]] = {f"eval/{name}": value for name, value in results.items()}
        if self.train_set.bad_shards is not None:
            local_images = torch.tensor(self.train_set.bad_shards.replaced_images, device=self.device)
            metrics["data/replaced_images"] = replaced = int(self.dist.all_reduce_sum(local_images))
            if replaced:
                self._log_event("replaced_images", f"{replaced:,} images of bad shards were replaced since the run started")
        if self.tracker:
            self.tracker.log_metrics(self.images_seen, metrics)
        text = ", ".join(f"{name} {value:,.3f}" for name, value in results.items() if isinstance(value, float))
        self.terminal.print_message(f"{self.images_seen:,} images: held-out {text}")

    def keep_guide(self) -> None:
        """Keeps the averaged weights of the flow prior as the guide of its later samples."""
        with self.ema.gathered() as model:
            assert model.flow is not None
            model.guide = {name: value.clone() for name, value in model.flow.state_dict().items()}

    def save_checkpoint(self) -> None:
        """Writes a checkpoint in the background. All processes must call it."""
        self.watchdog.heartbeat(f"the checkpoint after {self.images_seen:,} images")
        parameters = trainable_parameters(self.model)
        tensors = {"ema": self.ema.tensors(), "optimizer": self.optimizer_step.tensors(parameters)}
        mixture = self.ema.model.mixture
        if mixture and (self.mixture_fitted_at == self.images_seen or not self.stage.fits_mixture):
            tensors["mixture"] = iter(vars(mixture).items())
        if guide := self.ema.model.guide:
            tensors["guide"] = iter(guide.items())
        scaler = self.accelerator.scaler
        state = {
            "images_seen": self.images_seen,
            "processes": self.world_size,
            "wandb_id": self.tracker.logger.run_id if self.tracker else None,
            "scaler": scaler.state_dict() if scaler else None,
            "shards": self.train_set.fingerprint,
            "shuffle_window": self.shuffle_window,
            "metric_sums": self.metrics.state_dict(),
            "config": to_dict(self.config),
            "versions": self.versions,
        }
        checkpointing.save(self.writer, self.images_seen, self.model, tensors, state, self.accelerator)

    def progress_bar(self) -> contextlib.AbstractContextManager[None]:
        """Shows a progress bar within the context."""
        return self.terminal.progress_bar(str(self.config.run_dir), self.config.train.images, self.images_seen)

    def _grad_sync(self, enabled: bool) -> contextlib.AbstractContextManager[None]:
        """Selects whether backward passes within the context average gradients over processes."""
        if sharding.fsdp_enabled():
            self.objective.set_requires_gradient_sync(enabled)
        elif not enabled:
            return self.accelerator.no_sync(self.objective)
        return contextlib.nullcontext()

    def _is_finished(self) -> bool:
        return self.images_seen >= self.config.train.images

    def _should_stop(self) -> bool:
        """Whether a signal stops the run before its end."""
        return self.signal_handler.should_stop and not self._is_finished()

    def _is_due(self, interval: int) -> bool:
        """Whether the last step passed a multiple of `interval` images, or the end."""
        return self._is_finished() or (self.images_seen - self.batch_size) // interval < self.images_seen // interval

    def _is_preview_due(self) -> bool:
        """Whether the last step passed a power of two before the first evaluation."""
        is_early = self.config.evaluate.early and FIRST_PREVIEW <= self.images_seen < self.config.evaluate.every
        return is_early and self.images_seen.bit_length() > (self.images_seen - self.batch_size).bit_length()

    def _log_event(self, kind: str, text: str) -> None:
        if self.tracker:
            self.tracker.log_event(self.images_seen, kind, text)


def _memory_bytes(device: torch.device) -> float:
    return float(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss)


def train(config: Config) -> None:
    """Trains in the run's folder, and resumes from its newest checkpoint if there is one."""
    Trainer(config).run()
