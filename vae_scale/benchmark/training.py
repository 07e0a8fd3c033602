"""Throughput of training: the limits of the device, the training step, the trainer, and the duration of each part of a step."""

import contextlib
import dataclasses
import math
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from vae_scale.benchmark.measuring import MATRIX, Row, alternate, ceilings, fastest, synchronize
from vae_scale.config.options import Config
from vae_scale.errors import UserError
from vae_scale.runtime.launching import resolve_precision
from vae_scale.training.trainer import Trainer

SECONDS = 3.0  # duration of a run
MIN_STEPS = 4  # per run
PROFILED_STEPS = 3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NEVER = 10**9  # images

MoreTasks = Callable[[Trainer, Path], dict[str, Callable[[], float]]]

STEP, TRAIN, SAVING = "training step", "trainer", "trainer with a checkpoint per run"


@dataclass
class Part:
    """The duration of a part of a training step, with device synchronization before and after.

    Attributes:
        name: The part.
        ms_each: Milliseconds per call.
        ms_per_step: Milliseconds per step, averaged over the configured interval of logging and checkpoints.
    """

    name: str
    ms_each: float
    ms_per_step: float


@dataclass
class Report:
    """Throughput of training.

    Attributes:
        rows: Limits, in FLOP per second and in bytes read and written per second; step and trainer, in images per second.
        ratios: `mfu`, model FLOPs utilization of the step relative to the fastest matrix product; `train_over_step`;
            `data_wait`, the fraction of the trainer's time spent waiting for data.
        parts: Parts of the trainer's steps.
        flops_per_image: FLOPs of the forward and backward pass.
        parameters: Parameters of the model.
        batch: Images per step.
        precision: bf16, fp16, tf32 or fp32.
        steps: Steps per run.
        peak_memory_bytes: Peak memory of the GPU, or of this process on a CPU.
    """

    rows: list[Row]
    ratios: dict[str, float]
    parts: list[Part]
    flops_per_image: int
    parameters: int
    batch: int
    precision: str
    steps: int
    peak_memory_bytes: int


def measure(
    config: Config, with_trainer: bool, repeats: int, trace_dir: Path | None = None, more_tasks: MoreTasks | None = None
) -> Report:
    """Measures training with a configuration, in a temporary run folder.

    The cost of a checkpoint is measured in runs that save one, and divided over the configured interval. Each run logs at least
    once. Evaluation and wandb are disabled.

    Args:
        config: Configuration of the run.
        with_trainer: Measure the trainer in addition to the step.
        repeats: Number of runs of each task. The median is used.
        trace_dir: Folder for a profiler trace of a few steps; None for no trace.
        more_tasks: Returns additional tasks, given the trainer and a temporary folder.

    Raises:
        UserError: if the shards cannot be read or trained on, or there are several processes.
    """
    with open_trainer(config) as measured:
        if measured.trainer.world_size > 1:
            raise UserError(
                f"bench {'train' if with_trainer else 'step'} supports one process only; run it without accelerate launch"
            )
        return _measure(measured, config, with_trainer, repeats, trace_dir, more_tasks)


@contextlib.contextmanager
def open_trainer(config: Config) -> Iterator["MeasuredTrainer"]:
    """Opens a trainer without evaluation and wandb, in a temporary run folder."""
    with tempfile.TemporaryDirectory() as folder:
        train = dataclasses.replace(config.train, images=NEVER)
        evaluate = dataclasses.replace(config.evaluate, every=NEVER, early=False)
        checkpoint = dataclasses.replace(config.checkpoint)  # a copy, since `train` changes the interval
        track = dataclasses.replace(config.track, tracker="none")
        trainer = Trainer(
            dataclasses.replace(config, run=folder, train=train, evaluate=evaluate, checkpoint=checkpoint, track=track)
        )
        with MeasuredTrainer(trainer) as measured:
            yield measured


