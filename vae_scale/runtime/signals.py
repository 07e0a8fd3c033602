"""Graceful shutdown on signals: all ranks stop after the same step, without synchronizing with the device."""

import signal
import sys
from types import FrameType, TracebackType

import torch
from torch import Tensor

DELAY_STEPS = 4  # steps after which a reduced flag is read, so that the host never waits for the device
PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # sent by cluster managers
INTERRUPT_FLAG, PREEMPTION_FLAG = 1.0, 1000.0


class SignalHandler:
    """Handles SIGTERM, SIGUSR1 and SIGINT on all ranks.

    At each step, the caller sums `local_flag` over all ranks and passes the result to `update`, which evaluates the sum of
    `DELAY_STEPS` steps ago, so all ranks stop after the same step.

    Attributes:
        should_stop: Whether to stop after this step.
        preempted: Whether a cluster manager, not the user, requested the stop.
    """

    def __init__(self, device: torch.device) -> None:
        self.should_stop = self.preempted = False
        self._flag, self._device = 0.0, device
        on_gpu = device.type == "cuda"
        self._sums = torch.zeros(DELAY_STEPS, pin_memory=on_gpu)
        self._events = [torch.cuda.Event() for _ in range(DELAY_STEPS)] if on_gpu else []
        self._step = 0

    def __enter__(self) -> "SignalHandler":
        self._previous = {number: signal.signal(number, self._handle) for number in (*PREEMPTION_SIGNALS, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number in PREEMPTION_SIGNALS:
            self._flag = PREEMPTION_FLAG
        elif self._flag:
            raise KeyboardInterrupt
        else:
            self._flag = INTERRUPT_FLAG
            print("\nsaving a checkpoint and stopping; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)

    def local_flag(self) -> Tensor:
        """Returns the flag of this rank, [1]."""
        return torch.full((1,), self._flag, device=self._device)

    def update(self, total: Tensor) -> None:
        """Stores the sum of all ranks' flags at this step, [1], and evaluates the sum of `DELAY_STEPS` steps ago."""
        slot = self._step % DELAY_STEPS
        if self._step >= DELAY_STEPS:
            if self._events:
                self._events[slot].synchronize()
            delayed = float(self._sums.numpy()[slot])
            self.should_stop, self.preempted = delayed > 0, delayed >= PREEMPTION_FLAG
        self._sums[slot : slot + 1].copy_(total, non_blocking=True)
        if self._events:
            self._events[slot].record()
        self._step += 1
