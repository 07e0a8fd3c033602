"""Initializes the process group, the device and the precision."""

import argparse
import contextlib
import ctypes
import os
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)

from vae_scale.config.options import TrainConfig
from vae_scale.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
MAX_COMPILE_SKEW = 1800.0  # seconds between the first and the last rank that finishes compilation
LAUNCHER_NAMES = ("accelerate", "accelerate-launch", "accelerate.commands.launch")


def create_accelerator(config: TrainConfig) -> Accelerator:
    """Initializes the process group and sets device and precision.

    Raises:
        UserError: if the launcher started fewer processes than requested, or the device does not support the precision.
    """
    use_gpu = _use_gpu()
    if config.precision == "fp16" and not use_gpu:
        raise UserError("train.precision fp16 requires a GPU; use bf16 or fp32")
    precision = resolve_precision(config.precision)
    if use_gpu:
        torch.backends.cudnn.benchmark = True  # shapes are static
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
    else:
        tune_malloc()
    hook = DDPCommunicationHookType.BF16 if config.grad_reduce_dtype == "bf16" else DDPCommunicationHookType.NO
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False, comm_hook=hook)
    # Longer than the timeout of the watchdog, which names the faulty rank and does not count compilation.
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=max(1.5 * config.timeout, MAX_COMPILE_SKEW)))
    mixed_precision = precision if precision in ("bf16", "fp16") else "no"
    accelerator = Accelerator(cpu=not use_gpu, mixed_precision=mixed_precision, kwargs_handlers=[ddp, group])
    expected = max(int(os.environ.get("WORLD_SIZE", 1)), _requested_processes())
    if accelerator.num_processes != expected:
        raise UserError(
            f"{expected} processes were requested, but accelerate launch started {accelerator.num_processes}; on "
            "CPUs use `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_machines 1 --num_processes "
            f"{expected} ...` (--cpu silently starts a single process)"
        )
    return accelerator


def get_device(accelerator: Accelerator) -> torch.device:
    """Returns the device of this rank with its index, which Accelerate omits for a single GPU."""
    device: torch.device = accelerator.device
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device


def tune_malloc() -> None:
    """Makes glibc reuse the memory of a step in the next one instead of returning it to the system.

    A step of configs/demo.yaml takes 1.2 times as long without it (measured on two cores).
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the maximum


def _use_gpu() -> bool:
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def resolve_precision(precision: str) -> str:
    """Resolves `auto` for this machine: bf16 if the hardware supports it, else fp16 on a GPU and fp32 on a CPU.

    CPUs without bf16 instructions emulate them, ten times slower than fp32.
    """
    if precision != "auto":
        return precision
    if _use_gpu():
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def _requested_processes() -> int:
    """Returns the number of processes requested from `accelerate launch`, the parent process; 1 without it."""
    # Without a GPU, the launcher may silently ignore the number, and no environment variable contains it.
    command: list[str] = []
    with contextlib.suppress(psutil.Error):
        command = psutil.Process(os.getppid()).cmdline()
    if not any(Path(argument).name in LAUNCHER_NAMES for argument in command):
        return 1
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int)
    parser.add_argument("--config_file", "--config-file", type=Path)
    options, _ = parser.parse_known_args(command)
    if options.num_processes is None and options.config_file:
        return int(yaml.safe_load(options.config_file.read_text()).get("num_processes", 1))
    return options.num_processes or 1
