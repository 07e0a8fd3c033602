"""Trains a VAE and its flow for the remaining time, and writes samples, metrics and a report."""

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from processes import Entry, Record, Runner, Settings, Task, serve

if TYPE_CHECKING:
    from vae_scale.data.stream import Batch
    from vae_scale.training.trainer import Trainer

PROGRAM = str(Path(__file__).resolve())
PLAN = "quality.json"  # file in the scratch folder with the settings of the tasks
NEVER = 10**9  # images
VAE, FLOW, METRICS, SAMPLES, NEIGHBOURS = "VAE", "flow", "metrics", "samples.png", "neighbours.png"
RESERVE = 60.0  # seconds for images and metrics after training
START, TAIL = 50.0, 6.0  # seconds before the first step, mostly for compilation, and after the last step
LATE, SAVING, LEAST = 4.0, 8.0, 60.0  # seconds until SIGTERM, from SIGTERM to SIGKILL, and required to start training
VAE_FRACTION = 0.25  # of the time for training steps
CALIBRATION = 2.0  # seconds of steps from which the number of images is computed
AVERAGED = 0.1  # fraction of the steps over which the weights are averaged
NUM_SAMPLES, SHOWN, NEAREST, COMPARED_SIDE = 64, 16, 5, 16
SHOWN_METRICS = {
    "psnr": "PSNR {:.2f} dB",
    "bits_per_dim": "{:.3f} bits/dim",
    "ssim": "SSIM {:.3f}",
    "velocity_error": "velocity error {:.4f}",
    "reconstruction_frechet_distance": "Frechet distance (EfficientNet-Lite0) of reconstructions {:.1f}",
    "frechet_distance": "of samples {:.1f}",
    "recall": "recall {:.2f}",
}
CONFIGS = {VAE: "gpu.yaml", FLOW: "gpu_prior.yaml"}
FEW_IMAGES = ["--evaluate.prior_fit_images=2000", "--evaluate.images=1000"]
TINY = ["--train.batch_size=8", "--optimizer.warmup_images=64", "--evaluate.prior_fit_images=32", "--evaluate.images=32"]


def run(runner: Runner, out: Path, deadline: float, record: Record) -> None:
    """Trains a VAE for a quarter of the time until `deadline` (`time.monotonic`), and its flow for the rest; writes images."""
    settings, left = runner.settings, deadline - time.monotonic() - RESERVE
    late, least, overhead = LATE, LEAST, START + TAIL
    if settings.rehearse:
        left, late, least, overhead = min(left, 14.0), 90.0, 0.0, 6.0  # a busy CPU may be late
    vae = overhead + VAE_FRACTION * max(0.0, left - 2 * overhead)
    plan = {"out": str(out), "ends": {VAE: time.time() + vae, FLOW: time.time() + left}}
    (settings.scratch / PLAN).write_text(json.dumps(plan))
    task = Task([VAE, FLOW], [sys.executable, PROGRAM, VAE, FLOW], left + late, least)
    runner.run(task, 4, min(deadline, time.monotonic() + left + late + SAVING + 1), record, SAVING)
    trained = trained_runs(settings)
    if not trained:
        return

    model, report = [f"--run={trained[-1]}"], settings.scratch / "metrics.json"
    features = "efficientnet_lite0" if has("efficientnet_lite_pytorch") and not settings.rehearse else "none"
    metrics = ["--images=2000", "--importance-samples=0", "--batch-size=250", f"--features={features}", f"--json={report}"]
    commands = {
        METRICS: ["evaluate", *model, *metrics],
        "reconstructions.png": ["sample", *model, "--num=32", "--reconstruct", f"--out={out / 'reconstructions.png'}"],
    }
    if has("plotly") and has("jinja2"):
        commands["report.html"] = ["report", *trained, f"--out={out / 'report.html'}"]
    tasks = [
        Task([name], [sys.executable, "-m", f"vae_scale.{command}", *words], 60, writes_results=False)
        for name, (command, *words) in commands.items()
    ]
    tasks.insert(1, Task([SAMPLES, NEIGHBOURS], [sys.executable, PROGRAM, SAMPLES, NEIGHBOURS], 60))

    def record_metrics(entry: Entry) -> None:
        if entry.name == METRICS and entry.status == "passed":
            entry.values = json.loads(report.read_text())
            texts = [text.format(entry.values[name]) for name, text in SHOWN_METRICS.items() if name in entry.values]
            entry.detail = f"{', '.join(texts)}; {entry.values['images']:,} images of {entry.values['split']}"
        record(entry)

    runner.run_all(tasks, 2 if settings.rehearse else 4, deadline, record_metrics)


def trained_runs(settings: Settings) -> list[str]:
    """Returns the runs of this stage that have a checkpoint: the VAE, then its flow."""
    runs = [settings.scratch / f"quality_{name}" for name in (VAE, FLOW)]
    return [str(run) for run in runs if (run / "checkpoints").exists()]


