"""Augmentation, and that what it was told keeps it out of samples."""

import torch

from vae_scale.config import DataConfig
from vae_scale.training import augmentation
from vae_scale.training.augmentation import augment

IMAGES = torch.rand(6, 3, 24, 24) * 2 - 1


def test_zeros_leave_an_image_as_it_is() -> None:
    assert torch.allclose(augment(IMAGES, torch.zeros(6, 6), 0.5, 0.5), IMAGES, atol=1e-5)


def test_what_is_off_is_zero_and_changes_nothing() -> None:
    source = torch.Generator().manual_seed(0)
    assert not augmentation.draw(DataConfig(), 8, source).any()
    cropped = augmentation.draw(DataConfig(crop=0.3), 8, source)
    assert cropped[:, :3].all()
    assert not cropped[:, 3:].any()
    coloured = augmentation.draw(DataConfig(colour=0.3), 8, source)
    assert not coloured[:, :3].any()
    assert coloured[:, 3:].all()


def test_a_crop_is_a_part_of_the_image_enlarged() -> None:
    numbers = torch.tensor([[1.0, -1.0, -1.0, 0, 0, 0]])  # as far in as allowed, at the upper left
    ramp = torch.linspace(-1, 1, 24).expand(1, 3, 24, 24)
    cropped = augment(ramp, numbers, 0.5, 0.0)
    assert cropped.min() >= ramp.min() - 1e-5
    assert cropped.max() <= ramp[..., :13].max() + 1e-5
    steps = cropped[0, 0, 0].diff()
    assert torch.allclose(steps[2:-2].mean(), ramp[0, 0, 0].diff().mean() / 2, rtol=0.05)


def test_colours_stay_in_range_and_move_as_told() -> None:
    brighter = augment(0.5 * IMAGES, torch.tensor([[0, 0, 0, 1.0, 0, 0]]).expand(6, 6), 0.0, 0.4)
    assert torch.allclose(brighter.mean(), 0.5 * IMAGES.mean() + 0.4, atol=0.02)
    grey = augment(IMAGES, torch.tensor([[0, 0, 0, 0, 0, -1.0]]).expand(6, 6), 0.0, 0.9)
    assert (grey.std(1) < 0.2 * IMAGES.std(1)).all()
    strong = augment(IMAGES, torch.ones(6, 6), 0.9, 0.9)
    assert strong.abs().max() <= 1


def test_under_autocast_no_pixel_moves() -> None:
    numbers = torch.rand(6, 6) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        lowered = augment(IMAGES, numbers, 0.5, 0.0)
    assert torch.equal(lowered, augment(IMAGES, numbers, 0.5, 0.0))
