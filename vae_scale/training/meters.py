"""What the steps since the last log line measured."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Reading:
    """Of the steps since the last reading.

    Attributes:
        means: Of what was measured, over the steps that were taken; empty if there were none.
        grad_norm: The same of the gradient's norm.
        taken: Steps that were taken.
        left_out: Steps that were left out.
        row: Steps that were left out in a row up to now.
        first: The images seen before the first of these.
    """

    means: list[float]
    grad_norm: float
    taken: int
    left_out: int
    row: int
    first: int


class Meters:
    """Adds up on the device what steps measure. Only `read` and `state` wait for it.

    Args:
        measured: Length of what a step measures.
        device: Where.
    """

    def __init__(self, measured: int, device: torch.device) -> None:
        # What was measured, the gradient's norm, steps taken and steps left out.
        self._sums = torch.zeros(measured + 3, device=device)
        self._row = torch.zeros(2, dtype=torch.int64, device=device)

    def count(self, measured: Tensor, norm: Tensor, taken: Tensor, images_seen: int) -> None:
        """Adds a step that began after `images_seen` images: what it measured, its gradient's norm, whether it was taken."""
        found = torch.where(taken, torch.cat([measured, norm[None]]), 0)
        self._sums += torch.cat([found, taken[None], ~taken[None]])
        row, first = self._row.unbind()
        first = torch.where(row > 0, first, images_seen)
        self._row = torch.where(taken, 0, torch.stack([row + 1, first]))

    def read(self) -> Reading:
        """What was added up since the last reading."""
        *sums, norm, taken, left_out = self.state()
        row, first = self._row.tolist()
        self._sums.zero_()
        means, norm = ([part / taken for part in sums], norm / taken) if taken else ([], 0.0)
        return Reading(means, norm, int(taken), int(left_out), row, first)

    def state(self) -> list[float]:
        """For `load`, in a run that goes on from here."""
        sums: list[float] = self._sums.tolist()
        return sums

    def load(self, state: list[float]) -> None:
        """Goes on from a `state`."""
        self._sums.copy_(torch.tensor(state))
