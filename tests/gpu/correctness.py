"""Checks of training, sampling and encoding on this device, listed in CHECKS."""

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
from vae_scale.training.objectives import Objective
from vae_scale.training.trainer import Trainer

Result = tuple[str, dict[str, Any]]
NEVER = 10**9  # interval in images that no run reaches
PROCESS_TIMEOUT = 60.0  # seconds
NO_COMPILE = "--train.compile=off"  # saves time in checks that do not depend on compilation
SHORT = 12  # steps


def batch_size(settings: Settings) -> int:
    """Returns the batch size of the checks."""
    return 8 if settings.rehearse else 64


def options(settings: Settings, run: str, steps: int, *more: str) -> list[str]:
    """Returns the command line of a short training run that logs every step, compiled on a GPU."""
    images = batch_size(settings)
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
    """Creates a trainer with the options of `options`."""
    torch._dynamo.reset()  # the recompilation limit is shared by all trainers of a process
    return Trainer(parse(options(settings, run, steps, *more))[0])


def train(settings: Settings, run: str, steps: int, *more: str) -> dict[int, float]:
    """Trains to the end and returns the losses."""
    make_trainer(settings, run, steps, *more).run()
    return losses(settings.scratch / run)


def advance(trainer: Trainer, steps: int) -> None:
    """Runs training steps without logging."""
    trainer.config.train.log_every = NEVER
    with closing(trainer.batches()) as batches, trainer.progress_bar():
        for images in itertools.islice(batches, steps):
            trainer.train_iteration(images)


