"""How fast training is: the machine's ceilings, the bare step, the whole trainer, and where the time between them goes."""

import contextlib
import dataclasses
import math
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from vae_scale.benchmark.measuring import MATRIX, Row, alternate, ceilings, fastest, synchronise
from vae_scale.benchmark.training_peers import compare, peers
from vae_scale.config import Config
from vae_scale.errors import UserError
from vae_scale.training.launching import resolve_precision
from vae_scale.training.trainer import Trainer

SECONDS = 3.0  # of a run of steps
FEWEST_STEPS = 4  # of a run
PROFILED_STEPS = 3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ENDLESS = 10**9  # images: no run gets there

STEP, TRAIN, SAVING = "bare step", "whole trainer", "and a checkpoint in each run"


@dataclass
class Part:
    """What a part of a training step takes, with the device waited for before and after.

    Attributes:
        name: The part.
        ms_each: Milliseconds each time.
        ms_per_step: Milliseconds per step; of what is not done in each, its share at the configured interval.
    """

    name: str
    ms_each: float
    ms_per_step: float


@dataclass
class Report:
    """What was found.

    Attributes:
        rows: Ceilings, in FLOP and in bytes read and written per second; the step and the trainer, in images per second.
        ratios: `mfu`, the bare step's share of the matrix ceiling; `train_over_step`, the whole trainer over the bare step;
            `data_wait`, the share of the trainer's time spent waiting for data; `over_...`, the trainer, or the step where
            it is measured alone, over each family of others and over the fastest of them.
        parts: Of the whole trainer's steps.
        flops_per_image: Forward and backward, counted.
        parameters: Of the model.
        batch: Images of a step.
        precision: bf16, fp16, tf32 or fp32.
        steps: Of a run.
        peak_memory_bytes: Of the device; of this process where that is a CPU.
        missing: Others that cannot be had here or do not count, and why.
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
    missing: dict[str, str]


def measure(config: Config, whole: bool, repeats: int, traces: Path | None, others: Sequence[str] | None = None) -> Report:
    """Measures the training that a configuration describes, in a run folder that is deleted afterwards.

    Runs are short, so what a checkpoint costs is found from runs with one, and counted as often as configured. A run logs
    at least once, be the configured interval longer. Evaluation and wandb are left out.

    Args:
        config: Of the run.
        whole: Measure the whole trainer, not the bare step alone.
        repeats: Runs of each, of which the median counts.
        traces: Folder for a profiler's trace of a few steps; None for none.
        others: Also the same training by these other people's means; by all of them if empty, by none if None.

    Raises:
        UserError: there are no such shards, they cannot be trained on, there are several processes, or others cannot do it.
    """
    with opened(config) as subject:
        if subject.trainer.ranks > 1:
            raise UserError(f"bench {'train' if whole else 'step'} measures one process; start it without accelerate launch")
        return _measure(subject, config, whole, repeats, traces, others)


@contextlib.contextmanager
def opened(config: Config) -> Iterator["Subject"]:
    """A trainer to measure, without evaluation and wandb, in a run folder that is deleted afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        train = dataclasses.replace(config.train, images=ENDLESS)
        evaluate = dataclasses.replace(config.evaluate, every=ENDLESS, early=False)
        kept = dataclasses.replace(config.checkpoint)  # a copy, since `train` moves the interval
        track = dataclasses.replace(config.track, tracker="none")
        trainer = Trainer(dataclasses.replace(config, run=folder, train=train, evaluate=evaluate, checkpoint=kept, track=track))
        with Subject(trainer) as subject:
            yield subject


