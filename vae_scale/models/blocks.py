"""The parts of the networks. Tensors are [batch, channels, height, width] in channels_last memory."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def space_to_depth(x: Tensor, side: int) -> Tensor:
    """[b, c, h*side, w*side] to [b, side*side*c, h, w]; the result is channels_last."""
    return rearrange(x, "b c (h p) (w q) -> b h w (p q c)", p=side, q=side).permute(0, 3, 1, 2)


def depth_to_space(x: Tensor, side: int) -> Tensor:
    """The inverse of `space_to_depth`."""
    return rearrange(x, "b (p q c) h w -> b (h p) (w q) c", p=side, q=side).permute(0, 3, 1, 2)


def conv(c_in: int, c_out: int, size: int = 3, zero: bool = False) -> nn.Conv2d:
    """A convolution that keeps height and width; `zero` starts it at zero, so that its branch begins as the identity."""
    layer = nn.Conv2d(c_in, c_out, size, padding=size // 2)
    if zero:
        nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class GroupNorm(nn.GroupNorm):
    """torch's, but on a CPU in bf16 by way of contiguous memory: its channels_last kernel takes 20 times as long there."""

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] to the same shape."""
        if x.device.type == "cpu" and x.dtype == torch.bfloat16:
            return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)
        return super().forward(x)


def norm(channels: int) -> GroupNorm:
    """GroupNorm of at most 32 groups. Never BatchNorm: samples must not depend on a batch."""
    groups = next(count for count in (32, 16, 8, 4, 2, 1) if channels % count == 0)
    return GroupNorm(groups, channels)


class Block(nn.Module):
    """A part of a network that is used as a whole, by calling it: where weights are sharded, its own are fetched together."""


class ResBlock(Block):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the last convolution zero at the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(channels), conv(channels, channels)
        self.norm2, self.conv2 = norm(channels), conv(channels, channels, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] to the same shape."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(hidden)))


class Attention(Block):
    """x + self-attention over the positions of x, four heads; zero at the start."""

    heads = 4

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.qkv = conv(channels, 3 * channels, size=1)
        self.out = conv(channels, channels, size=1, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] to the same shape."""
        height = x.shape[2]
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (n k c) h w -> n b k (h w) c", n=3, k=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(mixed, "b k (h w) c -> b (k c) h w", h=height))


class Downsample(nn.Module):
    """Halves height and width: pairs of pixels fold into channels, a 1x1 convolution mixes them."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.mix = conv(4 * c_in, c_out, size=1)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c_in, h, w] to [b, c_out, h/2, w/2]."""
        return self.mix(space_to_depth(x, 2))


class Upsample(nn.Module):
    """Doubles height and width: a 1x1 convolution, then channels unfold into pairs of pixels."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.mix = conv(c_in, 4 * c_out, size=1)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c_in, h, w] to [b, c_out, 2h, 2w]."""
        return depth_to_space(self.mix(x), 2)
