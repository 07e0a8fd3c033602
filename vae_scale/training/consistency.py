"""Whether all processes hold the same weights."""

from collections.abc import Iterable

import torch
from torch import Tensor

from vae_scale.errors import UserError


def check_same(prints: Tensor, images_seen: int) -> None:
    """Refuses to go on where the fingerprints of the processes, [processes], are not all those of most of them.

    Raises:
        UserError: naming the processes that differ.
    """
    usual = prints.mode().values
    odd = [str(rank) for rank, mine in enumerate(prints.tolist()) if mine != usual]
    if odd:
        raise UserError(
            f"processes differ in their weights after {images_seen} images: rank {', '.join(odd)} from the others; nothing was "
            "saved. Run again: training goes on from the last checkpoint. If it happens again, that machine's memory or "
            "GPU may be faulty"
        )


@torch.no_grad()
def fingerprint(tensors: Iterable[Tensor]) -> Tensor:
    """A number that differs wherever a single bit of some fp32 tensors does, in practice: int64 scalar."""
    sums = [(part.contiguous().view(torch.int32).long() * 1_000_003).sum() for part in tensors]
    places = torch.arange(1, len(sums) + 1, device=sums[0].device)
    return (torch.stack(sums) * places).sum()
