"""`train.batch_size auto`: the largest batch that fits into the memory of every process."""

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from vae_scale.errors import UserError
from vae_scale.training.evaluation import Processes
from vae_scale.training.stages import Stage, trained

OF_GPU = 0.9  # share of a GPU's memory that is taken: some lies in fragments, and communication needs some
OF_HOST = 0.5  # share of the host's free memory
BACKWARD = 2.5  # what a backward pass needs in all, as a multiple of what the forward pass left for it: 1.2 to 2.1 were seen

Loss = Callable[[int], Tensor]


def largest_batch(
    stage: Stage,
    image_shape: tuple[int, int, int],
    unit: int,
    most: int,
    pieces: int,
    autocast: Callable[[], AbstractContextManager[None]],
    processes: Processes,
) -> int:
    """The largest batch whose pieces fit everywhere: `unit` times a power of two. Nothing is trained.

    A GPU is tried until its memory is full. On a CPU, where that would end the process, memory is counted instead. All
    processes must call it, and learn the same.

    Args:
        stage: What is to be trained.
        image_shape: (H, W, 3).
        unit: What the batch must be a multiple of, in images.
        most: Images of a batch, at most.
        pieces: In which all processes together take a batch.
        autocast: Of the training.
        processes: Those that share a batch.

    Raises:
        UserError: not even `unit` images fit.
    """

    def loss(count: int) -> Tensor:
        images = torch.zeros(count, *image_shape, dtype=torch.uint8, device=stage.device)
        draws = stage.labelled(stage.draws(0, count), np.zeros(count, np.int64))
        with autocast():
            return stage.objective(images, draws, *stage.arguments(0))[0]

    moments = sum(2 * 4 * parameter.numel() for _, parameter in trained(stage.model))  # bytes; they are not there yet
    fits = _on_gpu(stage, loss, moments) if stage.device.type == "cuda" else _on_host(loss, moments)
    batch = 0
    while (following := max(unit, 2 * batch)) <= max(unit, most) and fits(math.ceil(following / pieces)):
        batch = following
    agreed = int(processes.gather(torch.tensor([batch], device=stage.device)).min())
    if not agreed:
        raise UserError(f"train.batch_size auto: not even {unit} images fit; raise train.accumulation, or take a smaller model")
    return agreed


def _on_gpu(stage: Stage, loss: Loss, moments: int) -> Callable[[int], bool]:
    """Whether some images can be trained on, found by trying."""

    def fits(count: int) -> bool:
        torch.cuda.set_per_process_memory_fraction(OF_GPU, stage.device)
        try:
            taken = torch.empty(moments, dtype=torch.uint8, device=stage.device)
            loss(count).backward()
            torch.cuda.synchronize(stage.device)
            return taken.numel() == moments
        except torch.OutOfMemoryError:
            return False
        finally:
            stage.model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0, stage.device)

    return fits


def _on_host(loss: Loss, moments: int) -> Callable[[int], bool]:
    """Whether some images can be trained on, by what two of them leave for the backward pass."""
    free = OF_HOST * psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    of_one = (_kept(loss, 4) - _kept(loss, 2)) / 2
    return lambda count: moments + BACKWARD * of_one * count <= free


def _kept(loss: Loss, count: int) -> int:
    """Bytes that the forward pass of some images leaves for the backward pass, the weights among them."""
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss(count)
    return sum(storage.nbytes() for storage in storages.values())
