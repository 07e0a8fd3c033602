"""How this process was started: devices, precision, and a check that the launcher did what it was asked."""

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

from vae_scale.config import TrainConfig
from vae_scale.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
COMPILE_SECONDS = 1800.0  # between the first and the last process that has compiled, at most
LAUNCHER = "accelerate.commands.launch"  # what `accelerate launch` runs, and `python -m` can name


def start(config: TrainConfig) -> Accelerator:
    """The process group, device and precision of this run.

    Raises:
        UserError: the launcher was asked for more processes than it made, or the hardware lacks the precision.
    """
    gpu = _gpu()
    if config.precision == "fp16" and not gpu:
        raise UserError("train.precision fp16 needs a GPU; use bf16 or fp32")
    precision = resolve_precision(config.precision)
    if gpu:
        torch.backends.cudnn.benchmark = True  # shapes are constant, so the fastest algorithms are searched only once
        # tf32 for what is left in fp32, unless fp32 itself was asked for.
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
    else:
        keep_memory()
    hook = DDPCommunicationHookType.BF16 if config.exchange == "bf16" else DDPCommunicationHookType.NO
    # Buffers are computed alike by all processes.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False, comm_hook=hook)
    # Longer than the watch waits, which names the process that is behind, and which waits for a process that compiles.
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=max(1.5 * config.timeout, COMPILE_SECONDS)))
    mixed = precision if precision in ("bf16", "fp16") else "no"
    accelerator = Accelerator(cpu=not gpu, mixed_precision=mixed, kwargs_handlers=[ddp, group])
    expected = max(int(os.environ.get("WORLD_SIZE", 1)), asked_of_launcher())
    if accelerator.num_processes != expected:
        raise UserError(
            f"accelerate launch was asked for {expected} processes but this is one of {accelerator.num_processes}; on "
            "CPUs use `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_machines 1 --num_processes "
            f"{expected} ...` (--cpu silently starts a single process)"
        )
    return accelerator


def device_of(accelerator: Accelerator) -> torch.device:
    """The device of this process, with its index, which Accelerate leaves out for a single GPU."""
    device: torch.device = accelerator.device
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device


def keep_memory() -> None:
    """Has glibc keep the memory of a step for the next one, where it would give it back and get other, page by page, zeroed.

    A step of configs/demo.yaml takes 1.2 times as long without (measured on two cores).
    """
    with contextlib.suppress(OSError, AttributeError):  # other systems have other libraries
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most it takes


def _gpu() -> bool:
    """Whether this run is on a GPU: there is one, and the launcher was not told to leave it."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def resolve_precision(wanted: str) -> str:
    """The precision that `auto` stands for on this machine: bf16 where the hardware multiplies it, else fp32.

    CPUs without bf16 instructions emulate them, ten times slower than fp32.
    """
    if wanted != "auto":
        return wanted
    if _gpu():
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bf16" if any(getattr(torch.cpu, check, lambda: False)() for check in checks) else "fp32"


def asked_of_launcher() -> int:
    """Processes that the `accelerate launch` above this process was asked for; 1 where there is none.

    Without a GPU it can drop the number without a word, and nothing in the environment tells.
    """
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return 1
    launchers = [place for place, word in enumerate(words) if Path(word).name in ("accelerate", "accelerate-launch", LAUNCHER)]
    if not launchers:
        return 1
    options = _options(words[launchers[0] + 1 :])
    if "num_processes" in options:
        return int(options["num_processes"])
    if "config_file" in options:
        try:
            content = yaml.safe_load(Path(options["config_file"]).read_text())
            return int(content.get("num_processes", 1))
        except (OSError, yaml.YAMLError, AttributeError, TypeError, ValueError):
            return 1
    return 1


def _options(words: list[str]) -> dict[str, str]:
    """The launcher's own options, as far as they stand before the program it launches."""
    options: dict[str, str] = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word in ("-m", "--module") or word.endswith(".py"):
            break
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            options[name.replace("-", "_")] = value or following
    return options
