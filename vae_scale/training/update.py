"""How the weights move: AdamW along clipped gradients, and not at all where these are not finite or explode."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

from vae_scale.config import OptimizerConfig
from vae_scale.training.sharding import like, whole


class Update:
    """Steps of AdamW. What they depend on stays on the device, which nobody waits for.

    A step whose gradient is not finite, or longer than `optimizer.skip`, leaves weights and moments as they are. All processes
    have the same gradient, so they all take it or all leave it out.

    Args:
        groups: The optimizer's groups of parameters.
        config: Of the optimizer.
        scaler: Of the loss, in fp16.

    Attributes:
        adamw: The optimizer.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig, scaler: torch.amp.GradScaler | None) -> None:
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)
        self._parameters: list[Parameter] = [parameter for group in groups for parameter in group["params"]]
        self._clip, self._skip = config.clip or float("inf"), config.skip or float("inf")
        self._scaler = scaler

    def step(self, lr: float, local: AbstractContextManager[None] | None = None) -> tuple[Tensor, Tensor]:
        """Takes a step and forgets the gradients.

        Args:
            lr: Learning rate.
            local: Entered around the part that needs no other process.

        Returns:
            The gradient's norm before clipping, and whether the step was taken: scalars.
        """
        for group in self.adamw.param_groups:
            group["lr"] = lr
        if self._scaler:
            self._scaler.unscale_(self.adamw)
        norm = whole(get_total_norm(part.grad for part in self._parameters if part.grad is not None))
        taken = norm.isfinite() & (norm <= self._skip)
        # The fused kernel divides by the one and does nothing at the other, so neither costs a pass over the gradients.
        self.adamw.grad_scale = (norm / self._clip).clamp(min=1)  # type: ignore[attr-defined]
        self.adamw.found_inf = (~taken).float()  # type: ignore[attr-defined]
        with local or nullcontext():
            self.adamw.step()
        if self._scaler:
            self._scaler.update()  # by what `unscale_` saw; its own `step` would take no notice of `taken`
        self.adamw.zero_grad(set_to_none=True)
        return norm, taken

    def tensors(self, named: Iterable[tuple[str, Parameter]]) -> Iterator[tuple[str, Tensor]]:
        """Steps and moments of parameters, as `exp_avg.NAME`."""
        for name, parameter in named:
            for part, value in self.adamw.state[parameter].items():
                yield f"{part}.{name}", value

    def load(self, named: Iterable[tuple[str, Parameter]], saved: dict[str, Tensor]) -> None:
        """Takes in what `tensors` gave."""
        for name, parameter in named:
            state = {part: saved[f"{part}.{name}"] for part in ("step", "exp_avg", "exp_avg_sq")}
            self.adamw.state[parameter] = {
                part: like(value, parameter) if value.ndim else value.to(parameter.device) for part, value in state.items()
            }
