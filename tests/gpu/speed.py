"""Measurements of speed, listed in MEASUREMENTS. They run in parallel, but use the GPU one at a time."""

import contextlib
import fcntl
import importlib.util
import json
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import quality
import torch
from processes import Settings, Skip, reset_state, serve, slug
from torch import nn
from torch._dynamo.callback import callback_handler

from vae_scale import bench
from vae_scale.benchmark import measuring
from vae_scale.benchmark import training as benchmark
from vae_scale.config.options import Config
from vae_scale.config.parsing import parse
from vae_scale.data.shards import ShardSet
from vae_scale.errors import UserError
from vae_scale.evaluation.encoding import encode_shards
from vae_scale.evaluation.sampling import sample_images
from vae_scale.models import blocks
from vae_scale.models.networks import build_model
from vae_scale.models.vae import VAE, SamplingConfig
from vae_scale.training.trainer import Trainer

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import compare_trainers
import step_parts

Result = tuple[str, dict[str, Any]]
NEVER = 10**9  # images
TINY = ["--model.preset=tiny", "--model.width=16", "--model.attention=false", "--train.precision=fp32", "--train.batch_size=8"]
TINY_FLOW = ["--prior.width=32", "--prior.depth=1"]
# Names of the kernels of cuDNN and torch that only convert the memory format of a tensor.
LAYOUT = re.compile(r"nchwToNhwc|nhwcToNchw|nchw_to_nhwc|nhwc_to_nchw|convertTensor|tensorTransform|AddPadding", re.IGNORECASE)
SHOWN_KERNELS = 20


@contextlib.contextmanager
def exclusive_device(settings: Settings) -> Iterator[None]:
    """Locks the GPU for a measurement. The lock is released during compilation, which uses only the CPU."""
    kind = fcntl.LOCK_SH if settings.rehearse else fcntl.LOCK_EX  # speeds are not meaningful in a rehearsal
    with (settings.scratch / "device.lock").open("w") as file:

        def acquire(*_: object) -> None:
            fcntl.flock(file, kind)

        def release(*_: object) -> None:
            fcntl.flock(file, fcntl.LOCK_UN)

        acquire()
        callback_handler.register_start_callback(release)
        callback_handler.register_end_callback(acquire)
        try:
            yield
        finally:
            callback_handler.remove_start_callback(release)
            callback_handler.remove_end_callback(acquire)


def options(settings: Settings, config: str, batch: int, *more: str) -> list[str]:
    """Returns training options with a configuration file of the repository."""
    words = [f"--config=configs/{config}.yaml", f"--data.shards={settings.shards}", "--track.tracker=none", *more]
    return [*words, *(TINY if settings.rehearse else [f"--train.batch_size={batch}"])]


def configuration(settings: Settings, config: str, batch: int, *more: str) -> Config:
    """Returns `options` as a `Config`.

    Raises:
        Skip: if an option is invalid.
    """
    try:
        return parse(options(settings, config, batch, *more))[0]
    except UserError as error:
        raise Skip(str(error)) from None


def run_benchmark(main: Callable[[list[str]], None], settings: Settings, name: str, words: list[str]) -> dict[str, Any]:
    """Returns the report of a benchmark with the command line `words`."""
    path = settings.scratch / f"{slug(name)}.bench.json"
    benchmark.SECONDS = 0.05 if settings.rehearse else 2.0
    if settings.rehearse:
        measuring.SIDES = {"cpu": 256}
    try:
        with exclusive_device(settings):
            main([*words, f"--json={path}"])
    except SystemExit as error:
        raise RuntimeError(f"exit status of the benchmark: {error.code}") from None
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def summarize(report: dict[str, Any], task: str) -> dict[str, Any]:
    """Returns the values of a report: images per second of a task, details and ratios."""
    return {"images_per_second": statistics.median(report["speeds"][task]), **report, **report["ratios"]}


