"""Checks that all ranks hold identical weights."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from vae_scale.errors import UserError

CHUNK_SIZE = 2**18  # elements, so that intermediate results fit into a CPU's cache


def check_identical_weights(fingerprints: Tensor, images_seen: int) -> None:
    """Compares the fingerprints of all ranks, int64 [world_size].

    Raises:
        UserError: if they differ, naming the ranks in the minority, or all ranks if no two agree.
    """
    values = fingerprints.tolist()
    (majority, count), *_ = Counter(values).most_common(1)
    if count < len(values):
        outliers = [str(rank) for rank, value in enumerate(values) if value != majority or count == 1]
        raise UserError(
            f"ranks differ in their weights after {images_seen} images: rank {', '.join(outliers)}; no checkpoint was saved. "
            "Run the same command again to resume from the last checkpoint. If it happens again, the memory or "
            "the GPU of this rank may be faulty"
        )


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """Returns a hash of the bits of an fp32 tensor, an int64 scalar."""
    return _hash(tensor.contiguous().view(torch.int32).flatten())


def combine_fingerprints(fingerprints: Sequence[Tensor]) -> Tensor:
    """Returns one fingerprint of several tensors in their order, an int64 scalar."""
    return _hash(torch.stack(list(fingerprints)))


def _hash(values: Tensor) -> Tensor:
    """Returns the sum of integers, each weighted by an odd number that depends on its position."""
    positions = torch.arange(min(len(values), CHUNK_SIZE), device=values.device)
    weights = 2 * positions + 1_000_003
    sums = torch.stack([(chunk * weights[: len(chunk)]).sum() for chunk in values.split(CHUNK_SIZE)])
    return sums[0] if len(sums) == 1 else _hash(sums)
