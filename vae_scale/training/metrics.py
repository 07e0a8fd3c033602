"""Metrics by name: summed over processes and averaged over steps, without synchronizing with the device."""

from collections.abc import Mapping

import torch
from torch import Tensor

STEPS_TAKEN, STEPS_SKIPPED, CONSECUTIVE_SKIPS = "steps_taken", "steps_skipped", "consecutive_skips"


class AsyncAllReduce:
    """Sums named scalars over all processes with one asynchronous all-reduce, which starts at construction."""

    def __init__(self, scalars: Mapping[str, Tensor], world_size: int) -> None:
        self._names = list(scalars)
        self._packed = torch.cat([value.detach().reshape(1) for value in scalars.values()])
        self._work = torch.distributed.all_reduce(self._packed, async_op=True) if world_size > 1 else None

    def wait(self) -> dict[str, Tensor]:
        """Returns the sums by name."""
        if self._work:
            self._work.wait()
        return dict(zip(self._names, self._packed.unbind(), strict=True))


class MetricAccumulator:
    """Sums metrics over steps on the device. Only `compute` and `state_dict` synchronize with it.

    Args:
        device: Device of the metrics.
        state: `state_dict` of the accumulator to resume; empty for a new one.
    """

    def __init__(self, device: torch.device, state: Mapping[str, float]) -> None:
        self._names = list(state)
        self._sums = torch.tensor(list(state.values()), device=device)
        self._consecutive_skips = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, metrics: Mapping[str, Tensor], is_taken: Tensor) -> None:
        """Adds the metrics of a step. The metrics of a skipped step are ignored.

        Args:
            metrics: Scalars by name, the same names in each step.
            is_taken: Whether the step was taken: a boolean scalar.
        """
        names = [*metrics, STEPS_TAKEN, STEPS_SKIPPED]
        if names != self._names:
            self._names, self._sums = names, self._sums.new_zeros(len(names))
        values = torch.where(is_taken, torch.stack(list(metrics.values())), 0)
        self._sums += torch.cat([values, is_taken[None], ~is_taken[None]])
        self._consecutive_skips = torch.where(is_taken, 0, self._consecutive_skips + 1)

    def compute(self) -> dict[str, float]:
        """Returns statistics of the steps since the last call, and resets the sums.

        Returns:
            `steps_taken` and `steps_skipped`; `consecutive_skips`, the number of the most recent steps, also before the last
            call, that were skipped in a row; and the means of the metrics over the steps taken, if there are any.
        """
        sums = self.state_dict()
        taken, skipped = sums.pop(STEPS_TAKEN, 0), sums.pop(STEPS_SKIPPED, 0)
        self._sums.zero_()
        means = {name: value / taken for name, value in sums.items()} if taken else {}
        return means | {STEPS_TAKEN: taken, STEPS_SKIPPED: skipped, CONSECUTIVE_SKIPS: int(self._consecutive_skips)}

    def state_dict(self) -> dict[str, float]:
        """Returns the sums by name."""
        return dict(zip(self._names, self._sums.tolist(), strict=True))
