"""Collects hardware information, measures hardware limits and creates synthetic images."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from processes import Settings, serve

from vae_scale.benchmark import measuring
from vae_scale.data.images import Images
from vae_scale.pack import main as pack

sys.path.append(str(Path(__file__).parents[1]))
from stl10_binaries import write_binaries

QUERY = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit", "memory.total")
OPTIONAL = ("wandb", "webdataset", "diffusers", "efficientnet_lite_pytorch", "plotly")
CHUNK = 500  # images


def hardware(settings: Settings) -> tuple[str, dict[str, Any]]:
    """Returns GPU, driver, clocks, versions, memory and cores."""
    values: dict[str, Any] = dict(measuring.machine())
    values |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "memory": psutil.virtual_memory().total}
    values["packages"] = [name for name in OPTIONAL if importlib.util.find_spec(name)]
    try:
        command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
        line = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
        values |= dict(zip(QUERY, (value.strip() for value in line.split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        pass  # nvidia-smi is not available in every container
    names = {"torch": "torch", "CUDA": "cuda", "cuDNN": "cudnn", "driver": "driver_version"}
    summary = {name: values.get(key) for name, key in names.items()}
    clocks = f", {values['clocks.sm']} of {values['clocks.max.sm']}, {values['power.limit']}" if "clocks.sm" in values else ""
    versions = ", ".join(f"{name} {value}" for name, value in summary.items() if value)
    memory = f"{values['memory'] / 2**30:.0f} GiB"
    return f"{values.get('gpu', 'no GPU')}{clocks}; {versions}; {values['cpu']}, {values['cores']} cores, {memory}", values


def limits(settings: Settings) -> tuple[str, dict[str, Any]]:
    """Measures the throughput of matrix products in bf16 and of copies."""
    device, size = torch.device("cuda"), 2**30  # bytes
    if settings.rehearse:
        device, size, measuring.SIDES = torch.device("cpu"), 2**24, {"cpu": 256}
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, flops = torch.empty_like(source), measuring.peak_flops(device, torch.bfloat16)
    speed = 2 * size / min(measuring.time_call(lambda: target.copy_(source), device) for _ in range(measuring.PRODUCTS))
    return f"{flops / 1e12:,.1f} TFLOP/s in bf16, copies at {speed / 1e9:,.0f} GB/s", {"flops": flops, "bytes": speed}


def synthetic_images(settings: Settings) -> tuple[str, dict[str, Any]]:
    """Packs synthetic images of 96x96 pixels."""
    counts = {"train": 64, "unlabeled": 64, "test": 64}
    if not settings.rehearse:
        counts = {"train": 2000, "unlabeled": 8000, "test": 2000}
    binaries = settings.scratch / "stl10_binary"
    splits = {name: generate_images(count, seed) for seed, (name, count) in enumerate(counts.items())}
    write_binaries(binaries, splits, [str(number) for number in range(10)])
    pack(["--source=stl10", f"--data={binaries}", f"--out={settings.shards}", f"--workers={min(8, os.cpu_count() or 1)}"])
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()), counts


def generate_images(count: int, seed: int) -> tuple[Images, list[int]]:
    """Returns images of discs on gradients, uint8 [count, 96, 96, 3], and their labels."""
    generator = np.random.default_rng(seed)
    y, x = (np.mgrid[0:96, 0:96] / 95).astype(np.float32)
    images = np.empty((count, 96, 96, 3), np.uint8)
    for start in range(0, count, CHUNK):
        chunk = min(CHUNK, count - start)
        first, last, disc = generator.uniform(0, 255, (3, chunk, 1, 1, 3)).astype(np.float32)
        center_x, center_y, radius = generator.uniform(0.2, 0.8, (3, chunk, 1, 1)).astype(np.float32)
        inside = (x - center_x) ** 2 + (y - center_y) ** 2 < (0.4 * radius) ** 2
        images[start : start + chunk] = np.where(inside[..., None], disc, first + (last - first) * x[..., None])
    return images, [number % 10 for number in range(count)]


FACTS: dict[str, Callable[[Settings], tuple[str, dict[str, Any]]]] = {
    "synthetic images": synthetic_images,
    "hardware": hardware,
    "limits": limits,
}

if __name__ == "__main__":
    serve(FACTS, "passed")
