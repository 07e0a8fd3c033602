"""Whether all processes hold the same weights."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from vae_scale.errors import UserError

CHUNK = 2**18  # numbers taken at a time, so that what is computed of them stays in a CPU's cache


def check_same(prints: Tensor, images_seen: int) -> None:
    """Refuses to go on where the fingerprints of the processes, [processes], are not all the same.

    Raises:
        UserError: naming the processes that differ from most, or all where no two agree.
    """
    mine = prints.tolist()
    (usual, times), *_ = Counter(mine).most_common(1)
    odd = [str(rank) for rank, number in enumerate(mine) if number != usual or times == 1]
    if times < len(mine):
        raise UserError(
            f"processes differ in their weights after {images_seen} images: rank {', '.join(odd)}; nothing was saved. Run "
            "again: training goes on from the last checkpoint. If it happens again, memory or a GPU may be faulty there"
        )


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """A number that differs wherever a single bit of an fp32 tensor does, in practice: int64 scalar."""
    return _weighted(tensor.contiguous().view(torch.int32).flatten())


def combine(fingerprints: Sequence[Tensor]) -> Tensor:
    """One fingerprint of several tensors in their order: int64 scalar."""
    return _weighted(torch.stack(list(fingerprints)))


def _weighted(numbers: Tensor) -> Tensor:
    """The sum of some numbers, each times an odd one that depends on its place, so that the order counts."""
    places = torch.arange(min(len(numbers), CHUNK), device=numbers.device)
    odd = 2 * places + 1_000_003
    sums = torch.stack([(part * odd[: len(part)]).sum() for part in numbers.split(CHUNK)])
    return sums[0] if len(sums) == 1 else _weighted(sums)