def _measure(
    subject: "Subject", config: Config, whole: bool, repeats: int, traces: Path | None, others: Sequence[str] | None
) -> Report:
    trainer, batch = subject.trainer, config.train.batch
    subject.choose_steps(SECONDS)
    tasks: dict[str, Callable[[], float]] = {STEP: subject.step}
    if whole:
        trainer.config.train.log_every = min(config.train.log_every, subject.steps)
        tasks |= {TRAIN: subject.train, SAVING: partial(subject.train, saving=True)}
        subject.train(saving=True)
    memory = _peak_memory(trainer.device)  # before the ceilings, which need memory of their own
    dtype = DTYPES.get(trainer.accelerator.mixed_precision, torch.float32)
    with tempfile.TemporaryDirectory() as scratch:
        found, missing = peers(trainer, SECONDS, Path(scratch), others) if others is not None else ([], {})
        tasks = ceilings(trainer.device, dtype) | tasks | {peer.name: peer.run for peer in found}
        rows = alternate(tasks, repeats, "measuring")
    flops = count_flops(subject.one_image)
    trainer.update.adamw.zero_grad(set_to_none=True)
    ratios = {"mfu": rows[STEP].median * flops / rows[MATRIX].median}
    parts: list[Part] = []
    if whole:
        per_image, saving = 1 / rows[TRAIN].median, 1 / rows[SAVING].median  # seconds
        per_image += max(0.0, saving - per_image) * subject.steps * batch / config.checkpoint.every
        ratios |= {"train_over_step": 1 / per_image / rows[STEP].median, "data_wait": subject.waited / subject.trained}
        parts = _breakdown(subject, config)
    over, idle = compare(rows[TRAIN if whole else STEP].median, found, rows)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    precision = resolve_precision(config.train.precision)
    shown = [row for name, row in rows.items() if name not in idle]
    report = Report(shown, ratios | over, parts, flops, parameters, batch, precision, subject.steps, memory, missing | idle)
    if traces:
        subject.steps = PROFILED_STEPS
        _trace(subject.train if whole else subject.step, traces / ("train.json" if whole else "step.json"))
    return report


class Subject:
    """A trainer, and its data. Its runs take `steps` steps.

    Attributes:
        waited: Seconds that runs of the whole trainer waited for data.
        trained: Seconds that they took.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.steps = 1
        self.waited = self.trained = 0.0
        self._end = contextlib.ExitStack()

    def __enter__(self) -> "Subject":
        trainer = self.trainer
        if trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._end.enter_context(trainer._progress())
        if trainer.tracker:
            self._end.callback(trainer.tracker.close)
        self._end.callback(trainer.writer.wait)
        self._batches = self._end.enter_context(contextlib.closing(trainer._batches()))
        batch = next(self._batches)
        self.images = batch.images.clone()  # the stream uses its buffers again
        self.draws, self.arguments = trainer._draws(batch), trainer.stage.arguments(0)
        return self

    def __exit__(self, *error: object) -> None:
        self._end.close()

    def choose_steps(self, seconds: float) -> None:
        """Makes runs take about so long, once the first steps, which are slow, are over."""
        self.step()
        self.steps = FEWEST_STEPS
        images = max(self.step() for _ in range(3)) * seconds
        self.steps = max(FEWEST_STEPS, math.ceil(images / self.trainer.config.train.batch))

    def step(self) -> float:
        """Images per second of forward, backward and optimizer on one batch, which leave the weights as they are."""
        trainer = self.trainer
        for group in trainer.update.adamw.param_groups:
            group["lr"] = 0.0
        with self._timed() as seconds:
            for _ in range(self.steps):
                trainer._gradients(self.images, self.draws, self.arguments)
                self._step_optimizer()
        return self.steps * trainer.config.train.batch / seconds()

    def _step_optimizer(self) -> None:
        """AdamW alone, without clipping; in fp16 with gradients that the scaler has unscaled."""
        adamw, scaler = self.trainer.update.adamw, self.trainer.accelerator.scaler
        if scaler:
            scaler.step(adamw)
            scaler.update()
        else:
            adamw.step()
        adamw.zero_grad(set_to_none=True)

    def train(self, saving: bool = False) -> float:
        """Images per second of the whole trainer; where it is `saving`, with a checkpoint halfway, until that is written."""
        trainer, size = self.trainer, self.trainer.config.train.batch
        trainer.config.checkpoint.every = trainer.images_seen + math.ceil(self.steps / 2) * size if saving else ENDLESS
        trainer._begin_interval()
        with self._timed() as seconds:
            self.waited += sum(self.advance() for _ in range(self.steps))
            trainer.writer.wait()
        self.trained += seconds()
        return self.steps * size / seconds()

    def advance(self) -> float:
        """One step of the whole trainer; the seconds for which it waited for data."""
        begin = time.perf_counter()
        batch = next(self._batches)
        waited = time.perf_counter() - begin
        self.trainer._advance(batch)
        return waited

    @contextlib.contextmanager
    def _timed(self) -> Iterator[Callable[[], float]]:
        """Gives a function that tells, afterwards, the seconds until the device was done."""
        synchronise(self.trainer.device)
        begin = end = time.perf_counter()
        yield lambda: end - begin
        synchronise(self.trainer.device)
        end = time.perf_counter()

    def one_image(self) -> Tensor:
        """The loss of one image, computed without the compiler, behind which nothing can be counted."""
        drawn = {name: numbers[:1] for name, numbers in self.draws.items()}
        return self.trainer.objective(self.images[:1], drawn, *self.arguments)[0]


def count_flops(loss: Callable[[], Tensor]) -> int:
    """Floating-point operations of a loss's computation and of its gradients: those of matrix products and convolutions."""
    # Not all versions count all kinds of fused attention, but all count the products it is made of.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


