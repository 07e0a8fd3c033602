"""Builds the components of a training run from its configuration."""

import math
import warnings
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from vae_scale.config.options import Config
from vae_scale.data.cache import Cache
from vae_scale.data.shards import ShardSet
from vae_scale.data.stream import Stream
from vae_scale.errors import UserError
from vae_scale.runtime import compiling, sharding
from vae_scale.runtime.batch_size import find_batch_size
from vae_scale.runtime.distributed import DistContext
from vae_scale.runtime.launching import resolve_precision
from vae_scale.tracking.terminal import Terminal
from vae_scale.tracking.tracker import Tracker
from vae_scale.training.objectives import Objective
from vae_scale.training.stages import Stage, trainable_parameters


def open_datasets(config: Config, terminal: Terminal) -> tuple[ShardSet, ShardSet]:
    """Returns the training images and the held-out images."""
    cache = Cache.from_options(config.data.cache_dir, config.data.cache_size_gib)
    shards = ShardSet.open(config.data.shards, cache, on_bad_shard=config.data.on_bad_shard)
    train_set, test_set = shards.select(*config.data.train_splits), shards.select(config.data.test)
    splits = ", ".join(f"{name} {count:,}" for name, count in train_set.splits.items())
    terminal.print_message(f"training on {splits}; {len(test_set):,} images of {config.data.test} held out")
    if not shards.is_local:
        terminal.print_message(
            f"fetching shards from {shards.location}; the first step starts after the first shards have arrived"
        )
    return train_set, test_set


def largest_batch_size(config: Config, stage: Stage, train_set: ShardSet, accelerator: Accelerator, dist: DistContext) -> int:
    """Returns the largest global batch size that fits into memory."""
    objective = compile_objective(stage.objective, config, stage.device)

    def loss_fn(count: int) -> Tensor:
        images = torch.zeros(count, *train_set.image_shape, dtype=torch.uint8, device=stage.device)
        random_inputs = stage.add_row_inputs(stage.random_inputs(0, count), np.zeros(count, np.int64))
        with accelerator.autocast():
            loss: Tensor = objective(images, random_inputs)[0]
        return loss

    num_microbatches = dist.world_size * config.train.gradient_accumulation_steps
    parameters = [parameter for _, parameter in trainable_parameters(stage.model)]
    multiple = math.lcm(num_microbatches, config.data.streams)
    return find_batch_size(loss_fn, parameters, stage.device, multiple, len(train_set), num_microbatches, dist)


def wrap_objective(objective: Objective, config: Config, accelerator: Accelerator, device: torch.device) -> Any:
    """Returns the objective wrapped in DDP or FSDP2."""
    if sharding.fsdp_enabled():
        return sharding.apply_fsdp(objective, device, accelerator.num_processes, config.train.grad_reduce_dtype)
    with warnings.catch_warnings():  # Accelerate passes broadcast_buffers, which newer versions of torch rename
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return accelerator.prepare(objective)


def compile_objective(objective: Any, config: Config, device: torch.device) -> Any:
    """Returns the objective compiled according to `train.compile`."""
    mode, is_gpu = config.train.compile, device.type == "cuda"
    if mode == "cuda_graphs" and (not is_gpu or sharding.fsdp_enabled()):
        raise UserError("train.compile cuda_graphs requires a GPU and unsharded weights; use train.compile on")
    if mode == "off" or (mode == "auto" and not is_gpu):
        return objective
    return compiling.compile_function(objective, cuda_graphs=mode == "cuda_graphs")


def build_stream(
    config: Config, train_set: ShardSet, dist: DistContext, device: torch.device, images_seen: int, window: int
) -> Stream:
    """Returns the stream of this process's part of each global batch, starting after `images_seen` images."""
    return Stream(
        train_set,
        config.train.global_batch_size,
        config.seed,
        dist.rank,
        dist.world_size,
        device,
        images_seen,
        window,
        config.data.prefetch_batches,
        config.data.cache,
        config.data.streams,
    )


def create_tracker(
    config: Config, stage: Stage, images_seen: int, run_id: str | None, metadata: dict[str, Any], terminal: Terminal
) -> Tracker:
    """Returns the tracker of rank 0, after logging the start of the run."""
    parameters = sum(parameter.numel() for parameter in stage.model.parameters())
    tracker = Tracker(config, images_seen, run_id, metadata | {"parameters": parameters}, terminal)
    kind = "resumed" if images_seen else "started"
    precision, batch_size = resolve_precision(config.train.precision), config.train.global_batch_size
    text = f"{parameters:,} parameters, {metadata['world_size']} x {stage.device.type}, {precision}, batches of {batch_size:,}"
    tracker.log_event(images_seen, kind, f"{kind}: {text}")
    return tracker
