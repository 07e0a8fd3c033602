"""`train.batch_size auto`: finds the largest batch size that fits into memory on all ranks."""

import math
import os
from collections.abc import Callable, Iterable

import psutil
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Parameter

from vae_scale.errors import UserError
from vae_scale.runtime.distributed import DistContext

GPU_MEMORY_FRACTION = 0.9  # the rest is for fragmentation and communication buffers
HOST_MEMORY_FRACTION = 0.5  # of the available memory
BACKWARD_FACTOR = 2.5  # peak memory of a backward pass over the size of the saved tensors; measured: 1.2 to 2.1
OUT_OF_MEMORY_MESSAGES = ("out of memory", "ALLOC_FAILED", "can't allocate memory")  # CUDA; cuDNN and cuBLAS; the host


def find_batch_size(
    loss_fn: Callable[[int], Tensor],
    parameters: Iterable[Parameter],
    device: torch.device,
    multiple: int,
    max_batch_size: int,
    num_microbatches: int,
    dist: DistContext,
) -> int:
    """Returns the largest global batch size that fits on all ranks: `multiple` times a power of two. All ranks must call it.

    Memory is estimated from the tensors saved for the backward pass. On a GPU, sizes for which these fit are tried, largest
    first. On a CPU, where running out of memory would kill the process, the estimate has a margin instead.

    Args:
        loss_fn: Returns the loss of a given number of images, compiled if training is compiled.
        parameters: The trainable parameters.
        device: The device of the parameters.
        multiple: Divides the result, in images.
        max_batch_size: Maximum global batch size, in images.
        num_microbatches: Number of microbatches per global batch, over all ranks.
        dist: The ranks that share the batch.

    Raises:
        UserError: if not even `multiple` images fit.
    """
    parameters = list(parameters)
    optimizer_bytes = sum(2 * 4 * parameter.numel() for parameter in parameters)  # not allocated yet
    on_gpu = device.type == "cuda"

    def fits(images: int) -> bool:
        """Returns whether a forward and backward pass fits into memory."""
        try:
            loss_fn(images).backward()
            return True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            for parameter in parameters:
                parameter.grad = None
            if on_gpu:
                torch.cuda.empty_cache()

    if on_gpu:
        free, total = torch.cuda.mem_get_info(device)
        limit = GPU_MEMORY_FRACTION * (free + torch.cuda.memory_reserved(device)) - optimizer_bytes
        torch.cuda.set_per_process_memory_fraction(max(0.0, limit / total), device)
        available = limit - torch.cuda.memory_allocated(device)
    else:
        host_bytes = psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        available = (HOST_MEMORY_FRACTION * host_bytes - optimizer_bytes) / BACKWARD_FACTOR
    max_images = available / max(1, _saved_bytes(fits, 2) - _saved_bytes(fits, 1))
    batch_size = multiple
    while 2 * batch_size <= max_batch_size:
        batch_size *= 2
    while batch_size >= multiple:
        images = math.ceil(batch_size / num_microbatches)
        # Twice, because cuDNN benchmarks algorithms in the first pass.
        if images <= max_images and (not on_gpu or (fits(images) and fits(images))):
            break
        batch_size //= 2
    if on_gpu:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    batch_size = int(dist.gather(torch.tensor([batch_size], device=device)).min())
    if batch_size < multiple:
        raise UserError(
            f"train.batch_size auto: not even {multiple} images fit into memory; raise train.gradient_accumulation_steps or "
            "use a smaller model"
        )
    return batch_size


def is_out_of_memory(error: RuntimeError) -> bool:
    """Returns whether an error of CUDA, cuDNN, cuBLAS or the host is an out-of-memory error."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in OUT_OF_MEMORY_MESSAGES)


def _saved_bytes(step: Callable[[int], object], images: int) -> int:
    """Returns the size of the tensors that a step saves for the backward pass, including weights."""
    storages: dict[int, torch.UntypedStorage] = {}

    def record_storage(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(record_storage, lambda tensor: tensor):
        step(images)
    return sum(storage.nbytes() for storage in storages.values())
