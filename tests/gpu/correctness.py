"""Checks that training, sampling and encoding work on this device. Each name of CHECKS is a check."""

import copy
import itertools
import json
import math
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from processes import ROOT, NeedsGPU, Settings, serve, slug
from safetensors.torch import load_file
from torch import Tensor

from vae_scale.config.parsing import parse
from vae_scale.runtime import checkpoint
from vae_scale.training.trainer import Trainer

Result = tuple[str, dict[str, Any]]
NEVER = 10**9  # images: no run gets there
PATIENCE = 60.0  # seconds for a process that is waited for
OFF = "--train.compile=off"  # where compiled code is not what is checked, to save time
SHORT = 12  # steps


def batch(settings: Settings) -> int:
    """Images of a step."""
    return 8 if settings.rehearse else 64


def options(settings: Settings, run: str, steps: int, *more: str) -> list[str]:
    """The command line of a short training, compiled on a GPU. Every step is logged."""
    images = batch(settings)
    return [
        f"--data.shards={settings.shards}",
        f"--run={settings.scratch / run}",
        "--model.preset=tiny",
        *(["--model.width=16"] if settings.rehearse else []),
        f"--train.batch_size={images}",
        f"--train.images={steps * images}",
        "--train.log_every=1",
        "--optimizer.lr=0.002",
        "--optimizer.warmup_images=0",
        "--optimizer.schedule=constant",
        f"--evaluate.every={NEVER}",
        "--evaluate.early=false",
        "--evaluate.images=64",
        "--evaluate.samples=4",
        "--evaluate.prior_fit_images=64",
        f"--checkpoint.every={NEVER}",
        "--track.tracker=none",
        "--log=json",
        *more,
    ]


def make_trainer(settings: Settings, run: str, steps: int, *more: str) -> Trainer:
    """A trainer with the options of `options`."""
    torch._dynamo.reset()  # trainers of one process would share the limit of recompilations
    return Trainer(parse(options(settings, run, steps, *more))[0])


def train(settings: Settings, run: str, steps: int, *more: str) -> dict[int, float]:
    """Trains to the end; the losses."""
    make_trainer(settings, run, steps, *more).run()
    return losses(settings.scratch / run)


def advance(trainer: Trainer, steps: int) -> None:
    """Takes some steps, without a log line."""
    trainer.config.train.log_every = NEVER
    with closing(trainer.batches()) as batches, trainer.progress_bar():
        for images in itertools.islice(batches, steps):
            trainer.train_iteration(images)