def metrics(run: Path) -> list[dict[str, float]]:
    """Returns the logged metrics of all steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


def losses(run: Path) -> dict[int, float]:
    """Returns the loss of each step by images seen."""
    return {int(line["images"]): line["train/loss"] for line in metrics(run)}


def check_losses(losses: dict[int, float]) -> str:
    """Returns a summary; raises AssertionError unless losses are finite and the last quarter is below the first."""
    values = list(losses.values())
    quarter = max(1, len(values) // 4)
    first, last = statistics.fmean(values[:quarter]), statistics.fmean(values[-quarter:])
    assert all(math.isfinite(value) for value in values), f"losses are not finite: {values}"
    assert last < first, f"the loss does not decrease: {first:,.1f} to {last:,.1f}"
    return f"loss {first:,.0f} to {last:,.0f}"


def max_relative_difference(losses: dict[int, float], reference: dict[int, float]) -> float:
    """Returns the maximum relative difference between the losses of two runs."""
    assert losses.keys() == reference.keys(), f"steps of only one run: {sorted(losses.keys() ^ reference.keys())}"
    return max(abs(losses[images] - loss) / abs(loss) for images, loss in reference.items())


def weights(run: Path) -> dict[str, Tensor]:
    """Returns the weights of the newest checkpoint."""
    folder = checkpoint.newest_checkpoint(run)
    assert folder, f"{run}: no checkpoint"
    return load_file(folder / "model.safetensors")


def require_gpu(settings: Settings) -> None:
    """Raises `NeedsGPU` in a rehearsal."""
    if settings.rehearse:
        raise NeedsGPU


def train_and_resume(precision: str, tolerance: float, settings: Settings) -> Result:
    """A run resumed from its middle ends with the same losses and weights as the uninterrupted run."""
    if precision in ("fp16", "tf32"):
        require_gpu(settings)
    steps, name = SHORT if settings.rehearse else 40, f"resume_{precision}"
    compiling = [] if precision == "bf16" else [NO_COMPILE]
    words = [*compiling, f"--train.precision={precision}", f"--checkpoint.every={steps // 2 * batch_size(settings)}"]
    uninterrupted = train(settings, name, steps, *words)
    summary, run, copied = check_losses(uninterrupted), settings.scratch / name, settings.scratch / f"{name}_again"
    shutil.copytree(run, copied)
    shutil.rmtree(checkpoint.checkpoint_folder(copied, steps * batch_size(settings)))
    resumed = train(settings, copied.name, steps, *words)
    difference, expected = max_relative_difference(resumed, uninterrupted), weights(run)
    is_identical = not difference and all(torch.equal(value, expected[name]) for name, value in weights(copied).items())
    assert difference <= tolerance, f"a resumed run differs by {difference:.1e}, more than {tolerance:.0e}"
    resume_summary = "resumed bit-identically" if is_identical else f"resumed with a relative difference of {difference:.1e}"
    return f"{summary}; {resume_summary}", {"bit_identical": is_identical, "largest_relative_difference": difference}


def skipped_steps(settings: Settings) -> Result:
    """Skipped steps do not change the model or the EMA weights."""
    precision = "fp32" if settings.rehearse else "fp16"
    trainer = make_trainer(
        settings, "skip", 100, f"--train.precision={precision}", "--optimizer.skip_threshold=1e-6", NO_COMPILE
    )

    def state() -> dict[str, Tensor]:
        models = {"model": trainer.model, "ema": trainer.ema.model}
        return {f"{key}.{name}": value.clone() for key, model in models.items() for name, value in model.state_dict().items()}

    before = state()
    advance(trainer, 10)  # 30 consecutive skipped steps would abort the run
    changed = [name for name, value in state().items() if not torch.equal(value, before[name])]
    assert not changed, f"changed although all steps were skipped: {', '.join(changed[:5])}"
    return f"{len(before)} tensors unchanged after 10 skipped steps, {precision}", {}


def same_losses(option: str, first: str, second: str, settings: Settings) -> Result:
    """Training gives the same losses for two values of an option."""
    if second == "cuda_graphs":
        require_gpu(settings)
    words = [["--train.precision=fp32", NO_COMPILE, f"--{option}={value}"] for value in (first, second)]
    difference = max_relative_difference(*(train(settings, slug(options[-1]), 8, *options) for options in words))
    assert difference <= 1e-3, f"losses differ by {difference:.1e}"
    return "losses are bit-identical" if not difference else f"largest relative difference {difference:.1e}", {}


def auto_batch_size(settings: Settings) -> Result:
    """An automatic batch size, limited by the size of the set, is used for training."""
    trainer = make_trainer(settings, "auto", 1, "--train.batch_size=auto", NO_COMPILE)
    size = trainer.config.train.global_batch_size
    trainer.config.train.images = 3 * size
    trainer.run()
    values = losses(settings.scratch / "auto")
    assert len(values) == 3, f"{len(values)} of 3 steps were taken"
    assert all(map(math.isfinite, values.values()))
    return f"{size:,} images, of {len(trainer.train_set):,}", {"batch_size": size}


def set_up_process_group(**more: str) -> None:
    """Sets the environment variables of torchrun for a single process."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update({**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more})


