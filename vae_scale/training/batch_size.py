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

FEW = 8  # images, from which on a GPU's memory grows evenly with them
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "can't allocate memory")  # CUDA and its libraries; cuDNN and cuBLAS; the host

Loss = Callable[[int], Tensor]


def largest_batch(
    stage: Stage,
    objective: Callable[..., tuple[Tensor, Tensor]],
    image_shape: tuple[int, int, int],
    unit: int,
    most: int,
    pieces: int,
    autocast: Callable[[], AbstractContextManager[None]],
    processes: Processes,
) -> int:
    """The largest batch whose pieces fit everywhere: `unit` times a power of two. Nothing is trained.

    On a GPU, the memory of two small batches tells how many images fit, and that many are tried. On a CPU, where trying would
    end the process, memory is counted instead. All processes must call it, and learn the same.

    Args:
        stage: What is to be trained.
        objective: Its objective, compiled if training is: compiled code keeps a fraction of the memory.
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
            return objective(images, draws, *stage.arguments(0))[0]

    moments = sum(2 * 4 * parameter.numel() for _, parameter in trained(stage.model))  # bytes; they are not there yet
    sizes = [unit]
    while 2 * sizes[-1] <= most:
        sizes.append(2 * sizes[-1])
    counts = [math.ceil(size / pieces) for size in sizes]
    fits = _on_gpu(stage, loss, moments, counts) if stage.device.type == "cuda" else _on_host(loss, moments)
    batch = max((size for size, count in zip(sizes, counts, strict=True) if fits(count)), default=0)
    agreed = int(processes.gather(torch.tensor([batch], device=stage.device)).min())
    if not agreed:
        raise UserError(f"train.batch_size auto: not even {unit} images fit; raise train.accumulation, or take a smaller model")
    return agreed


def _on_gpu(stage: Stage, loss: Loss, moments: int, counts: list[int]) -> Callable[[int], bool]:
    """Whether some images can be trained on, by what two small batches take; the largest that should fit is tried."""
    device = stage.device

    def peak(count: int) -> int:
        """Bytes of a forward and a backward pass, the second time: in the first, cuDNN tries its algorithms."""
        try:
            for _ in range(2):
                torch.cuda.reset_peak_memory_stats(device)
                loss(count).backward()
                stage.model.zero_grad(set_to_none=True)
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device)
        finally:
            stage.model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()

    def can_train(count: int) -> bool:
        torch.cuda.set_per_process_memory_fraction(OF_GPU, device)
        try:
            taken = torch.empty(moments, dtype=torch.uint8, device=device)
            peak(count)
            return taken.numel() == moments
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)

    few = next((count for count in counts if count >= FEW), counts[-1])
    most = largest_fitting(counts, can_train, peak, few, OF_GPU * _available(device) - moments)
    return lambda count: count <= most


def _available(device: torch.device) -> int:
    """Bytes that this process has and could get."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def largest_fitting(
    counts: list[int], can_train: Callable[[int], bool], peak: Callable[[int], int], few: int, available: float
) -> int:
    """The largest of some numbers of images that can be trained on, 0 if there is none.

    Args:
        counts: Numbers of images, ascending.
        can_train: Whether so many can be trained on, by trying.
        peak: Bytes that so many take; asked for `few` and for twice as many.
        few: Images of the first trial.
        available: Bytes that there are.
    """
    possible = counts
    if can_train(few) and can_train(2 * few):
        first, second = peak(few), peak(2 * few)
        of_one = max(1.0, (second - first) / few)
        possible = [count for count in counts if second + (count - 2 * few) * of_one <= available]
    return next((count for count in reversed(possible) if can_train(count)), 0)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory could not be had, whichever library says so."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


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
