"""Leaving before the end, where a signal asks for it: all processes at the same step, none waiting for the device."""

import signal
import sys
from types import FrameType, TracebackType

import torch
from torch import Tensor

LAG = 4  # steps between what is said and what is done about it, so that the answer is there before anyone wants it
PREEMPTING = (signal.SIGTERM, signal.SIGUSR1)  # of clusters, which will start the run again
SAID = 1000.0  # by a process that is preempted; one whose user pressed Ctrl-C says 1


class Stopping:
    """Signals that this process was sent, and what all processes together make of those that any was sent.

    A process says something at each step (`said`), the steps' reduction adds it up, and the sum is acted on `LAG` steps later
    (`heard`): so all act at the same step, and a GPU's host never waits for a result that is not there yet.

    Attributes:
        agreed: To stop after this step.
        preempted: Because a cluster wants it, rather than a user.
    """

    def __init__(self, device: torch.device) -> None:
        self.agreed = self.preempted = False
        self._mine, self._device = 0.0, device
        on_gpu = device.type == "cuda"
        self._sums = torch.zeros(LAG, pin_memory=on_gpu)
        self._read = self._sums.numpy()
        self._events = [torch.cuda.Event() for _ in range(LAG)] if on_gpu else []
        self._step = 0

    def __enter__(self) -> "Stopping":
        self._before = {number: signal.signal(number, self._asked) for number in (*PREEMPTING, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if number in PREEMPTING:
            self._mine = SAID
            return
        if self._mine:
            raise KeyboardInterrupt
        self._mine = 1.0
        print("\nstopping after a checkpoint; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)

    def said(self) -> Tensor:
        """What this process says: [1]."""
        return torch.full((1,), self._mine, device=self._device)

    def heard(self, total: Tensor) -> None:
        """Takes in the sum of what all processes said at this step, [1], and acts on that of `LAG` steps ago."""
        place = self._step % LAG
        if self._step >= LAG:
            if self._events:
                self._events[place].synchronize()
            self.agreed, self.preempted = bool(self._read[place] > 0), bool(self._read[place] >= SAID)
        self._sums[place : place + 1].copy_(total, non_blocking=True)
        if self._events:
            self._events[place].record()
        self._step += 1