def has(package: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(package) is not None


def options(name: str, settings: Settings, purpose: str = "quality") -> list[str]:
    """Returns the command line of a training run for the resolution of the shards."""
    from vae_scale.data.shards import ShardSet

    words = [f"--config=configs/{CONFIGS[name]}", f"--data.shards={settings.images}"]
    words += [f"--run={settings.scratch / f'{purpose}_{name}'}", "--track.tracker=none", "--log=json"]
    words += ["--evaluate.early=false", *(TINY if settings.rehearse else FEW_IMAGES)]
    words += [f"--{key}={NEVER}" for key in ("train.log_every", "train.images", "evaluate.every", "checkpoint.every")]
    if name == FLOW:
        words.append(f"--prior.vae={settings.scratch / f'{purpose}_{VAE}'}")
        return [*words, *(["--prior.width=32", "--prior.depth=1"] if settings.rehearse else [])]
    if settings.rehearse:
        return [*words, "--model.preset=tiny", "--model.width=16"]
    is_large = ShardSet.open(str(settings.images)).image_shape[0] > 64
    return [*words, *(["--model.channel_mult=[1, 2, 4]"] if is_large else [])]


def time_steps(trainer: "Trainer", batches: "Iterator[Batch]", steps: int) -> float:
    """Returns the duration of training steps in seconds."""
    from vae_scale.benchmark.measuring import time_call

    return time_call(lambda: [trainer.train_iteration(batch) for batch in islice(batches, steps)], trainer.device)


def train(name: str, settings: Settings) -> tuple[str, dict[str, Any]]:
    """Trains until the planned end, with the number of images estimated from the measured speed."""
    from vae_scale.config.parsing import parse
    from vae_scale.training.trainer import Trainer

    plan = json.loads((settings.scratch / PLAN).read_text())
    trainer = Trainer(parse(options(name, settings))[0])
    train, calibration = trainer.config.train, 0.5 if settings.rehearse else CALIBRATION
    with closing(trainer.batches()) as batches, trainer.progress_bar():
        time_steps(trainer, batches, 3)  # compiles
        steps = elapsed = 0.0
        while elapsed < calibration:
            elapsed += time_steps(trainer, batches, 5)
            steps += 5
    speed = steps / elapsed
    left = plan["ends"][name] - time.time() - (1.0 if settings.rehearse else TAIL)
    steps = max(1, int(0.95 * left * speed))
    train.images = trainer.images_seen + steps * train.global_batch_size
    trainer.ema.decay = 1 - 1 / max(10, AVERAGED * steps)
    train.log_every = 5 if settings.rehearse else 50
    begin = time.perf_counter()
    trainer.run()
    lines = [json.loads(line) for line in (trainer.config.run_dir / "metrics.jsonl").read_text().splitlines()]
    held_out = {key: value for line in lines for key, value in line.items() if key.startswith("eval/")}
    values = {key: value for key, value in held_out.items() if isinstance(value, float)}
    texts = [text.format(values[f"eval/{key}"]) for key, text in SHOWN_METRICS.items() if f"eval/{key}" in values]
    values |= {"images": trainer.images_seen, "images_per_second": speed * train.global_batch_size}
    elapsed = time.perf_counter() - begin
    summary = f"held out: {', '.join(texts)}" if texts else "stopped at its time limit, before the evaluation"
    return f"{trainer.images_seen:,} images in {elapsed:.0f} s after compilation; {summary}", values


def draw_samples(settings: Settings) -> tuple[str, dict[str, Any]]:
    """Draws samples, as a grid and as one file each."""
    from vae_scale import sample

    plan, run = json.loads((settings.scratch / PLAN).read_text()), trained_runs(settings)[-1]
    words = [f"--run={run}", f"--num={NUM_SAMPLES}", f"--save-images={settings.scratch / 'drawn'}"]
    sample.main([*words, f"--steps={2 if settings.rehearse else 12}", f"--out={Path(plan['out']) / SAMPLES}"])
    return f"{NUM_SAMPLES} samples, not selected", {}


def neighbours(settings: Settings) -> tuple[str, dict[str, Any]]:
    """Writes samples, each followed by its nearest training images in pixel space at low resolution."""
    import numpy as np
    import torch
    from PIL import Image
    from torch import Tensor
    from torch.nn.functional import interpolate

    from vae_scale.data.shards import ShardSet
    from vae_scale.evaluation.image_grids import save_grid

    plan = json.loads((settings.scratch / PLAN).read_text())
    device = "cpu" if settings.rehearse else "cuda"
    shards = ShardSet.open(str(settings.images))
    train_set = shards.select(*(name for name in ("train", "unlabeled") if name in shards.splits))
    samples = np.stack([np.asarray(Image.open(path)) for path in sorted((settings.scratch / "drawn").glob("*.png"))[:SHOWN]])

    def downscale(images: "np.ndarray[Any, Any]") -> Tensor:
        pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float()
        return interpolate(pixels, (COMPARED_SIDE, COMPARED_SIDE), mode="area").flatten(1)

    chunks = np.array_split(np.arange(len(train_set)), -(-len(train_set) // 4096))
    distances = torch.cdist(downscale(samples), torch.cat([downscale(train_set.load_images(rows)) for rows in chunks]))
    nearest = distances.topk(min(NEAREST, len(train_set)), largest=False).indices.cpu().numpy()
    rows = [np.concatenate([image[None], train_set.load_images(near)]) for image, near in zip(samples, nearest, strict=True)]
    save_grid(torch.from_numpy(np.concatenate(rows)), Path(plan["out"]) / NEIGHBOURS, nearest.shape[1] + 1)
    rms = float(distances.amin(1).mean()) / (3 * COMPARED_SIDE**2) ** 0.5
    return (
        f"nearest of {len(train_set):,} training images at {COMPARED_SIDE}x{COMPARED_SIDE} pixels, {rms:.1f} grey levels away",
        {},
    )


TASKS: dict[str, Callable[[Settings], tuple[str, dict[str, Any]]]] = {
    VAE: partial(train, VAE),
    FLOW: partial(train, FLOW),
    SAMPLES: draw_samples,
    NEIGHBOURS: neighbours,
}

if __name__ == "__main__":
    serve(TASKS, "passed")
