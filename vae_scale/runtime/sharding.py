"""FSDP2: weights, gradients and optimizer state sharded over all ranks (`launch/fsdp2.yaml`).

Results match those of DDP up to rounding, and checkpoints have the same format.
"""

import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vae_scale.models.blocks import Block


def fsdp_enabled() -> bool:
    """Returns whether the launcher requested FSDP. Accelerate itself supports it on GPUs only."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def apply_fsdp(objective: nn.Module, device: torch.device, world_size: int, grad_reduce_dtype: str) -> FSDPModule:
    """Shards the weights of `objective` over all ranks, block by block. `grad_reduce_dtype` is fp32 or bf16."""
    for parameter in objective.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 does not support channels_last weights
    mesh = init_device_mesh(device.type, (world_size,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if grad_reduce_dtype == "bf16" else None)
    for module in objective.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    sharded = fully_shard(objective, mesh=mesh, mp_policy=policy)
    if device.type == "cpu":  # with gloo, torch 2.8 returns the sum instead of the average
        for module in objective.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    return sharded


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns the unsharded tensor. All ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of a tensor, without copying."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def shard_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """Copies an unsharded tensor to the memory format and the sharding of `reference`."""
    if isinstance(reference, DTensor):
        return distribute_tensor(tensor.to(reference.device), reference.device_mesh, reference.placements)
    return torch.empty_like(reference.detach()).copy_(tensor)
