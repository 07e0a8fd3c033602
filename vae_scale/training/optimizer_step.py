"""The optimizer step: AdamW with gradient clipping, skipped if gradients are not finite or exceed a threshold."""

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

from vae_scale.config.options import OptimizerConfig
from vae_scale.runtime.sharding import full_tensor, shard_like

FINAL_LR_FACTOR = 0.01  # learning rate at the end of the cosine schedule, relative to the peak


def learning_rate(config: OptimizerConfig, images_seen: int, total_images: int) -> float:
    """Returns the learning rate: linear warm-up, then constant or cosine decay to `FINAL_LR_FACTOR` of the peak."""
    if images_seen < config.warmup_images:
        return config.lr * (images_seen + 1) / (config.warmup_images + 1)
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (images_seen - config.warmup_images) / max(1, total_images - config.warmup_images))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (FINAL_LR_FACTOR + (1 - FINAL_LR_FACTOR) * cosine)


class OptimizerStep:
    """Takes AdamW steps without synchronizing with the device.

    If the gradient norm is not finite or exceeds `optimizer.skip_threshold`, the step is skipped: weights and moments do not
    change. All processes have the same gradients, so they skip the same steps.

    Args:
        parameters: The parameters to optimize.
        config: Options of the optimizer.
        scaler: Loss scaler of fp16 training.

    Attributes:
        adamw: The optimizer.
    """

    def __init__(self, parameters: list[Parameter], config: OptimizerConfig, scaler: torch.amp.GradScaler | None) -> None:
        self.adamw = torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, weight_decay=0.0, fused=True)
        self._parameters = parameters
        self._max_grad_norm = config.max_grad_norm or float("inf")
        self._skip_threshold = config.skip_threshold or float("inf")
        self._scaler = scaler

    def step(self, lr: float, timer: AbstractContextManager[None] | None = None) -> tuple[Tensor, Tensor]:
        """Takes or skips a step, and resets the gradients.

        Args:
            lr: Learning rate.
            timer: Context manager for the part without communication.

        Returns:
            The gradient norm before clipping, and whether the step was taken: scalars.
        """
        for group in self.adamw.param_groups:
            group["lr"] = lr
        if self._scaler:
            self._scaler.unscale_(self.adamw)
        grad_norm = full_tensor(get_total_norm(parameter.grad for parameter in self._parameters if parameter.grad is not None))
        is_taken = grad_norm.isfinite() & (grad_norm <= self._skip_threshold)
        # The fused kernel divides gradients by grad_scale and does nothing if found_inf is 1: no extra pass over the gradients.
        self.adamw.grad_scale = (grad_norm / self._max_grad_norm).clamp(min=1)  # type: ignore[attr-defined]
        self.adamw.found_inf = (~is_taken).float()  # type: ignore[attr-defined]
        with timer or nullcontext():
            self.adamw.step()
        if self._scaler:
            self._scaler.update()  # uses the overflow check of `unscale_`; `GradScaler.step` would ignore `is_taken`
        self.adamw.zero_grad(set_to_none=True)
        return grad_norm, is_taken

    def tensors(self, named_parameters: Iterable[tuple[str, Parameter]]) -> Iterator[tuple[str, Tensor]]:
        """Yields names, such as `exp_avg.NAME`, and values of the optimizer state of parameters."""
        for name, parameter in named_parameters:
            for key, value in self.adamw.state[parameter].items():
                yield f"{key}.{name}", value

    def load(self, named_parameters: Iterable[tuple[str, Parameter]], tensors: dict[str, Tensor]) -> None:
        """Restores the optimizer state that `OptimizerStep.tensors` yielded."""
        for name, parameter in named_parameters:
            state = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            self.adamw.state[parameter] = {
                key: shard_like(value, parameter) if value.ndim else value.to(parameter.device) for key, value in state.items()
            }