def _measure(
    measured: "MeasuredTrainer",
    config: Config,
    with_trainer: bool,
    repeats: int,
    trace_dir: Path | None,
    more_tasks: MoreTasks | None,
) -> Report:
    trainer, batch = measured.trainer, config.train.global_batch_size
    measured.choose_steps(SECONDS)
    tasks: dict[str, Callable[[], float]] = {STEP: measured.step}
    if with_trainer:
        trainer.config.train.log_every = min(config.train.log_every, measured.steps)
        tasks |= {TRAIN: measured.train, SAVING: partial(measured.train, saving=True)}
        measured.train(saving=True)
    memory = _peak_memory(trainer.device)  # before the limits are measured, which allocates memory
    dtype = DTYPES.get(trainer.accelerator.mixed_precision, torch.float32)
    with tempfile.TemporaryDirectory() as scratch:
        tasks = ceilings(trainer.device, dtype) | tasks | (more_tasks(trainer, Path(scratch)) if more_tasks else {})
        rows = alternate(tasks, repeats, "measuring")
    flops = count_flops(measured.one_image)
    trainer.optimizer_step.adamw.zero_grad(set_to_none=True)
    ratios = {"mfu": rows[STEP].median * flops / rows[MATRIX].median}
    parts: list[Part] = []
    if with_trainer:
        per_image, saving = 1 / rows[TRAIN].median, 1 / rows[SAVING].median  # seconds
        per_image += max(0.0, saving - per_image) * measured.steps * batch / config.checkpoint.every
        ratios |= {
            "train_over_step": 1 / per_image / rows[STEP].median,
            "data_wait": measured.data_seconds / measured.train_seconds,
        }
        parts = _breakdown(measured, config)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    precision = resolve_precision(config.train.precision)
    report = Report(list(rows.values()), ratios, parts, flops, parameters, batch, precision, measured.steps, memory)
    if trace_dir:
        measured.steps = PROFILED_STEPS
        _trace(measured.train if with_trainer else measured.step, trace_dir / ("train.json" if with_trainer else "step.json"))
    return report


