"""The rectified-flow prior: a U-Net that maps N(0, I) to the latents of images.

With z_t = (1 - t) z + t n between a latent z (t = 0) and noise n (t = 1), the network learns the velocity n - z; sampling
integrates it from t = 1 to 0 (Liu et al., 2023, eq. 1) by Heun's method. The U-Net is that of Ho et al. (2020, appendix B) with
two resolutions and self-attention at the lower one.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_scale.models.blocks import Attention, Downsample, ResBlock, Upsample, conv, group_norm

AUGMENTATION_DIM = 6  # parameters of an image's augmentation, all 0 for none
TIME_FREQUENCIES = 64


class Flow(nn.Module):
    """Predicts the velocity of normalized latents from the time, a class label and the augmentation of the image.

    Latents of odd height or width have a single resolution, without the blocks around the middle.

    Args:
        width: Channels; twice as many at the lower resolution. A multiple of 32.
        depth: Residual blocks before and after the middle. The middle has twice as many, each followed by self-attention.
        latent_shape: (c, h, w).
        num_classes: Number of class labels; the label `num_classes` means no class.
        clustered: Whether the classes are clusters of the latents instead of labels of the images.

    Attributes:
        latent_mean: Mean of each latent channel, [c, 1, 1].
        latent_std: Standard deviation of each latent channel under the aggregate posterior, sqrt(var(mean) + E[sigma^2]),
            [c, 1, 1]. Dividing by sqrt(var(mean)) would amplify collapsed channels, whose means are near 0 and sigmas near 1.
        cluster_centers: Centers of the clusters of normalized posterior means, [num_classes, c * h * w]; None without clusters.
        class_probs: Frequency of each label, the last of no class, from which `sample_labels` draws: [num_classes + 1].
    """

    latent_mean: Tensor
    latent_std: Tensor
    class_probs: Tensor
    cluster_centers: Tensor | None

    def __init__(
        self, width: int, depth: int, latent_shape: tuple[int, int, int], num_classes: int, clustered: bool = False
    ) -> None:
        super().__init__()
        self.width, self.depth, self.num_classes = width, depth, num_classes
        channels, height, columns = latent_shape
        self.register_buffer("latent_mean", torch.zeros(channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(channels, 1, 1))
        self.register_buffer("class_probs", F.one_hot(torch.tensor(num_classes), num_classes + 1).float())
        centers = torch.zeros(num_classes, channels * height * columns) if clustered else None
        self.register_buffer("cluster_centers", centers)
        self.two_levels = height % 2 == 0 and columns % 2 == 0
        outer, middle, kernel_size = width, 2 * width, 3 if max(height, columns) > 1 else 1
        condition = middle

        def res_block(channels: int) -> nn.Module:
            return _ConditionalResBlock(channels, condition, kernel_size)

        self.time_embed = nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, condition), nn.SiLU(), nn.Linear(condition, condition))
        self.label_embed = nn.Embedding(num_classes + 1, condition)
        self.augmentation_embed = nn.Linear(AUGMENTATION_DIM, condition, bias=False)
        for layer in (self.label_embed, self.augmentation_embed):
            nn.init.normal_(layer.weight, std=0.02)
        first = outer if self.two_levels else middle
        self.stem = conv(channels, first, kernel_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, first, height, columns))
        if self.two_levels:
            self.down = nn.ModuleList(res_block(outer) for _ in range(depth))
            self.downsample, self.upsample = Downsample(outer, middle), Upsample(middle, outer)
            self.merge = conv(2 * outer, outer, kernel_size=1)
            self.up = nn.ModuleList(res_block(outer) for _ in range(depth))
        self.middle = nn.ModuleList(layer for _ in range(2 * depth) for layer in (res_block(middle), Attention(middle)))
        self.norm = group_norm(first)
        self.head = conv(first, channels, kernel_size, zero_init=True)

    def normalize(self, latents: Tensor) -> Tensor:
        """Returns latents with mean 0 and standard deviation 1 in each channel."""
        return (latents - self.latent_mean) / self.latent_std

    def assign_classes(self, labels: Tensor, means: Tensor) -> Tensor:
        """Returns the class of each image for `forward`, int64 [b].

        Args:
            labels: Labels of the images, int64 [b]; see `mask_unknown`. Not used with clusters.
            means: Posterior means, not normalized, [b, c, h, w], which determine the clusters.
        """
        if self.cluster_centers is None:
            return self.mask_unknown(labels)
        return torch.cdist(self.normalize(means).flatten(1), self.cluster_centers).argmin(1)

    def mask_unknown(self, labels: Tensor) -> Tensor:
        """Returns labels, int64 [b], in which those without a class name are replaced by `num_classes`."""
        return torch.where((labels >= 0) & (labels < self.num_classes), labels, self.num_classes)

    def sample_labels(self, uniform: Tensor) -> Tensor:
        """Returns labels with the frequencies `class_probs`, int64 [b], from uniform random numbers in [0, 1), [b]."""
        bounds = self.class_probs.double().cumsum(0)
        return torch.searchsorted(bounds, uniform.to(bounds), right=True).clamp(max=self.num_classes)

    def forward(self, z: Tensor, time: Tensor, label: Tensor, augmentation: Tensor) -> Tensor:
        """Returns the velocity at `z`, [b, c, h, w].

        Args:
            z: Noisy normalized latents, [b, c, h, w].
            time: From 0 (latent) to 1 (noise), [b].
            label: int64 [b], `num_classes` for no class.
            augmentation: [b, AUGMENTATION_DIM].
        """
        embedding = self.time_embed(_sinusoidal_embedding(time))
        condition = F.silu(embedding + self.label_embed(label) + self.augmentation_embed(augmentation))
        x = self.stem(z) + self.pos_embed
        if self.two_levels:
            for block in self.down:
                x = block(x, condition)
            x = self.merge(torch.cat([x, self.upsample(self._middle(self.downsample(x), condition))], 1))
            for block in self.up:
                x = block(x, condition)
        else:
            x = self._middle(x, condition)
        return self.head(F.silu(self.norm(x)))

    def _middle(self, x: Tensor, condition: Tensor) -> Tensor:
        for block in self.middle:
            x = block(x) if isinstance(block, Attention) else block(x, condition)
        return x

    @torch.no_grad()
    def sample(self, noise: Tensor, label: Tensor, guidance: float, steps: int, guide: "Flow | None" = None) -> Tensor:
        """Integrates the flow from noise to latents.

        Args:
            noise: Samples of N(0, I), [b, c, h, w].
            label: int64 [b], `num_classes` for no class.
            guidance: Scale by which the velocity is extrapolated from that of the guide, 1 for none.
            steps: Steps of Heun's method, which evaluates the network twice per step, but once in the last.
            guide: A flow that has learned less (autoguidance; Karras et al., 2024, eq. 3), or None for no guidance.

        Returns:
            Latents for the decoder, not normalized, [b, c, h, w].
        """
        augmentation = torch.zeros(len(noise), AUGMENTATION_DIM, device=noise.device)

        def velocity(z: Tensor, t: float) -> Tensor:
            time = torch.full((len(z),), t, device=z.device)
            own = self(z, time, label, augmentation).float()
            if guide is None or guidance == 1:
                return own
            other = guide(z, time, label, augmentation).float()
            return other + guidance * (own - other)

        z = noise
        for step in range(steps):
            t, next_t = 1 - step / steps, 1 - (step + 1) / steps
            v = velocity(z, t)
            next_z = z + (next_t - t) * v
            if step + 1 < steps:
                next_z = z + (next_t - t) * 0.5 * (v + velocity(next_z, next_t))
            z = next_z
        return z * self.latent_std + self.latent_mean


class _ConditionalResBlock(ResBlock):
    """A residual block whose second normalization is scaled and shifted by a condition [b, c] (Dhariwal & Nichol, 2021)."""

    def __init__(self, channels: int, condition_channels: int, kernel_size: int) -> None:
        super().__init__(channels, kernel_size)
        self.modulation = nn.Linear(condition_channels, 2 * channels)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, 1)
        hidden = self.norm2(self.conv1(F.silu(self.norm1(x))))
        return x + self.conv2(F.silu(hidden * (1 + scale) + shift))


def _sinusoidal_embedding(time: Tensor) -> Tensor:
    """Returns cosines and sines of `TIME_FREQUENCIES` frequencies, [b, 2 * TIME_FREQUENCIES]."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(TIME_FREQUENCIES, device=time.device) / TIME_FREQUENCIES)
    angles = 1000 * time[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)
