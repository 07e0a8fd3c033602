"""Training with weights, gradients and moments in shares, one on each process: FSDP2 (`launch/fsdp2.yaml`).

Results are those of DDP, to rounding, and so are the checkpoints.
"""

import os

import torch
from accelerate.utils import str_to_bool
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vae_scale.errors import UserError
from vae_scale.models.blocks import Block


def wanted() -> bool:
    """Whether the launcher was told to shard. Accelerate itself would do so on GPUs only."""
    return bool(str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")))


def shard(objective: nn.Module, device: torch.device, processes: int, exchange: str) -> FSDPModule:
    """Deals the weights below `objective` out to all processes, block by block.

    Args:
        objective: From images to the loss.
        device: Where this process computes.
        processes: All of them.
        exchange: fp32 or bf16, in which gradients are averaged.

    Raises:
        UserError: a weight is a single number, which cannot be dealt out.
    """
    if scalars := [name for name, parameter in objective.named_parameters() if not parameter.ndim]:
        raise UserError(f"{scalars[0]} is one number, which FSDP2 cannot shard: take another model.scale, or launch/ddp.yaml")
    for parameter in objective.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 knows no channels_last weights; activations stay so
    mesh = init_device_mesh(device.type, (processes,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if exchange == "bf16" else None)
    for module in objective.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    sharded = fully_shard(objective, mesh=mesh, mp_policy=policy)
    if device.type == "cpu":  # gloo takes an average for a sum in torch 2.8, without a word
        for module in objective.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    return sharded


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shares. All processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share(tensor: Tensor) -> Tensor:
    """This process's share of a tensor, in the same memory."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """A copy of a whole tensor, in the memory format and the shares of `model`."""
    if isinstance(model, DTensor):
        return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements)
    return torch.empty_like(model.detach()).copy_(tensor)