class MeasuredTrainer:
    """A trainer that is measured in runs of `steps` steps.

    Attributes:
        data_seconds: Total time for which the trainer waited for data, in seconds.
        train_seconds: Total duration of the trainer's runs, in seconds.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.steps = 1
        self.data_seconds = self.train_seconds = 0.0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "MeasuredTrainer":
        trainer = self.trainer
        if trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._stack.enter_context(trainer.progress_bar())
        if trainer.tracker:
            self._stack.callback(trainer.tracker.close)
        self._stack.callback(trainer.writer.wait)
        self._batches = self._stack.enter_context(contextlib.closing(trainer.batches()))
        batch = next(self._batches)
        self.images = batch.images.clone()  # the stream reuses its buffers
        self.random_inputs, self.schedule_values = trainer.random_inputs(batch), trainer.stage.schedule_values(0)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def choose_steps(self, seconds: float) -> None:
        """Warms up, and sets the number of steps so that runs take about `seconds`."""
        self.step()
        self.steps = MIN_STEPS
        num_images = max(self.step() for _ in range(3)) * seconds
        self.steps = max(MIN_STEPS, math.ceil(num_images / self.trainer.config.train.global_batch_size))

    def step(self) -> float:
        """Returns images per second of forward, backward and optimizer on one batch, with a learning rate of 0."""
        trainer = self.trainer
        for group in trainer.optimizer_step.adamw.param_groups:
            group["lr"] = 0.0
        with self._timed() as seconds:
            for _ in range(self.steps):
                trainer.compute_gradients(self.images, self.random_inputs, self.schedule_values)
                self._step_optimizer()
        return self.steps * trainer.config.train.global_batch_size / seconds()

    def _step_optimizer(self) -> None:
        """Takes an AdamW step without clipping. In fp16, the scaler unscales the gradients."""
        adamw, scaler = self.trainer.optimizer_step.adamw, self.trainer.accelerator.scaler
        if scaler:
            scaler.step(adamw)
            scaler.update()
        else:
            adamw.step()
        adamw.zero_grad(set_to_none=True)

    def train(self, saving: bool = False) -> float:
        """Returns images per second of the trainer. If `saving`, a checkpoint is written halfway, and its time is included."""
        trainer, size = self.trainer, self.trainer.config.train.global_batch_size
        trainer.config.checkpoint.every = trainer.images_seen + math.ceil(self.steps / 2) * size if saving else NEVER
        trainer.start_interval()
        with self._timed() as seconds:
            self.data_seconds += sum(self.advance() for _ in range(self.steps))
            trainer.writer.wait()
        self.train_seconds += seconds()
        return self.steps * size / seconds()

    def advance(self) -> float:
        """Runs one iteration of the trainer and returns the seconds it waited for data."""
        begin = time.perf_counter()
        batch = next(self._batches)
        seconds = time.perf_counter() - begin
        self.trainer.train_iteration(batch)
        return seconds

    @contextlib.contextmanager
    def _timed(self) -> Iterator[Callable[[], float]]:
        """Yields a function that returns the duration of the block, including queued work, after the block has ended."""
        synchronize(self.trainer.device)
        begin = end = time.perf_counter()
        yield lambda: end - begin
        synchronize(self.trainer.device)
        end = time.perf_counter()

    def one_image(self) -> Tensor:
        """Returns the loss of one image, computed eagerly, because operations of compiled code cannot be counted."""
        random_inputs = {name: values[:1] for name, values in self.random_inputs.items()}
        return self.trainer.objective(self.images[:1], random_inputs, *self.schedule_values)[0]


def count_flops(loss: Callable[[], Tensor]) -> int:
    """Returns the FLOPs of the matrix products and convolutions of a loss and its gradients."""
    # Some versions of torch do not count all fused attention kernels; all count matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


def _breakdown(measured: MeasuredTrainer, config: Config) -> list[Part]:
    """Measures each part of a step in a separate run, because synchronization around each part makes it slower."""
    trainer = measured.trainer
    methods: dict[str, tuple[Any, str]] = {
        "draws": (trainer, "random_inputs"),
        "forward": (trainer, "forward"),
        "backward": (trainer.accelerator, "backward"),
        "clip and optimizer": (trainer.optimizer_step, "step"),
        "EMA": (trainer.ema, "update"),
        "logging": (trainer, "log"),
        "checkpoint stall": (trainer, "save_checkpoint"),
    }
    call_seconds: dict[str, list[float]] = defaultdict(list)
    measured.data_seconds = measured.train_seconds = 0.0
    with contextlib.ExitStack() as stack:
        for name, (owner, method) in methods.items():
            stack.enter_context(_timed_calls(owner, method, call_seconds[name], trainer.device))
        measured.train()
        total = sum(map(sum, call_seconds.values()))
        trainer.save_checkpoint()
    intervals = {
        "logging": config.train.log_every,
        "checkpoint stall": config.checkpoint.every / config.train.global_batch_size,
    }
    durations = {name: (sum(seconds) / len(seconds), sum(seconds) / measured.steps) for name, seconds in call_seconds.items()}
    durations |= {name: (durations[name][0], durations[name][0] / interval) for name, interval in intervals.items()}
    wait = measured.data_seconds / measured.steps
    loading = {"data wait": (wait, wait)}
    if trainer.device.type == "cuda":
        upload = fastest(partial(measured.images.cpu().pin_memory().to, trainer.device), trainer.device)
        loading["host to device (overlapped)"] = (upload, 0.0)
    rest = (measured.train_seconds - measured.data_seconds - total) / measured.steps
    parts = loading | durations | {"other": (rest, rest)}
    return [Part(name, 1e3 * per_call, 1e3 * per_step) for name, (per_call, per_step) in parts.items()]


@contextlib.contextmanager
def _timed_calls(owner: Any, method: str, seconds: list[float], device: torch.device) -> Iterator[None]:
    """Appends the seconds of each call of an object's method to `seconds`."""
    original = getattr(owner, method)

    def timed(*args: Any, **options: Any) -> Any:
        synchronize(device)
        begin = time.perf_counter()
        result = original(*args, **options)
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
        return result

    setattr(owner, method, timed)
    try:
        yield
    finally:
        setattr(owner, method, original)


def _trace(run: Callable[[], float], path: Path) -> None:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    path.parent.mkdir(parents=True, exist_ok=True)
    with profile(activities=activities) as profiler:
        run()
    profiler.export_chrome_trace(str(path))


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