def metrics(run: Path) -> list[dict[str, float]]:
    """The logged lines of the steps that were taken."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


def losses(run: Path) -> dict[int, float]:
    """The loss of each step, by images seen."""
    return {int(line["images"]): line["train/loss"] for line in metrics(run)}


def describe_losses(run: dict[int, float]) -> str:
    """Raises unless all losses are finite and the last quarter is below the first."""
    values = list(run.values())
    quarter = max(1, len(values) // 4)
    first, last = statistics.fmean(values[:quarter]), statistics.fmean(values[-quarter:])
    assert all(math.isfinite(value) for value in values), f"losses are not finite: {values}"
    assert last < first, f"the loss does not fall: {first:,.1f} to {last:,.1f}"
    return f"loss {first:,.0f} to {last:,.0f}"


def largest_difference(run: dict[int, float], other: dict[int, float]) -> float:
    """The largest relative difference between the losses of two runs."""
    assert run.keys() == other.keys(), f"steps of one run only: {sorted(run.keys() ^ other.keys())}"
    return max(abs(run[images] - other[images]) / abs(other[images]) for images in other)


def weights(run: Path) -> dict[str, Tensor]:
    """The weights of the newest checkpoint."""
    folder = checkpoint.newest_checkpoint(run)
    assert folder, f"{run}: no checkpoint"
    return load_file(folder / "model.safetensors")


def require_gpu(settings: Settings) -> None:
    """Raises `NeedsGPU` in a rehearsal."""
    if settings.rehearse:
        raise NeedsGPU


def train_and_resume(precision: str, tolerance: float, settings: Settings) -> Result:
    """A run that goes on from the checkpoint in its middle ends like the run without a break."""
    if precision in ("fp16", "tf32"):
        require_gpu(settings)
    steps, name = SHORT if settings.rehearse else 40, f"resume_{precision}"
    words = [f"--train.precision={precision}", f"--checkpoint.every={steps // 2 * batch(settings)}"]
    unbroken = train(settings, name, steps, *words)
    fall, run, copied = describe_losses(unbroken), settings.scratch / name, settings.scratch / f"{name}_again"
    shutil.copytree(run, copied)
    shutil.rmtree(checkpoint.checkpoint_folder(copied, steps * batch(settings)))
    resumed = train(settings, copied.name, steps, *words)
    difference, expected = largest_difference(resumed, unbroken), weights(run)
    same = not difference and all(torch.equal(value, expected[name]) for name, value in weights(copied).items())
    assert difference <= tolerance, f"a resumed run differs by {difference:.1e}, more than {tolerance:.0e}"
    summary = "resumed bit-identically" if same else f"resumed with a relative difference of {difference:.1e}"
    return f"{fall}; {summary}", {"bit_identical": same, "largest_relative_difference": difference}


def skipped_steps(settings: Settings) -> Result:
    """Steps whose gradient is too long change nothing."""
    precision = "fp32" if settings.rehearse else "fp16"
    trainer = make_trainer(settings, "skip", 100, f"--train.precision={precision}", "--optimizer.skip_threshold=1e-6", OFF)

    def state() -> dict[str, Tensor]:
        parts = {"model": trainer.model, "ema": trainer.ema.model}
        return {f"{part}.{name}": value.clone() for part in parts for name, value in parts[part].state_dict().items()}

    before = state()
    advance(trainer, 10)  # 30 in a row would end the run
    moved = [name for name, value in state().items() if not torch.equal(value, before[name])]
    assert not moved, f"moved although all steps are skipped: {', '.join(moved[:5])}"
    return f"{len(before)} tensors unchanged after 10 skipped steps, {precision}", {}


def adversarial(settings: Settings) -> Result:
    """Losses and weights are finite before and after the discriminator has an effect on the decoder."""
    precision, steps = "fp32" if settings.rehearse else "fp16", 2 * SHORT
    start = steps // 2 * batch(settings)
    words = [
        "--objective.adversarial_weight=0.5",
        "--objective.feature_matching_weight=0.5",
        "--objective.discriminator_width=8",
    ]
    train(settings, "adversarial", steps, *words, f"--objective.discriminator_start={start}", f"--train.precision={precision}")
    lines = metrics(settings.scratch / "adversarial")
    finite = all(
        math.isfinite(line[key]) for line in lines for key in ("train/loss", "train/discriminator_loss", "train/grad_norm")
    )
    before, after = sum(line["images"] <= start for line in lines), sum(line["images"] > start for line in lines)
    assert finite, "a loss or a gradient norm is not finite"
    assert min(before, after) > 0, f"steps taken: {before} before objective.discriminator_start, {after} after it"
    unsound = [name for name, value in weights(settings.scratch / "adversarial").items() if not value.isfinite().all()]
    assert not unsound, f"not finite: {', '.join(unsound[:5])}"
    return f"{before} steps taken before discriminator_start, {after} of {steps // 2} after it, {precision}", {}


def same_losses(option: str, first: str, second: str, settings: Settings) -> Result:
    """Two values of an option give the same losses."""
    if second == "cuda_graphs":
        require_gpu(settings)
    words = [["--train.precision=fp32", OFF, f"--{option}={value}"] for value in (first, second)]
    difference = largest_difference(*(train(settings, slug(given[-1]), 8, *given) for given in words))
    assert difference <= 1e-3, f"losses differ by {difference:.1e}"
    return "losses are bit-identical" if not difference else f"largest relative difference {difference:.1e}", {}


def auto_batch_size(settings: Settings) -> Result:
    """A run finds its batch size, which a small set limits, and trains with it."""
    trainer = make_trainer(settings, "auto", 1, "--train.batch_size=auto", OFF)
    size = trainer.config.train.global_batch_size
    trainer.config.train.images = 3 * size
    trainer.run()
    values = losses(settings.scratch / "auto")
    assert len(values) == 3, f"{len(values)} of 3 steps were taken"
    assert all(map(math.isfinite, values.values()))
    return f"{size:,} images, of {len(trainer.train_set):,}", {"batch_size": size}


def set_up_process_group(**more: str) -> None:
    """Environment variables of one process, as torchrun sets them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update({**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more})