def kernels(trace: Path, steps: int) -> dict[str, Any]:
    """Returns layout conversions per step and the slowest kernels from a profiler trace."""
    counts, times = Counter[str](), Counter[str]()
    for event in json.loads(trace.read_text())["traceEvents"]:
        if event.get("cat") == "kernel":
            counts[event["name"]] += 1
            times[event["name"]] += event["dur"]
    if not counts:  # on a CPU, or if GPU profiling is not permitted
        return {}
    total = sum(times.values())
    top = [
        [name[:120], round(duration / total, 4), counts[name] / steps] for name, duration in times.most_common(SHOWN_KERNELS)
    ]
    layout = [name for name in counts if LAYOUT.search(name)]
    return {
        "layout_kernels_per_step": sum(counts[name] for name in layout) / steps,
        "layout_time_fraction": sum(times[name] for name in layout) / total,
        "kernels_per_step": sum(counts.values()) / steps,
        "top_kernels": top,
    }


def step(
    config: str, batch: int, settings: Settings, *more: str, choice: str = "", on: bool = True, trace: bool = True
) -> Result:
    """Measures the bare training step, with a kernel trace. A step with or without a `choice` is compared with the default."""
    configuration(settings, config, batch, *more)
    name = f"step_{config}_{batch}_{choice}"
    traces = settings.scratch / f"{slug(name)}_traces"
    words = ["step", *options(settings, config, batch, *more), "--repeats=2", *([f"--profile={traces}"] if trace else [])]
    report = run_benchmark(bench.main, settings, name, words)
    values = summarize(report, benchmark.STEP) | (kernels(traces / "step.json", benchmark.PROFILED_STEPS) if trace else {})
    if choice:
        values |= {"choice": f"{choice}, {config}, {batch} images", "compared_with": f"step, {config}, {batch} images"}
        values["is_on"] = on
    return "" if choice else f"{report['parameters'] / 1e6:.0f} M parameters, {report['precision']}", values


def flow_step(settings: Settings, *more: str, **choice: Any) -> Result:
    """Measures the step of the flow prior of stl10_prior.yaml over an untrained VAE."""
    vae = settings.scratch / f"vae_of_flow_{slug(choice.get('choice', ''))}"
    words = ["--train.images=1", "--train.compile=off", "--evaluate.images=8", "--evaluate.prior_fit_images=8"]
    with exclusive_device(settings):
        Trainer(configuration(settings, "stl10", 8, f"--run={vae}", *words)).run()
    reset_state()
    tiny = TINY_FLOW if settings.rehearse else []
    return step("stl10_prior", 256, settings, f"--prior.vae={vae}", *tiny, *more, **choice)


def torch_group_norm(settings: Settings) -> Result:
    """Measures the step with the GroupNorm of torch.nn."""
    with mock.patch.object(blocks.GroupNorm, "forward", nn.GroupNorm.forward):
        return step("stl10", 256, settings, choice="channels_last GroupNorm", on=False)


def without_cudnn_benchmark(settings: Settings) -> Result:
    """Measures the step without cuDNN's autotuning."""
    original_init = Trainer.__init__

    def initialize(self: Trainer, config: Config) -> None:
        original_init(self, config)
        torch.backends.cudnn.benchmark = False

    with mock.patch.object(Trainer, "__init__", initialize):
        return step("stl10", 256, settings, choice="torch.backends.cudnn.benchmark", on=False, trace=False)


def cuda_graphs(measure: Callable[..., Result], settings: Settings) -> Result:
    """Measures a step with CUDA graphs."""
    if settings.rehearse:
        raise Skip("needs a GPU")
    return measure(settings, "--train.compile=cuda_graphs", choice="CUDA graphs", trace=False)


def trainer(settings: Settings) -> Result:
    """Compares the trainer, with data loading and EMA, with the bare step."""
    words = ["train", *options(settings, "stl10", 256), "--repeats=2"]
    values = summarize(run_benchmark(bench.main, settings, "trainer", words), benchmark.TRAIN)
    return f"{values['train_over_step']:.3f} of the bare step, data loading {values['data_wait']:.1%}", values


