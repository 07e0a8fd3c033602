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
MIN_PROBE_IMAGES = 8  # above this, GPU memory grows linearly with the number of images
OUT_OF_MEMORY_MESSAGES = ("out of memory", "ALLOC_FAILED", "can't allocate memory")  # CUDA; cuDNN and cuBLAS; the host

LossFn = Callable[[int], Tensor]


def find_batch_size(
    loss_fn: LossFn,
    parameters: Iterable[Parameter],
    device: torch.device,
    multiple: int,
    max_batch_size: int,
    num_microbatches: int,
    dist: DistContext,
) -> int:
    """Returns the largest global batch size that fits on all ranks: `multiple` times a power of two. All ranks must call it.

    On a GPU, the peak memory of two small batches predicts the largest size, which is then tried. On a CPU, where running out
    of memory would kill the process, memory is estimated from the tensors saved for backward.

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
    sizes = [multiple]
    while 2 * sizes[-1] <= max_batch_size:
        sizes.append(2 * sizes[-1])
    counts = [math.ceil(size / num_microbatches) for size in sizes]
    if device.type == "cuda":
        max_count: float = _max_images_on_gpu(loss_fn, parameters, device, optimizer_bytes, counts)
    else:
        max_count = _max_images_on_host(loss_fn, optimizer_bytes)
    batch_size = max((size for size, count in zip(sizes, counts, strict=True) if count <= max_count), default=0)
    batch_size = int(dist.gather(torch.tensor([batch_size], device=device)).min())
    if not batch_size:
        raise UserError(
            f"train.batch_size auto: not even {multiple} images fit into memory; raise train.gradient_accumulation_steps or "
            "use a smaller model"
        )
    return batch_size


def _max_images_on_gpu(
    loss_fn: LossFn, parameters: list[Parameter], device: torch.device, optimizer_bytes: int, counts: list[int]
) -> int:
    def clear_gradients() -> None:
        for parameter in parameters:
            parameter.grad = None

    def measure_peak(count: int) -> int:
        try:
            for _ in range(2):  # cuDNN benchmarks algorithms in the first pass
                torch.cuda.reset_peak_memory_stats(device)
                loss_fn(count).backward()
                clear_gradients()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device)
        finally:
            clear_gradients()
            torch.cuda.empty_cache()

    def can_train(count: int) -> bool:
        torch.cuda.set_per_process_memory_fraction(GPU_MEMORY_FRACTION, device)
        try:
            reserved = torch.empty(optimizer_bytes, dtype=torch.uint8, device=device)
            measure_peak(count)
            return reserved.numel() == optimizer_bytes
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)

    probe = next((count for count in counts if count >= MIN_PROBE_IMAGES), counts[-1])
    available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return find_max_images(counts, can_train, measure_peak, probe, GPU_MEMORY_FRACTION * available - optimizer_bytes)


def find_max_images(
    counts: list[int], can_train: Callable[[int], bool], measure_peak: Callable[[int], int], probe: int, available: float
) -> int:
    """Returns the largest of `counts` that can be trained on, or 0.

    The peak memory of `probe` and `2 * probe` images, in bytes, is extrapolated to the `available` memory. The
    remaining candidates are tried, largest first.
    """
    candidates = counts
    if can_train(probe) and can_train(2 * probe):
        first, second = measure_peak(probe), measure_peak(2 * probe)
        bytes_per_image = max(1.0, (second - first) / probe)
        candidates = [count for count in counts if second + (count - 2 * probe) * bytes_per_image <= available]
    return next((count for count in reversed(candidates) if can_train(count)), 0)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Returns whether an error of CUDA, cuDNN, cuBLAS or the host is an out-of-memory error."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in OUT_OF_MEMORY_MESSAGES)


def _max_images_on_host(loss_fn: LossFn, optimizer_bytes: int) -> float:
    available = HOST_MEMORY_FRACTION * psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    bytes_per_image = max(1.0, (_saved_bytes(loss_fn, 4) - _saved_bytes(loss_fn, 2)) / 2)
    return (available - optimizer_bytes) / (BACKWARD_FACTOR * bytes_per_image)


def _saved_bytes(loss_fn: LossFn, count: int) -> int:
    """Returns the size of the tensors that a forward pass saves for backward, including weights."""
    storages: dict[int, torch.UntypedStorage] = {}

    def record_storage(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(record_storage, lambda tensor: tensor):
        loss_fn(count)
    return sum(storage.nbytes() for storage in storages.values())
