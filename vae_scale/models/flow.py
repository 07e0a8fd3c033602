"""The rectified-flow prior: a transformer that maps N(0, I) to the latents of images.

With z_t = (1 - t) z + t n between a latent z (t = 0) and noise n (t = 1), the network learns the velocity n - z; sampling
integrates it from t = 1 to 0 (Liu et al., 2023, eq. 1). Its blocks are those of DiT (Peebles & Xie, 2023), with one modulation
shared by all blocks (adaLN-single, Chen et al., 2024).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vae_scale.models.blocks import Block, conv, depth_to_space, space_to_depth

AUGMENTATION_DIM = 6  # parameters of an image's augmentation, all 0 for none
HEAD_DIM = 64
Solver = Literal["euler", "heun"]


class Flow(nn.Module):
    """Predicts the velocity of normalized latents from the time, a class label and the augmentation of the image.

    Args:
        width: Channels of the transformer, a multiple of 64.
        depth: Number of blocks.
        patch: Side of the square of latents in a token.
        latent_shape: (c, h, w); h and w are multiples of `patch`.
        num_classes: Number of class labels; the label `num_classes` means no class.

    Attributes:
        latent_mean: Mean of each latent channel, [c, 1, 1].
        latent_std: Standard deviation of each latent channel under the aggregate posterior, sqrt(var(mean) + E[sigma^2]),
            [c, 1, 1]. Dividing by sqrt(var(mean)) would amplify collapsed channels, whose means are near 0 and sigmas near 1.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, width: int, depth: int, patch: int, latent_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.width, self.depth, self.patch, self.num_classes = width, depth, patch, num_classes
        channels, height, columns = latent_shape
        self.register_buffer("latent_mean", torch.zeros(channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(channels, 1, 1))
        self.patch_embed = conv(channels * patch**2, width, kernel_size=3 if height > patch else 1)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(height * columns // patch**2, width))
        self.time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label_embed = nn.Embedding(num_classes + 1, width)
        self.augmentation_embed = nn.Linear(AUGMENTATION_DIM, width, bias=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(_TransformerBlock(width) for _ in range(depth))
        self.final_modulation = nn.Parameter(torch.zeros(2, width))
        self.head = nn.Linear(width, channels * patch**2)
        nn.init.normal_(self.label_embed.weight, std=0.02)
        nn.init.normal_(self.augmentation_embed.weight, std=0.02)
        for layer in (self.modulation[1], self.head):  # adaLN-zero: blocks start as the identity, the velocity as zero
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def normalize(self, latents: Tensor) -> Tensor:
        """Returns latents with mean 0 and standard deviation 1 in each channel."""
        return (latents - self.latent_mean) / self.latent_std

    def forward(self, z: Tensor, time: Tensor, label: Tensor, augmentation: Tensor) -> Tensor:
        """Returns the velocity at `z`, [b, c, h, w].

        Args:
            z: Noisy normalized latents, [b, c, h, w].
            time: From 0 (latent) to 1 (noise), [b].
            label: int64 [b], `num_classes` for no class.
            augmentation: [b, AUGMENTATION_DIM].
        """
        condition = self.time_embed(_sinusoidal_embedding(time, self.width))
        condition = condition + self.label_embed(label) + self.augmentation_embed(augmentation)
        modulation = rearrange(self.modulation(condition), "b (n c) -> n b 1 c", n=6)
        x = rearrange(self.patch_embed(space_to_depth(z, self.patch)), "b c h w -> b (h w) c") + self.pos_embed
        for block in self.blocks:
            x = block(x, modulation)
        scale, shift = self.final_modulation
        x = F.layer_norm(x, x.shape[-1:]) * (1 + scale + condition[:, None]) + shift
        return depth_to_space(rearrange(self.head(x), "b (h w) c -> b c h w", h=z.shape[2] // self.patch), self.patch)

    @torch.no_grad()
    def sample(self, noise: Tensor, label: Tensor, guidance: float, steps: int, solver: Solver) -> Tensor:
        """Integrates the flow from noise to latents.

        Args:
            noise: Samples of N(0, I), [b, c, h, w].
            label: int64 [b], `num_classes` for no class.
            guidance: Scale of classifier-free guidance, 1 for none (1 + w in Ho & Salimans, 2021, eq. 6).
            steps: Number of steps.
            solver: euler evaluates the network once per step, heun twice (the last step once).

        Returns:
            Latents for the decoder, not normalized, [b, c, h, w].
        """
        augmentation = torch.zeros(len(noise), AUGMENTATION_DIM, device=noise.device)
        no_label = torch.full_like(label, self.num_classes)

        def velocity(z: Tensor, t: float) -> Tensor:
            time = torch.full((len(z),), t, device=z.device)
            conditional = self(z, time, label, augmentation).float()
            if guidance == 1:
                return conditional
            unconditional = self(z, time, no_label, augmentation).float()
            return unconditional + guidance * (conditional - unconditional)

        z = noise
        for step in range(steps):
            t, next_t = 1 - step / steps, 1 - (step + 1) / steps
            v = velocity(z, t)
            next_z = z + (next_t - t) * v
            if solver == "heun" and step + 1 < steps:
                next_z = z + (next_t - t) * 0.5 * (v + velocity(next_z, next_t))
            z = next_z
        return z * self.latent_std + self.latent_mean


class _TransformerBlock(Block):
    """Self-attention and an MLP on tokens [b, n, c], each scaled, shifted and gated by the modulation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, 1, 1, width) / width**0.5)
        self.scale_shift_table.data[[2, 5]] = 0  # the gates
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.norm_q, self.norm_k = nn.RMSNorm(HEAD_DIM), nn.RMSNorm(HEAD_DIM)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = (modulation + self.scale_shift_table).unbind(0)
        hidden = F.layer_norm(x, x.shape[-1:]) * (1 + scale1) + shift1
        q, k, v = rearrange(self.qkv(hidden), "b t (n h c) -> n b h t c", n=3, c=HEAD_DIM)
        attended = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v)
        x = x + gate1 * self.out(rearrange(attended, "b h t c -> b t (h c)"))
        hidden = F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2
        return x + gate2 * self.mlp(hidden)


def _sinusoidal_embedding(time: Tensor, width: int) -> Tensor:
    """Returns sines and cosines of `width / 2` frequencies, [b, width]."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=time.device) / (width // 2))
    angles = 1000 * time[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)