def parts(settings: Settings) -> Result:
    """Measures the parts of a step."""
    report = run_benchmark(step_parts.main, settings, "parts", options(settings, "stl10", 256))
    milliseconds = {name: part["ms_per_step"] for name, part in report["parts"].items()}
    return ", ".join(f"{name} {value:.2f} ms" for name, value in milliseconds.items()), {"parts": milliseconds}


def peers(config: str, batch: int, families: str, settings: Settings, *more: str) -> Result:
    """Compares the trainer with other training loops."""
    if "diffusers" in families and not importlib.util.find_spec("diffusers"):
        raise Skip("diffusers is not installed")
    if settings.rehearse and "kl" in config:
        raise Skip("too slow for a rehearsal")
    words = [*options(settings, "stl10", batch, *more), "--repeats=1", f"--peers={families}"]
    report = run_benchmark(compare_trainers.main, settings, f"peers_{config}", words)
    values = summarize(report, benchmark.TRAIN)
    ratios = {name: ratio for name, ratio in report["ratios"].items() if name.startswith("over_")}
    summary = ", ".join(f"{name.removeprefix('over_')} {ratio:.2f}" for name, ratio in ratios.items())
    return f"trainer over {summary}" if ratios else f"missing: {report['missing']}", values


def build_untrained(settings: Settings) -> VAE:
    """Builds the VAE of stl10.yaml and the flow of stl10_prior.yaml with random weights."""
    config = configuration(settings, "stl10", 256)
    prior = parse(["--config=configs/stl10_prior.yaml", *(TINY_FLOW if settings.rehearse else [])])[0].prior
    torch.manual_seed(0)
    model = build_model(config.model, 96)
    model.add_flow(prior.width, prior.depth, [str(number) for number in range(10)])
    for parameter in model.parameters():  # some are zero-initialized
        nn.init.normal_(parameter, std=0.02)
    device = "cpu" if settings.rehearse else "cuda"
    return model.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)


def autocast(settings: Settings) -> torch.autocast:
    """Returns bf16 autocast on a GPU."""
    return torch.autocast("cpu" if settings.rehearse else "cuda", torch.bfloat16, enabled=not settings.rehearse)


def sampling(settings: Settings) -> Result:
    """Measures sampling, from noise to pixels in host memory."""
    model, batch, rounds = build_untrained(settings), 8 if settings.rehearse else 512, 1 if settings.rehearse else 4
    config = SamplingConfig(2 if settings.rehearse else 12)

    def sample_latents(numbers: range) -> torch.Tensor:
        return model.sample_latents(numbers, 0, 1.0, "flow", config, batch)

    with exclusive_device(settings), autocast(settings):
        sample_images(model, sample_latents, batch, batch, 0, compiled=not settings.rehearse)
        begin = time.perf_counter()
        sample_images(model, sample_latents, rounds * batch, batch, 0)  # already compiled
        speed = rounds * batch / (time.perf_counter() - begin)
    return f"{config.steps} steps of the flow, batches of {batch}", {"images_per_second": speed}


def encoding(settings: Settings) -> Result:
    """Measures encoding from shards of images to shards of latents."""
    model, shards = build_untrained(settings), ShardSet.open(str(settings.shards))
    with exclusive_device(settings), autocast(settings):
        for split in ("test", "unlabeled"):  # the first compiles
            part = shards.select(split)
            begin = time.perf_counter()
            out = settings.scratch / f"latents_{split}"
            encode_shards(model, part, out, 256, {}, ["train"], compiled=not settings.rehearse)
            speed = len(part) / (time.perf_counter() - begin)
    return f"{len(part):,} images, from shards to shards", {"images_per_second": speed}


