"""Saving the state of a training run, and resuming from its newest checkpoint."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from vae_scale.config.options import Config, to_dict
from vae_scale.config.parsing import check_batch_size
from vae_scale.data.shards import ShardSet
from vae_scale.errors import UserError, one_line
from vae_scale.models.pretrained import GUIDE
from vae_scale.models.vae import VAE
from vae_scale.runtime import checkpoint
from vae_scale.runtime.consistency import check_identical_weights, combine_fingerprints, fingerprint
from vae_scale.runtime.run_lock import diff_config
from vae_scale.runtime.sharding import full_tensor
from vae_scale.tracking.terminal import Terminal
from vae_scale.training.ema import EMA
from vae_scale.training.stages import trainable_parameters

NamedTensors = Iterator[tuple[str, Tensor]]

NEW_RUN: dict[str, Any] = {"images_seen": 0, "shuffle_window": None, "wandb_id": None, "metric_sums": {}}


def resume(
    config: Config, accelerator: Accelerator, model: VAE, ema: EMA, train_set: ShardSet, terminal: Terminal
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Loads the newest valid checkpoint, if any, into the model, its average and the loss scaler. All processes must call it.

    A batch size of "auto" is replaced by the batch size of the checkpoint.

    Returns:
        The content of its state.json, or `NEW_RUN`, and the tensors of the optimizer, which are empty for a new run.

    Raises:
        UserError: if the checkpoint was trained on other shards, with another network, or with other values of options that
            cannot change.
    """
    newest = checkpoint.newest_checkpoint(config.run_dir) if accelerator.is_main_process else None
    # Rank 0 decides, so that all processes resume from the same checkpoint.
    images = torch.tensor(-1 if newest is None else checkpoint.images_seen_at(newest), device=accelerator.device)
    images_seen = int(broadcast(images))
    if images_seen < 0:
        return NEW_RUN, {}
    folder = checkpoint.checkpoint_folder(config.run_dir, images_seen)
    names = ["model", "ema", "optimizer", *(["guide"] if (folder / GUIDE).is_file() else [])]
    state, tensors = checkpoint.load_checkpoint(folder, *names)
    if config.train.batch_size == "auto":
        config.train.batch_size = state["config"]["train"]["batch_size"]
        check_batch_size(config, accelerator.num_processes)
    changes = diff_config(state["config"], to_dict(config), folder)
    if state["shards"] != train_set.fingerprint:
        raise UserError(f"{folder}: was trained on other shards than {train_set.location}; choose another --run")
    if mismatch := checkpoint.first_mismatch(trainable_parameters(model), tensors["optimizer"]):
        raise UserError(
            f"{folder}: optimizer.safetensors has no matching {mismatch}; delete the checkpoint to use the previous one"
        )
    try:
        model.load_state_dict(tensors["model"])
        ema.model.load_state_dict(tensors["ema"])
        ema.model.guide = tensors.get("guide")
        ema.model.load_guide()  # checks the shapes
    except RuntimeError as error:
        raise UserError(
            f"{folder}: does not match this network ({one_line(error):.200}); delete it to use the previous one"
        ) from None
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    terminal.print_message(f"resuming {config.run_dir} at {images_seen:,} images")
    if changes:
        terminal.print_message(f"resuming with {', '.join(changes)}")
    return state, tensors["optimizer"]


def save(
    writer: checkpoint.CheckpointWriter,
    images_seen: int,
    model: VAE,
    tensors: dict[str, NamedTensors],
    state: dict[str, Any],
    accelerator: Accelerator,
) -> None:
    """Writes a checkpoint in the background, after checking that all processes have the same weights.

    All processes must call it.

    Args:
        writer: Writer of rank 0.
        images_seen: Images seen so far.
        model: The model.
        tensors: Named tensors by file, in addition to those of the model. Sharded tensors are gathered one at a time.
        state: Values for state.json.
        accelerator: The accelerator of this process.
    """
    fingerprints: list[Tensor] = []
    tensors = {"model": _gathered(model, fingerprints), **tensors}
    if accelerator.is_main_process:
        writer.stage(tensors)
    else:
        for _, tensor in itertools.chain.from_iterable(tensors.values()):
            full_tensor(tensor)
    all_fingerprints = accelerator.gather(combine_fingerprints(fingerprints)[None])
    check_identical_weights(all_fingerprints, images_seen)
    if accelerator.is_main_process:
        writer.write(images_seen, state | {"fingerprints": all_fingerprints.tolist()}, model.to_config())


def _gathered(model: nn.Module, fingerprints: list[Tensor]) -> NamedTensors:
    """Yields the full tensors of a model and appends their fingerprints."""
    for name, value in model.state_dict().items():
        tensor = full_tensor(value)
        fingerprints.append(fingerprint(tensor))
        yield name, tensor
