"""The parts of the networks. Tensors are [batch, channels, height, width] in channels_last memory."""

import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn

MIN_GROUP_CHANNELS = 16


# All three begin by viewing channels_last memory as [b, h, w, c], so that gradients are channels_last as well.


def space_to_depth(x: Tensor, side: int) -> Tensor:
    """[b, c, h*side, w*side] to [b, side*side*c, h, w]; the result is channels_last."""
    return rearrange(x.permute(0, 2, 3, 1), "b (h p) (w q) c -> b h w (p q c)", p=side, q=side).permute(0, 3, 1, 2)


def depth_to_space(x: Tensor, side: int) -> Tensor:
    """The inverse of `space_to_depth`."""
    return rearrange(x.permute(0, 2, 3, 1), "b h w (p q c) -> b (h p) (w q) c", p=side, q=side).permute(0, 3, 1, 2)


def chunk_channels(x: Tensor) -> tuple[Tensor, Tensor]:
    """[b, 2c, h, w] to its two halves, [b, c, h, w] each."""
    first, second = x.permute(0, 2, 3, 1).chunk(2, 3)
    return first.permute(0, 3, 1, 2), second.permute(0, 3, 1, 2)


class VectorToMap(nn.Module):
    """[b, side*side*c] to [b, c, side, side] in channels_last memory, without a copy."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """A view of `x`."""
        return rearrange(x, "b (h w c) -> b h w c", h=self.side, w=self.side).permute(0, 3, 1, 2)


def map_to_vector() -> Rearrange:
    """The inverse of `VectorToMap`."""
    return Rearrange("b c h w -> b (h w c)")


def conv(c_in: int, c_out: int, size: int = 3, zero: bool = False) -> nn.Conv2d:
    """A convolution that keeps height and width; `zero` starts it at zero, so that its branch begins as the identity."""
    layer = nn.Conv2d(c_in, c_out, size, padding=size // 2)
    if zero:
        nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class GroupNorm(nn.GroupNorm):
    """Group normalization (Wu & He, 2018) in channels_last memory.

    torch's kernel for CUDA returns contiguous memory, which makes the convolutions before and after it transpose. Where it is
    compiled, simple operations take its place, which are fused with their neighbours; one by one they would be slower.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] to the same shape."""
        on_cpu = x.device.type == "cpu"
        if on_cpu and x.dtype == torch.bfloat16:  # the channels_last kernel takes 20 times as long in bf16 on a CPU
            return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)
        if on_cpu:
            return super().forward(x)
        if torch.compiler.is_compiling():
            return group_norm_channels_last(x, self.num_groups, self.weight, self.bias, self.eps)
        return super().forward(x).contiguous(memory_format=torch.channels_last)


def group_norm_channels_last(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group normalization in operations that torch.compile fuses with what surrounds them; statistics are fp32.

    Args:
        x: [b, c, h, w], best in channels_last memory.
        groups: Groups of neighbouring channels, a divisor of c.
        weight: [c].
        bias: [c].
        eps: Added to the variance.

    Returns:
        [b, c, h, w] in channels_last memory, with the dtype of `x`.
    """
    grouped = rearrange(x.float(), "b (g c) h w -> b (h w) g c", g=groups)
    variance, mean = torch.var_mean(grouped, (1, 3), correction=0, keepdim=True)
    normalized = (grouped - mean) * torch.rsqrt(variance + eps)
    y = rearrange(normalized, "b (h w) g c -> b h w (g c)", h=x.shape[2]) * weight + bias
    return y.to(x.dtype).permute(0, 3, 1, 2)


def norm(channels: int) -> GroupNorm:
    """GroupNorm of at most 32 groups of at least 16 channels. Never BatchNorm: samples must not depend on a batch.

    In channels_last memory the channels of a group lie side by side; 16 of them in bf16 fill a GPU's memory sector of 32
    bytes. In groups of one channel, the bias of the convolution before the norm would have no effect at all.
    """
    possible = (count for count in (32, 16, 8, 4, 2) if channels % count == 0 and channels // count >= MIN_GROUP_CHANNELS)
    return GroupNorm(next(possible, 1), channels)


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
        height, qkv = x.shape[2], self.qkv(self.norm(x)).permute(0, 2, 3, 1)
        q, k, v = rearrange(qkv, "b h w (n k c) -> n b k (h w) c", n=3, k=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(mixed, "b k (h w) c -> b h w (k c)", h=height).permute(0, 3, 1, 2))


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
