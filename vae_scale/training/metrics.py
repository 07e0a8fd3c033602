"""Metrics by name: reduced over processes and averaged over steps, without synchronizing with the device."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS_TAKEN, STEPS_SKIPPED = "steps_taken", "steps_skipped"


class AsyncAllReduce:
    """Reduces named scalars over all processes with one asynchronous all-reduce, which starts at construction.

    Args:
        means: Scalars to average over processes.
        sums: Scalars to sum over processes.
        world_size: Number of processes.
    """

    def __init__(self, means: Mapping[str, Tensor], sums: Mapping[str, Tensor], world_size: int) -> None:
        self._names, self._num_means, self._world_size = [*means, *sums], len(means), world_size
        self._packed = torch.cat([value.detach().reshape(1) for value in (*means.values(), *sums.values())])
        self._work = torch.distributed.all_reduce(self._packed, async_op=True) if world_size > 1 else None

    def wait(self) -> dict[str, Tensor]:
        """Returns the reduced scalars by name."""
        if self._work:
            self._work.wait()
            self._packed[: self._num_means] /= self._world_size
        return dict(zip(self._names, self._packed.unbind(), strict=True))


@dataclass
class IntervalStats:
    """Statistics of the steps since the last call of `MetricAccumulator.compute`.

    Attributes:
        means: Means of the metrics over the steps taken; empty if no step was taken.
        steps_taken: Number of steps taken.
        steps_skipped: Number of steps skipped.
        consecutive_skips: Number of the most recent steps that were skipped in a row.
        first_skip: Images seen before the first of these steps.
    """

    means: dict[str, float]
    steps_taken: int
    steps_skipped: int
    consecutive_skips: int
    first_skip: int


class MetricAccumulator:
    """Sums metrics over steps on the device. Only `compute` and `state_dict` synchronize with it.

    Args:
        device: Device of the metrics.
        state: `state_dict` of the accumulator to resume; empty for a new one.
    """

    def __init__(self, device: torch.device, state: Mapping[str, float]) -> None:
        self._names = list(state)
        self._sums = torch.tensor(list(state.values()), device=device)
        self._skips = torch.zeros(2, dtype=torch.int64, device=device)  # consecutive skips, images seen before the first

    def update(self, metrics: Mapping[str, Tensor], is_taken: Tensor, images_seen: int) -> None:
        """Adds the metrics of a step. The metrics of a skipped step are ignored.

        Args:
            metrics: Scalars by name, the same names in each step.
            is_taken: Whether the step was taken: a boolean scalar.
            images_seen: Images seen before the step.
        """
        names = [*metrics, STEPS_TAKEN, STEPS_SKIPPED]
        if names != self._names:
            self._names, self._sums = names, self._sums.new_zeros(len(names))
        values = torch.where(is_taken, torch.stack(list(metrics.values())), 0)
        self._sums += torch.cat([values, is_taken[None], ~is_taken[None]])
        skips, first = self._skips.unbind()
        self._skips = torch.where(is_taken, 0, torch.stack([skips + 1, torch.where(skips > 0, first, images_seen)]))

    def compute(self) -> IntervalStats:
        """Returns the statistics since the last call and resets the sums."""
        sums = self.state_dict()
        taken, skipped = int(sums.pop(STEPS_TAKEN, 0)), int(sums.pop(STEPS_SKIPPED, 0))
        skips, first = self._skips.tolist()
        self._sums.zero_()
        means = {name: value / taken for name, value in sums.items()} if taken else {}
        return IntervalStats(means, taken, skipped, skips, first)

    def state_dict(self) -> dict[str, float]:
        """Returns the sums by name."""
        return dict(zip(self._names, self._sums.tolist(), strict=True))