def _breakdown(subject: Subject, config: Config) -> list[Part]:
    """One run with the device waited for around each part, which is slower and so not among those that count."""
    trainer = subject.trainer
    places: dict[str, tuple[Any, str]] = {
        "draws": (trainer, "_draws"),
        "forward": (trainer, "forward"),
        "backward": (trainer.accelerator, "backward"),
        "clip and optimizer": (trainer.update, "step"),
        "EMA": (trainer.ema, "update"),
        "logging": (trainer, "_log"),
        "checkpoint stall": (trainer, "_save"),
    }
    spent: dict[str, list[float]] = defaultdict(list)
    subject.waited = subject.trained = 0.0
    with contextlib.ExitStack() as stack:
        for name, (owner, method) in places.items():
            stack.enter_context(_watched(owner, method, spent[name], trainer.device))
        subject.train()
        inside = sum(map(sum, spent.values()))
        trainer._save()
    intervals = {"logging": config.train.log_every, "checkpoint stall": config.checkpoint.every / config.train.batch}
    found = {name: (sum(times) / len(times), sum(times) / subject.steps) for name, times in spent.items()}
    found |= {name: (found[name][0], found[name][0] / interval) for name, interval in intervals.items()}
    wait = subject.waited / subject.steps
    ahead = {"data wait": (wait, wait)}
    if trainer.device.type == "cuda":
        upload = fastest(partial(subject.images.cpu().pin_memory().to, trainer.device), trainer.device)
        ahead["host to device (meanwhile)"] = (upload, 0.0)
    rest = (subject.trained - subject.waited - inside) / subject.steps
    parts = ahead | found | {"the rest": (rest, rest)}
    return [Part(name, 1e3 * each, 1e3 * per_step) for name, (each, per_step) in parts.items()]


@contextlib.contextmanager
def _watched(owner: Any, method: str, times: list[float], device: torch.device) -> Iterator[None]:
    """Appends the seconds of each call of an object's method to `times`."""
    original = getattr(owner, method)

    def watched(*args: Any, **options: Any) -> Any:
        synchronise(device)
        begin = time.perf_counter()
        result = original(*args, **options)
        synchronise(device)
        times.append(time.perf_counter() - begin)
        return result

    setattr(owner, method, watched)
    try:
        yield
    finally:
        setattr(owner, method, original)


def _trace(run: Callable[[], float], path: Path) -> None:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    path.parent.mkdir(parents=True, exist_ok=True)
    with profile(activities=activities) as found:
        run()
    found.export_chrome_trace(str(path))


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
