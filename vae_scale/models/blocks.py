"""Building blocks of the networks. Feature maps are [batch, channels, height, width] in channels_last memory."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

MIN_GROUP_CHANNELS = 16
SOFT_CLAMP = 5.0


# The next three functions permute to [b, h, w, c] first, so that gradients are in channels_last memory as well.


def space_to_depth(x: Tensor, side: int) -> Tensor:
    """Reshapes [b, c, h*side, w*side] to [b, side*side*c, h, w], in channels_last memory."""
    return rearrange(x.permute(0, 2, 3, 1), "b (h p) (w q) c -> b h w (p q c)", p=side, q=side).permute(0, 3, 1, 2)


def depth_to_space(x: Tensor, side: int) -> Tensor:
    """Inverts `space_to_depth`."""
    return rearrange(x.permute(0, 2, 3, 1), "b h w (p q c) -> b (h p) (w q) c", p=side, q=side).permute(0, 3, 1, 2)


def chunk_channels(x: Tensor) -> tuple[Tensor, Tensor]:
    """Splits [b, 2c, h, w] into two tensors of [b, c, h, w]."""
    first, second = x.permute(0, 2, 3, 1).chunk(2, 3)
    return first.permute(0, 3, 1, 2), second.permute(0, 3, 1, 2)


def soft_clamp(x: Tensor) -> Tensor:
    """Bounds x to +-SOFT_CLAMP with a scaled tanh (Vahdat & Kautz, 2020)."""
    return SOFT_CLAMP * torch.tanh(x / SOFT_CLAMP)


def conv(in_channels: int, out_channels: int, kernel_size: int = 3, zero_init: bool = False) -> nn.Conv2d:
    """Returns a convolution that preserves height and width, with zero bias and, optionally, zero weights."""
    layer = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    if zero_init:
        nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class GroupNorm(nn.GroupNorm):
    """Group normalization (Wu & He, 2018) in channels_last memory.

    PyTorch's CUDA kernel returns contiguous memory, so the adjacent convolutions have to transpose. Under torch.compile it is
    replaced with elementwise operations that the compiler fuses; in eager mode these would be slower.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes [b, c, h, w]."""
        on_cpu = x.device.type == "cpu"
        if on_cpu and x.dtype == torch.bfloat16:  # the channels_last kernel takes 20 times as long in bf16 on a CPU
            return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)
        if on_cpu:
            return super().forward(x)
        if torch.compiler.is_compiling():
            return group_norm_channels_last(x, self.num_groups, self.weight, self.bias, self.eps)
        return super().forward(x).contiguous(memory_format=torch.channels_last)


def group_norm_channels_last(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group normalization in operations that torch.compile fuses with adjacent ones; statistics are in fp32.

    Args:
        x: [b, c, h, w], preferably in channels_last memory.
        num_groups: Number of groups, a divisor of c.
        weight: [c].
        bias: [c].
        eps: Added to the variance.

    Returns:
        [b, c, h, w] in channels_last memory, with the dtype of `x`.
    """
    grouped = rearrange(x.float(), "b (g c) h w -> b (h w) g c", g=num_groups)
    variance, mean = torch.var_mean(grouped, (1, 3), correction=0, keepdim=True)
    normalized = (grouped - mean) * torch.rsqrt(variance + eps)
    y = rearrange(normalized, "b (h w) g c -> b h w (g c)", h=x.shape[2]) * weight + bias
    return y.to(x.dtype).permute(0, 3, 1, 2)


def group_norm(channels: int) -> GroupNorm:
    """Returns a GroupNorm with at most 32 groups of at least 16 channels.

    In channels_last memory, 16 channels in bf16 fill a GPU memory sector of 32 bytes. In groups of one channel, the bias of the
    preceding convolution would have no effect. With BatchNorm, outputs would depend on the other images of a batch.
    """
    valid = (count for count in (32, 16, 8, 4, 2) if channels % count == 0 and channels // count >= MIN_GROUP_CHANNELS)
    return GroupNorm(next(valid, 1), channels)


class Block(nn.Module):
    """Base class of the modules that FSDP2 shards as a unit. Use them only through `__call__`, which runs FSDP2's hooks."""


class ResBlock(Block):
    """A pre-activation residual block of two convolutions, initialized to the identity."""

    def __init__(self, channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(channels), conv(channels, channels, kernel_size)
        self.norm2, self.conv2 = group_norm(channels), conv(channels, channels, kernel_size, zero_init=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b, c, h, w] to the same shape."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(hidden)))


class Attention(Block):
    """Residual self-attention over positions, with four heads, initialized to the identity."""

    num_heads = 4

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = conv(channels, 3 * channels, kernel_size=1)
        self.out = conv(channels, channels, kernel_size=1, zero_init=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b, c, h, w] to the same shape."""
        height, qkv = x.shape[2], self.qkv(self.norm(x)).permute(0, 2, 3, 1)
        q, k, v = rearrange(qkv, "b h w (n k c) -> n b k (h w) c", n=3, k=self.num_heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(attended, "b k (h w) c -> b h w (k c)", h=height).permute(0, 3, 1, 2))


class Downsample(nn.Module):
    """Halves height and width: space-to-depth, then a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = conv(4 * in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b, in_channels, h, w] to [b, out_channels, h/2, w/2]."""
        return self.proj(space_to_depth(x, 2))


class Upsample(nn.Module):
    """Doubles height and width: a 1x1 convolution, then depth-to-space."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = conv(in_channels, 4 * out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b, in_channels, h, w] to [b, out_channels, 2h, 2w]."""
        return depth_to_space(self.proj(x), 2)
