"""Image augmentation."""

import torch

from vae_scale.config.options import DataConfig
from vae_scale.training.augmentation import augment, random_parameters

IMAGES = torch.rand(6, 3, 24, 24) * 2 - 1


def test_zero_parameters_leave_images_unchanged() -> None:
    assert torch.allclose(augment(IMAGES, torch.zeros(6, 6), 0.5, 0.5), IMAGES, atol=1e-5)


def test_parameters_of_disabled_augmentations_are_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    assert not random_parameters(DataConfig(), 8, generator).any()
    crop = random_parameters(DataConfig(random_crop=0.3), 8, generator)
    assert crop[:, :3].all()
    assert not crop[:, 3:].any()
    jitter = random_parameters(DataConfig(color_jitter=0.3), 8, generator)
    assert not jitter[:, :3].any()
    assert jitter[:, 3:].all()


def test_a_crop_enlarges_a_part_of_the_image() -> None:
    parameters = torch.tensor([[1.0, -1.0, -1.0, 0, 0, 0]])  # maximum zoom, upper left corner
    ramp = torch.linspace(-1, 1, 24).expand(1, 3, 24, 24)
    cropped = augment(ramp, parameters, 0.5, 0.0)
    assert cropped.min() >= ramp.min() - 1e-5
    assert cropped.max() <= ramp[..., :13].max() + 1e-5
    steps = cropped[0, 0, 0].diff()
    assert torch.allclose(steps[2:-2].mean(), ramp[0, 0, 0].diff().mean() / 2, rtol=0.05)


def test_color_jitter_follows_its_parameters_and_stays_in_range() -> None:
    brighter = augment(0.5 * IMAGES, torch.tensor([[0, 0, 0, 1.0, 0, 0]]).expand(6, 6), 0.0, 0.4)
    assert torch.allclose(brighter.mean(), 0.5 * IMAGES.mean() + 0.4, atol=0.02)
    desaturated = augment(IMAGES, torch.tensor([[0, 0, 0, 0, 0, -1.0]]).expand(6, 6), 0.0, 0.9)
    assert (desaturated.std(1) < 0.2 * IMAGES.std(1)).all()
    strongest = augment(IMAGES, torch.ones(6, 6), 0.9, 0.9)
    assert strongest.abs().max() <= 1


def test_autocast_does_not_change_crops() -> None:
    parameters = torch.rand(6, 6) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        autocast = augment(IMAGES, parameters, 0.5, 0.0)
    assert torch.equal(autocast, augment(IMAGES, parameters, 0.5, 0.0))
