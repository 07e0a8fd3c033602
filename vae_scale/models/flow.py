"""The rectified-flow prior: a transformer that carries N(0, I) to the latents of images.

Latents lie on straight lines z_t = (1 - t) z + t n between a latent z (t = 0) and noise n (t = 1); the network learns the
velocity n - z, and sampling follows it from noise back to a latent (Liu et al., 2023, eq. 1). Blocks are those of DiT
(Peebles & Xie, 2023), with one modulation shared by all blocks (Chen et al., 2024, "adaLN-single").
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vae_scale.models.blocks import Block, conv, depth_to_space, space_to_depth

AUGMENTATIONS = 6  # numbers that say how an image was augmented, all 0 for one that was not
HEAD = 64  # channels of an attention head
Solver = Literal["euler", "heun"]


class Flow(nn.Module):
    """Velocity of normalised latents, given the time, a class label and how the image was augmented.

    Args:
        width: Channels of its tokens, a multiple of 64.
        depth: Blocks.
        patch: Side of the square of latents that is one token.
        latent_shape: (c, h, w); h and w multiples of `patch`.
        classes: Class labels; the label `classes` itself stands for none.

    Attributes:
        shift: Mean of each channel of latents: [c, 1, 1].
        scale: Standard deviation of each channel, sqrt(var(mean) + E[sigma^2]) over posteriors: [c, 1, 1]. Collapsed channels
            have means near 0 and sigma near 1; divided by the deviation of means alone they would be blown up.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, width: int, depth: int, patch: int, latent_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.width, self.depth, self.patch, self.classes = width, depth, patch, classes
        channels, height, columns = latent_shape
        self.register_buffer("shift", torch.zeros(channels, 1, 1))
        self.register_buffer("scale", torch.ones(channels, 1, 1))
        self.stem = conv(channels * patch**2, width, size=3 if height > patch else 1)
        self.place = nn.Parameter(0.02 * torch.randn(height * columns // patch**2, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)
        self.augmentation = nn.Linear(AUGMENTATIONS, width, bias=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.last = nn.Parameter(torch.zeros(2, width))
        self.head = nn.Linear(width, channels * patch**2)
        nn.init.normal_(self.label.weight, std=0.02)
        nn.init.normal_(self.augmentation.weight, std=0.02)
        for layer in (self.modulation[1], self.head):  # at the start every block is the identity, and the velocity is zero
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents with mean 0 and deviation 1 in every channel."""
        return (latents - self.shift) / self.scale

    def forward(self, z: Tensor, time: Tensor, label: Tensor, augmentation: Tensor) -> Tensor:
        """The velocity at `z`.

        Args:
            z: Normalised latents on their way, [b, c, h, w].
            time: 0 (a latent) to 1 (noise): [b].
            label: int64 [b], `classes` for none.
            augmentation: [b, AUGMENTATIONS].

        Returns:
            [b, c, h, w].
        """
        condition = self.time(_waves(time, self.width)) + self.label(label) + self.augmentation(augmentation)
        modulation = rearrange(self.modulation(condition), "b (n c) -> n b 1 c", n=6)
        x = rearrange(self.stem(space_to_depth(z, self.patch)), "b c h w -> b (h w) c") + self.place
        for block in self.blocks:
            x = block(x, modulation)
        x = F.layer_norm(x, x.shape[-1:]) * (1 + self.last[0] + condition[:, None]) + self.last[1]
        return depth_to_space(rearrange(self.head(x), "b (h w) c -> b c h w", h=z.shape[2] // self.patch), self.patch)

    @torch.no_grad()
    def draw(self, noise: Tensor, label: Tensor, guidance: float, steps: int, solver: Solver) -> Tensor:
        """Latents from noise.

        Args:
            noise: N(0, I), [b, c, h, w].
            label: int64 [b], `classes` for none.
            guidance: How far past the unconditional velocity the conditional one is followed; 1 follows it as it is (Ho &
                Salimans, 2021, eq. 6, where it is 1 + w).
            steps: Of the solver, from 1.
            solver: euler evaluates the network once per step, heun twice (the last step once).

        Returns:
            [b, c, h, w], not normalised: as the decoder takes them.
        """
        plain = torch.zeros(len(noise), AUGMENTATIONS, device=noise.device)
        nothing = torch.full_like(label, self.classes)

        def velocity(z: Tensor, at: float) -> Tensor:
            time = torch.full((len(z),), at, device=z.device)
            given = self(z, time, label, plain).float()
            if guidance == 1:
                return given
            free = self(z, time, nothing, plain).float()
            return free + guidance * (given - free)

        z = noise
        for step in range(steps):
            now, then = 1 - step / steps, 1 - (step + 1) / steps
            first = velocity(z, now)
            ahead = z + (then - now) * first
            if solver == "heun" and step + 1 < steps:
                ahead = z + (then - now) * 0.5 * (first + velocity(ahead, then))
            z = ahead
        return z * self.scale + self.shift


class _Block(Block):
    """Self-attention and a two-layer network on tokens [b, n, c], each scaled, shifted and gated by the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(6, 1, 1, width) / width**0.5)
        self.own.data[[2, 5]] = 0  # the gates
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.norm_q, self.norm_k = nn.RMSNorm(HEAD), nn.RMSNorm(HEAD)
        self.mix = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = (modulation + self.own).unbind(0)
        hidden = F.layer_norm(x, x.shape[-1:]) * (1 + scale1) + shift1
        q, k, v = rearrange(self.qkv(hidden), "b t (n h c) -> n b h t c", n=3, c=HEAD)
        mixed = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v)
        x = x + gate1 * self.out(rearrange(mixed, "b h t c -> b t (h c)"))
        hidden = F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2
        return x + gate2 * self.mix(hidden)


def _waves(time: Tensor, width: int) -> Tensor:
    """Times as sines and cosines of `width / 2` frequencies: [b, width]."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=time.device) / (width // 2))
    angles = 1000 * time[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)