def evaluation(settings: Settings) -> Result:
    """Measures the time of an evaluation and a checkpoint, and the fraction of a run spent in evaluations."""
    config = configuration(settings, "stl10", 256, f"--run={settings.scratch / 'evaluation'}", "--evaluate.early=false")
    interval = config.evaluate.every
    config.evaluate.every = config.checkpoint.every = config.train.images = NEVER
    if settings.rehearse:
        config.evaluate.images, config.evaluate.prior_fit_images = 16, 16
    trainer, repeats = Trainer(config), 2 if settings.rehearse else 30
    with exclusive_device(settings), closing(trainer.batches()) as batches, trainer.progress_bar():
        trainer.start_interval()
        quality.time_steps(trainer, batches, 3)
        step_seconds = quality.time_steps(trainer, batches, repeats) / repeats
        durations = {}
        for name, section in (("evaluation", config.evaluate), ("checkpoint", config.checkpoint)):
            section.every = 1  # due after each step
            quality.time_steps(trainer, batches, 1)  # warm-up
            trainer.writer.wait()
            durations[name] = max(0.0, quality.time_steps(trainer, batches, 1) - step_seconds)
            section.every = NEVER
        trainer.writer.wait()
    size = config.train.global_batch_size
    values: dict[str, Any] = {f"{name}_seconds": duration for name, duration in durations.items()}
    for gpus in (1, 8):  # an upper bound for 8, since evaluation is distributed
        training = interval / size * step_seconds / gpus
        values[f"share_{gpus}_gpu"] = durations["evaluation"] / (durations["evaluation"] + training)
    summary = f"{durations['evaluation']:.2f} s, a checkpoint with its mixture {durations['checkpoint']:.2f} s; "
    summary += f"evaluation takes {values['share_1_gpu']:.2%} of a run on 1 GPU, at most {values['share_8_gpu']:.2%} on 8"
    return summary, values


def compilation(settings: Settings) -> Result:
    """Measures the start-up of a VAE and its flow until the first steps. The quality stage reuses the compiled code."""
    seconds = {}
    for name in (quality.VAE, quality.FLOW):
        words = [*quality.options(name, settings, "compiled"), "--evaluate.images=64", "--evaluate.prior_fit_images=64"]
        begin = time.perf_counter()
        with exclusive_device(settings):
            trainer = Trainer(parse(words)[0])
            trainer.config.train.images = 2 * trainer.config.train.global_batch_size
            trainer.run()
        seconds[name] = time.perf_counter() - begin
        reset_state()
    return ", ".join(f"{name} {duration:.0f} s" for name, duration in seconds.items()), {"seconds": seconds}


KL = ["--model.preset=kl", "--optimizer.lr=0.0001"]
# In order of importance, since the last ones may be skipped for lack of time. The first ones, which are compiled at the same
# time, differ in their graphs; most of the later ones find their code in the cache.
MEASUREMENTS: dict[str, Callable[[Settings], Result]] = {
    "step, stl10, 256 images": partial(step, "stl10", 256),
    "step, stl10_prior, 256 images": flow_step,
    "loops of others, kl, 64 images": lambda settings: peers("kl", 64, "diffusers", settings, *KL),
    "step, stl10_large, 256 images": partial(step, "stl10_large", 256),
    "start and compilation": compilation,
    "step, stl10, 32 images": partial(step, "stl10", 32),
    "CUDA graphs, stl10, 32 images": partial(cuda_graphs, partial(step, "stl10", 32)),
    "trainer, stl10, 256 images": trainer,
    "CUDA graphs, stl10_prior, 256 images": partial(cuda_graphs, flow_step),
    "CUDA graphs, stl10, 256 images": partial(cuda_graphs, partial(step, "stl10", 256)),
    "loops of others, stl10, 256 images": partial(peers, "stl10", 256, "torch,notebook"),
    "sampling": sampling,
    "evaluation": evaluation,
    "parts of a step, stl10, 256 images": parts,
    "encoding": encoding,
    "torch's GroupNorm, stl10, 256 images": torch_group_norm,
    "no cudnn.benchmark, stl10, 256 images": without_cudnn_benchmark,
    "step, stl10_large, 32 images": partial(step, "stl10_large", 32),
}

if __name__ == "__main__":
    serve(MEASUREMENTS, "measured")
