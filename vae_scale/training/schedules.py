"""Schedules as functions of the number of images seen."""

import math

from vae_scale.config.options import ObjectiveConfig, OptimizerConfig

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


def kl_weight(config: ObjectiveConfig, images_seen: int) -> float:
    """Returns beta, the weight of the KL divergence, with linear warm-up."""
    return config.beta * min(1.0, (images_seen + 1) / (config.beta_warmup_images + 1))
