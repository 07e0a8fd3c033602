"""What changes during training, as functions of the images seen."""

import math

from vae_scale.config import ObjectiveConfig, OptimizerConfig

FINAL_SHARE = 0.01  # of the learning rate, at the end of the cosine


def learning_rate(config: OptimizerConfig, images_seen: int, images: int) -> float:
    """Linear warm-up, then constant or a cosine that reaches a hundredth at the last of `images`."""
    if images_seen < config.warmup:
        return config.lr * (images_seen + 1) / (config.warmup + 1)
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (images_seen - config.warmup) / max(1, images - config.warmup))
    share = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (FINAL_SHARE + (1 - FINAL_SHARE) * share)


def kl_weight(config: ObjectiveConfig, images_seen: int) -> float:
    """Beta after its linear warm-up."""
    return config.beta * min(1.0, (images_seen + 1) / (config.beta_warmup + 1))