def distributed(sharded: bool, settings: Settings) -> Result:
    """A process with a process group trains and does not reach the recompilation limit.

    Accelerate uses DDP for a single process only on a CPU.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    set_up_process_group(**({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if sharded else {}))
    name, kind = ("fsdp2", FSDPModule) if sharded else ("ddp", DistributedDataParallel if settings.rehearse else Objective)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        trainer = make_trainer(settings, name, SHORT, "--train.gradient_accumulation_steps=2")
        backend, expected = torch.distributed.get_backend(), "gloo" if settings.rehearse else "nccl"
        assert expected in backend, f"the backend is {backend}, not {expected}"
        assert isinstance(trainer.objective, kind), f"the objective is a {type(trainer.objective).__name__}"
        trainer.run()
    return f"{check_losses(losses(settings.scratch / name))}; {backend}, accumulation 2", {"backend": backend}


def two_stages(settings: Settings) -> Result:
    """A VAE and its flow are trained, and the commands write samples and latents."""
    train(settings, "vae", 6, NO_COMPILE)
    train(settings, "flow", 6, NO_COMPILE, f"--prior.vae={settings.scratch / 'vae'}", "--prior.width=64", "--prior.depth=2")
    picture, latents = settings.scratch / "two_stages.png", settings.scratch / "latents"
    commands = [
        ["sample", f"--run={settings.scratch / 'flow'}", "--num=16", f"--out={picture}"],
        ["encode", f"--run={settings.scratch / 'vae'}", f"--out={latents}", "--splits=test"],
    ]
    processes = [subprocess.Popen([sys.executable, "-m", f"vae_scale.{name}", *words], cwd=ROOT) for name, *words in commands]
    codes = [process.wait(PROCESS_TIMEOUT) for process in processes]
    assert codes == [0, 0], f"exit statuses of sample and encode: {codes}"
    size = Image.open(picture).size
    shards = json.loads((latents / "index.json").read_text())["shardlist"]
    encoded = sum(shard["nsamples"] for shard in shards)
    assert min(size) > 4 * 96, f"the grid of 16 samples has {size} pixels"
    velocity = list(losses(settings.scratch / "flow").values())
    assert all(map(math.isfinite, velocity)), f"losses are not finite: {velocity}"
    return f"velocity error {velocity[-1]:.3f}; a grid of {size[0]}x{size[1]} pixels; {encoded:,} images encoded", {}


def stop_by_signal(settings: Settings) -> Result:
    """SIGTERM stops a run with a checkpoint, from which the same command resumes."""
    run, words = settings.scratch / "sigterm", options(settings, "sigterm", 10**6, NO_COMPILE)
    process = subprocess.Popen([sys.executable, "-m", "vae_scale.train", *words], cwd=ROOT)
    try:
        deadline = time.monotonic() + PROCESS_TIMEOUT
        while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 2:
            assert process.poll() is None, f"training exited with status {process.returncode} before SIGTERM"
            assert time.monotonic() < deadline, f"no steps within {PROCESS_TIMEOUT:g} s"
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        code = process.wait(PROCESS_TIMEOUT)
    finally:
        process.kill()
    seconds = time.monotonic() - begin
    assert code == 0, f"exit status {code}"
    folder = checkpoint.newest_checkpoint(run)
    assert folder, "no checkpoint was saved"
    saved = checkpoint.images_seen_at(folder)
    trainer = make_trainer(settings, "sigterm", saved // batch_size(settings) + 2, NO_COMPILE)
    assert trainer.images_seen == saved, f"resumed at {trainer.images_seen:,} images, not {saved:,}"
    trainer.run()
    assert max(losses(run)) == saved + 2 * batch_size(settings)
    return f"saved at {saved:,} images, exited after {seconds:.1f} s, resumed", {"seconds_to_stop": seconds}


def no_synchronization(settings: Settings) -> Result:
    """Training of a VAE and of its flow does not synchronize with the GPU between log lines."""
    require_gpu(settings)
    train(settings, "synchronization_vae", 2, NO_COMPILE)
    flow = [f"--prior.vae={settings.scratch / 'synchronization_vae'}", "--prior.width=64", "--prior.depth=1"]
    lines = Counter[str]()
    for name, words in (("VAE", []), ("flow", flow)):
        trainer = make_trainer(settings, f"synchronization_{name}", 10**6, *words)
        lines.update({f"{name}, {line}": count for line, count in synchronizing_lines(trainer).items()})
    assert not lines, f"in 20 steps, at {', '.join(f'{line} ({count} times)' for line, count in lines.most_common())}"
    return "none in 20 steps of a VAE and of a flow", {"synchronizations": 0}


def synchronizing_lines(trainer: Trainer) -> Counter[str]:
    """Returns the lines of code that synchronize with the GPU in 20 steps."""
    advance(trainer, 8)  # compiles
    with closing(trainer.batches()) as batches, trainer.progress_bar(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, images in enumerate(itertools.islice(batches, 28)):
            if number == 8:  # buffers are allocated, and asynchronous copies are in flight
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("warn")
            trainer.train_iteration(images)
        torch.cuda.set_sync_debug_mode("default")
    messages = [warning for warning in caught if "called a synchronizing" in str(warning.message)]
    return Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in messages)


def same_step(settings: Settings) -> Result:
    """Loss and gradient norm of a step in fp32 are equal on the CPU and the GPU."""
    require_gpu(settings)
    trainer = make_trainer(settings, "step", 10**6, "--train.precision=fp32", NO_COMPILE)
    forward, inputs = trainer.forward, []

    def record_inputs(*args: Any) -> Any:
        inputs.append(copy.deepcopy(args))  # the stream reuses its buffers
        return forward(*args)

    trainer.forward = record_inputs
    advance(trainer, 6)  # some initial weights are zero
    results = []
    for device in ("cpu", "cuda"):
        objective = copy.deepcopy(trainer.objective).to(device)
        objective.zero_grad(set_to_none=True)
        loss = objective(*(to_device(value, device) for value in inputs[-1]))[0]
        loss.backward()
        squares = sum(p.grad.double().square().sum() for p in objective.parameters() if p.grad is not None)
        results.append((float(loss.detach()), math.sqrt(float(squares))))
    loss, gradient = (abs(value - expected) / abs(expected) for expected, value in zip(*results, strict=True))
    assert loss <= 1e-4, f"the losses differ by {loss:.1e}"
    assert gradient <= 1e-3, f"the gradient norms differ by {gradient:.1e}"
    return f"relative difference {loss:.1e} of the loss, {gradient:.1e} of the gradient norm", {}


def to_device(value: Any, device: str) -> Any:
    """Copies a tensor, or a dictionary of tensors, to a device."""
    return {name: tensor.to(device) for name, tensor in value.items()} if isinstance(value, dict) else value.to(device)


def same_training(settings: Settings) -> Result:
    """Short runs in fp32 on the CPU and the GPU, whose random numbers differ, have about the same mean loss."""
    require_gpu(settings)
    words = ["--train.precision=fp32"]
    command = [sys.executable, "-m", "vae_scale.train", *options(settings, "on_cpu", 30, *words)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    on_gpu = train(settings, "on_gpu", 30, *words)
    assert process.wait(PROCESS_TIMEOUT) == 0, f"exit status of training on the CPU: {process.returncode}"
    on_cpu = losses(settings.scratch / "on_cpu")
    means = [statistics.fmean(list(run.values())[-15:]) for run in (on_cpu, on_gpu)]
    difference = abs(means[1] - means[0]) / abs(means[0])
    assert difference <= 0.05, f"mean losses of the last 15 steps are {means[0]:,.1f} and {means[1]:,.1f}"
    return f"mean losses of the last 15 steps differ by {difference:.2%}", {"relative_difference": difference}


def compiled_graphs(settings: Settings) -> Result:
    """The objective is compiled once, without graph breaks."""
    from torch._dynamo.utils import counters, get_compilation_metrics

    before = len(get_compilation_metrics())
    backend = "aot_eager" if settings.rehearse else "inductor"  # inductor takes 40 s on a slow CPU
    with mock.patch.object(torch, "compile", partial(torch.compile, backend=backend)):
        trainer = make_trainer(settings, "graphs", 10**6, "--train.compile=on", "--train.precision=fp32")
    counters.clear()
    advance(trainer, 5)
    graphs, breaks = counters["stats"]["unique_graphs"], dict(counters["graph_break"])
    reasons = [entry.recompile_reason for entry in get_compilation_metrics()[before:] if entry.recompile_reason]
    summary = f"{graphs} graphs, {sum(breaks.values())} graph breaks, {len(reasons)} recompilations"
    assert graphs >= 1, summary
    assert not [*breaks, *reasons], f"{summary}: {[*breaks, *reasons]}"
    return summary, {"graphs": graphs, "graph_breaks": sum(breaks.values()), "recompilations": len(reasons)}


# Started in this order, the longest first.
CHECKS: dict[str, Callable[[Settings], Result]] = {
    "flow, sample, encode": two_stages,
    "SIGTERM and resume": stop_by_signal,
    "train and resume, bf16": partial(train_and_resume, "bf16", 2e-2),
    "train and resume, fp16": partial(train_and_resume, "fp16", 2e-2),
    "FSDP2, one process": partial(distributed, True),
    "DDP, one process": partial(distributed, False),
    "no host synchronization between log lines": no_synchronization,
    "one step, CPU and GPU": same_step,
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
