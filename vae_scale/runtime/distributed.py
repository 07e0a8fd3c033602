"""The rank of this process and the collectives that evaluation uses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class DistContext:
    """Rank, world size and collectives; by default those of a single process.

    Attributes:
        rank: Rank of this process.
        world_size: Number of ranks.
        all_reduce_sum: Sums a tensor over all ranks.
        gather: Concatenates the rows of all ranks in rank order.
        heartbeat: Reports progress to the watchdog. All ranks must call it in the same places.
    """

    rank: int = 0
    world_size: int = 1
    all_reduce_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor
    gather: Callable[[Tensor], Tensor] = lambda rows: rows
    heartbeat: Callable[[str], None] = lambda location: None

    @staticmethod
    def from_accelerator(accelerator: "Accelerator") -> "DistContext":
        """Returns the context of an accelerator's process group."""
        return DistContext(
            accelerator.process_index,
            accelerator.num_processes,
            lambda tensor: accelerator.reduce(tensor, "sum"),
            accelerator.gather,
        )


SINGLE_PROCESS = DistContext()
