"""Throughput of training: the training step, the trainer, and the step's FLOPs."""

import contextlib
import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from vae_scale.benchmark.measuring import Report, alternate, peak_flops, time_call
from vae_scale.config.options import Config
from vae_scale.data.stream import Batch
from vae_scale.errors import UserError
from vae_scale.runtime.launching import resolve_precision
from vae_scale.training.trainer import Trainer

SECONDS = 3.0  # duration of a run
MIN_STEPS = 4  # per run
PROFILED_STEPS = 3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NEVER = 10**9  # images

STEP, TRAIN = "training step", "trainer"


def measure(config: Config, with_trainer: bool, repeats: int, trace_dir: Path | None = None) -> Report:
    """Measures training with a configuration. Each run logs at least once.

    The ratios are `mfu`, model FLOPs utilization of the step relative to the fastest matrix product; and with the trainer,
    `train_over_step` and `data_wait`, the fraction of the trainer's time spent waiting for data.

    Args:
        config: Configuration of the run.
        with_trainer: Measure the trainer in addition to the step.
        repeats: Number of runs of each task. The median is used.
        trace_dir: Folder for a profiler trace of a few steps; None for no trace.

    Raises:
        UserError: if the shards cannot be read or trained on, or there are several processes.
    """
    with open_trainer(config) as measured:
        trainer, command = measured.trainer, "train" if with_trainer else "step"
        if trainer.world_size > 1:
            raise UserError(f"bench {command} supports one process only; run it without accelerate launch")
        measured.choose_steps(SECONDS)
        tasks = {STEP: measured.step} | ({TRAIN: measured.train} if with_trainer else {})
        speeds = alternate(tasks, repeats)
        memory = torch.cuda.max_memory_allocated()  # before matrices are allocated to measure their products; 0 on a CPU
        peak = peak_flops(trainer.device, DTYPES.get(trainer.accelerator.mixed_precision, torch.float32))
        flops = count_flops(measured.loss_of_one_image)
        step = statistics.median(speeds[STEP])
        ratios = {"mfu": step * flops / peak}
        if with_trainer:
            ratios["train_over_step"] = statistics.median(speeds[TRAIN]) / step
            ratios["data_wait"] = measured.data_seconds / measured.train_seconds
        if trace_dir:
            trace_dir.mkdir(parents=True, exist_ok=True)
            measured.steps = PROFILED_STEPS
            with profile() as profiler:
                tasks[TRAIN if with_trainer else STEP]()
            profiler.export_chrome_trace(str(trace_dir / f"{command}.json"))
        details: dict[str, str | float] = {
            "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
            "batch": trainer.batch_size,
            "precision": resolve_precision(config.train.precision),
            "gflop_per_image": flops / 1e9,
            "matrix_product_tflops": peak / 1e12,
            "peak_gpu_memory_gib": memory / 2**30,
        }
    return Report(details, speeds, ratios)


@contextlib.contextmanager
def open_trainer(config: Config) -> Iterator["MeasuredTrainer"]:
    """Opens a trainer without evaluation, checkpoints and wandb, in a temporary run folder."""
    config = copy.deepcopy(config)
    config.evaluate.every = config.checkpoint.every = NEVER
    config.evaluate.early, config.track.tracker = False, "none"
    with tempfile.TemporaryDirectory() as folder:
        config.run = folder
        trainer = Trainer(config)
        config.train.images = NEVER  # only now, because preparations depend on it
        with trainer.progress_bar(), contextlib.closing(trainer.batches()) as batches:
            yield MeasuredTrainer(trainer, batches)


class MeasuredTrainer:
    """A trainer that is measured in runs of `steps` steps.

    Attributes:
        data_seconds: Total time for which the trainer waited for data, in seconds.
        train_seconds: Total duration of the trainer's runs, in seconds.
    """

    def __init__(self, trainer: Trainer, batches: Iterator[Batch]) -> None:
        self.trainer, self.steps = trainer, MIN_STEPS
        self.data_seconds = self.train_seconds = 0.0
        self._batches = batches
        batch = next(batches)
        self._images = batch.images.clone()  # the stream reuses its buffers
        self._random_inputs = trainer.random_inputs(batch)

    def choose_steps(self, seconds: float) -> None:
        """Warms up, and sets the number of steps so that runs take about `seconds` and log at least once."""
        self.step()
        num_images = max(self.step() for _ in range(3)) * seconds
        self.steps = max(MIN_STEPS, math.ceil(num_images / self.trainer.batch_size))
        self.trainer.config.train.log_every = min(self.trainer.config.train.log_every, self.steps)

    def step(self) -> float:
        """Returns images per second of forward, backward and AdamW on one batch, unclipped, with a learning rate of 0."""
        trainer, adamw = self.trainer, self.trainer.optimizer_step.adamw
        scaler = trainer.accelerator.scaler or torch.amp.GradScaler(enabled=False)  # in fp16, unscales the gradients
        for group in adamw.param_groups:
            group["lr"] = 0.0

        def take_steps() -> None:
            for _ in range(self.steps):
                trainer.compute_gradients(self._images, self._random_inputs)
                scaler.step(adamw)
                scaler.update()
                adamw.zero_grad(set_to_none=True)

        return self.steps * trainer.batch_size / time_call(take_steps, trainer.device)

    def train(self) -> float:
        """Returns images per second of the trainer."""
        self.trainer.start_interval()

        def iterate() -> None:
            self.data_seconds += sum(self.advance() for _ in range(self.steps))

        seconds = time_call(iterate, self.trainer.device)
        self.train_seconds += seconds
        return self.steps * self.trainer.batch_size / seconds

    def advance(self) -> float:
        """Runs one iteration of the trainer and returns the seconds it waited for data."""
        begin = time.perf_counter()
        batch = next(self._batches)
        seconds = time.perf_counter() - begin
        self.trainer.train_iteration(batch)
        return seconds

    def loss_of_one_image(self) -> Tensor:
        """Computes the loss eagerly, because operations of compiled code cannot be counted."""
        random_inputs = {name: values[:1] for name, values in self._random_inputs.items()}
        return self.trainer.objective(self._images[:1], random_inputs)[0]


def count_flops(loss: Callable[[], Tensor]) -> int:
    """Returns the FLOPs of the matrix products and convolutions of a loss and its gradients."""
    # Some versions of torch do not count all fused attention kernels; all count matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()