def distributed(sharded: bool, settings: Settings) -> Result:
    """One process trains through the collectives: in FSDP2, where no limit of recompilations may be hit, or in DDP."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    set_up_process_group(**({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if sharded else {}))
    name, kind = ("fsdp2", FSDPModule) if sharded else ("ddp", DistributedDataParallel)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        trainer = make_trainer(settings, name, SHORT, "--train.gradient_accumulation_steps=2")
        backend, expected = torch.distributed.get_backend(), "gloo" if settings.rehearse else "nccl"
        assert expected in backend, f"the backend is {backend}, not {expected}"
        assert isinstance(trainer.objective, kind), f"the objective is a {type(trainer.objective).__name__}"
        trainer.run()
    return f"{describe_losses(losses(settings.scratch / name))}; {backend}, accumulation 2", {"backend": backend}


def two_stages(settings: Settings) -> Result:
    """A VAE and its flow are trained; samples and latents are written by the commands."""
    train(settings, "vae", 6, OFF)
    train(settings, "flow", 6, f"--prior.vae={settings.scratch / 'vae'}", "--prior.width=64", "--prior.depth=2")
    picture, latents = settings.scratch / "two_stages.png", settings.scratch / "latents"
    commands = [
        ["sample", f"--run={settings.scratch / 'flow'}", "--num=16", f"--out={picture}"],
        ["encode", f"--run={settings.scratch / 'vae'}", f"--out={latents}", "--splits=test"],
    ]
    started = [subprocess.Popen([sys.executable, "-m", f"vae_scale.{verb}", *words], cwd=ROOT) for verb, *words in commands]
    codes = [process.wait(PATIENCE) for process in started]
    assert codes == [0, 0], f"sample and encode end with exit status {codes}"
    size = Image.open(picture).size
    shards = json.loads((latents / "index.json").read_text())["shardlist"]
    encoded = sum(shard["nsamples"] for shard in shards)
    assert min(size) > 4 * 96, f"the picture of 16 samples has {size} pixels"
    velocity = list(losses(settings.scratch / "flow").values())
    assert all(map(math.isfinite, velocity)), f"losses are not finite: {velocity}"
    return f"velocity error {velocity[-1]:.3f}; a picture of {size[0]}x{size[1]}; {encoded:,} images encoded", {}


def stop_by_signal(settings: Settings) -> Result:
    """SIGTERM ends a run with a checkpoint, from which the same command goes on."""
    run, words = settings.scratch / "sigterm", options(settings, "sigterm", 10**6, OFF)
    process = subprocess.Popen([sys.executable, "-m", "vae_scale.train", *words], cwd=ROOT)
    try:
        end = time.monotonic() + PATIENCE
        while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 2:
            assert process.poll() is None, f"training ended by itself with exit status {process.returncode}"
            assert time.monotonic() < end, f"no steps within {PATIENCE:g} s"
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        code = process.wait(PATIENCE)
    finally:
        process.kill()
    seconds = time.monotonic() - begin
    assert code == 0, f"exit status {code}"
    folder = checkpoint.newest_checkpoint(run)
    assert folder, "no checkpoint was saved"
    saved = checkpoint.images_seen_at(folder)
    trainer = make_trainer(settings, "sigterm", saved // batch(settings) + 2, OFF)
    assert trainer.images_seen == saved, f"resumed at {trainer.images_seen:,} images, not {saved:,}"
    trainer.run()
    assert max(losses(run)) == saved + 2 * batch(settings)
    return f"saved at {saved:,} images, ended after {seconds:.1f} s, resumed there", {"seconds_to_stop": seconds}


def no_synchronization(settings: Settings) -> Result:
    """Between two log lines the host does not wait for the GPU."""
    require_gpu(settings)
    trainer = make_trainer(settings, "synchronization", 10**6)
    advance(trainer, 8)  # compiles
    with closing(trainer.batches()) as batches, trainer.progress_bar(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, images in enumerate(itertools.islice(batches, 28)):
            if number == 8:  # the stream has its buffers, and what is read some steps later is on its way
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("warn")
            trainer.train_iteration(images)
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{Path(each.filename).name}:{each.lineno}" for each in caught if "called a synchronizing" in str(each.message)
    )
    assert not places, f"in 20 steps, at {', '.join(f'{place} ({count} times)' for place, count in places.most_common())}"
    return "none in 20 steps", {"synchronizations": 0}


def same_step(settings: Settings) -> Result:
    """One forward and backward pass gives the same loss and gradient on a CPU as on the GPU, in fp32."""
    require_gpu(settings)
    trainer = make_trainer(settings, "step", 10**6, "--train.precision=fp32", OFF)
    forward, inputs = trainer.forward, []

    def recorded(*given: Any) -> Any:
        inputs.append(copy.deepcopy(given))  # the stream uses its buffers again
        return forward(*given)

    trainer.forward = recorded
    advance(trainer, 6)  # away from the initial weights, some of which are zero
    figures = []
    for device in ("cpu", "cuda"):
        objective = copy.deepcopy(trainer.objective).to(device)
        objective.zero_grad(set_to_none=True)
        loss = objective(*(move(each, device) for each in inputs[-1]))[0]
        loss.backward()
        squares = sum(part.grad.double().square().sum() for part in objective.parameters() if part.grad is not None)
        figures.append((float(loss.detach()), math.sqrt(float(squares))))
    loss, gradient = (abs(value - expected) / abs(expected) for expected, value in zip(*figures, strict=True))
    assert loss <= 1e-4, f"the losses differ by {loss:.1e}"
    assert gradient <= 1e-3, f"the gradients' norms differ by {gradient:.1e}"
    return f"relative difference {loss:.1e} of the loss, {gradient:.1e} of the gradient's norm", {}


def move(value: Any, device: str) -> Any:
    """A tensor, or a dictionary of tensors, on another device."""
    return {name: part.to(device) for name, part in value.items()} if isinstance(value, dict) else value.to(device)


def same_training(settings: Settings) -> Result:
    """A short run in fp32 on a CPU and on the GPU: other noise, since the generators differ, but the same loss in the mean."""
    require_gpu(settings)
    words = ["--train.precision=fp32"]
    command = [sys.executable, "-m", "vae_scale.train", *options(settings, "on_cpu", 30, *words)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    on_gpu = train(settings, "on_gpu", 30, *words)
    assert process.wait(PATIENCE) == 0, f"training on the CPU ends with exit status {process.returncode}"
    on_cpu = losses(settings.scratch / "on_cpu")
    means = [statistics.fmean(list(run.values())[-15:]) for run in (on_cpu, on_gpu)]
    difference = abs(means[1] - means[0]) / abs(means[0])
    assert difference <= 0.05, f"mean losses of the last 15 steps are {means[0]:,.1f} and {means[1]:,.1f}"
    return f"mean losses of the last 15 steps differ by {difference:.2%}", {"relative_difference": difference}


def compiled_graphs(settings: Settings) -> Result:
    """The compiled objective is one graph that is compiled once."""
    from torch._dynamo.utils import counters, get_compilation_metrics

    before = len(get_compilation_metrics())
    backend = "aot_eager" if settings.rehearse else "inductor"  # which takes 40 s on a slow CPU
    with mock.patch.object(torch, "compile", partial(torch.compile, backend=backend)):
        trainer = make_trainer(settings, "graphs", 10**6, "--train.compile=on", "--train.precision=fp32")
    counters.clear()
    advance(trainer, 5)
    graphs, breaks = counters["stats"]["unique_graphs"], dict(counters["graph_break"])
    reasons = [each.recompile_reason for each in get_compilation_metrics()[before:] if each.recompile_reason]
    summary = f"{graphs} graphs, {sum(breaks.values())} graph breaks, {len(reasons)} recompilations"
    assert graphs >= 1, summary
    unwanted = [*breaks, *reasons]
    assert not unwanted, f"{summary}: {unwanted}"
    return summary, {"graphs": graphs, "graph_breaks": sum(breaks.values()), "recompilations": len(reasons)}


# In the order in which they are started: those that take longest first.
CHECKS: dict[str, Callable[[Settings], Result]] = {
    "flow, sample, encode": two_stages,
    "SIGTERM and resume": stop_by_signal,
    "train and resume, bf16": partial(train_and_resume, "bf16", 2e-2),
    "train and resume, fp16": partial(train_and_resume, "fp16", 2e-2),
    "FSDP2, one process": partial(distributed, True),
    "DDP, one process": partial(distributed, False),
    "no host synchronization between log lines": no_synchronization,
    "one step, CPU and GPU": same_step,
    "discriminator in fp16": adversarial,
    "optimizer.skip_threshold in fp16": skipped_steps,
    "graphs of the compiled objective": compiled_graphs,
    "train and resume, fp32": partial(train_and_resume, "fp32", 1e-3),
    "train and resume, tf32": partial(train_and_resume, "tf32", 1e-3),
    "train.batch_size auto": auto_batch_size,
    "data.cache device": partial(same_losses, "data.cache", "host", "device"),
    "train.compile cuda_graphs": partial(same_losses, "train.compile", "on", "cuda_graphs"),
    "short run, CPU and GPU": same_training,
}

if __name__ == "__main__":
    serve(CHECKS, "passed")
