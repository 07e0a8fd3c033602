"""Every random draw is keyed by what it depends on: seed, images seen or sample number, purpose.

So it does not depend on how many processes there are, on batch sizes, or on what was drawn before. It does depend on the
device: torch's generator for CUDA gives other numbers than that for CPUs, and beyond about a million numbers in one call its
numbers also depend on the model of the GPU (on how many threads it runs at once). Processes of one run need GPUs of one model
to draw the same noise on any number of them; a run that moves to another model goes on with other noise.
"""

import hashlib

import torch
from torch import Tensor


def key(*parts: int | str) -> int:
    """A number in [0, 2^63) for one random draw, from what it depends on."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """A generator on `device` for one random draw."""
    return torch.Generator(device).manual_seed(key(*parts))


def noise_of_each(numbers: range, shape: tuple[int, ...], *parts: int | str) -> Tensor:
    """N(0, I) noise on the CPU, each entry keyed by `parts` and its own number: [len(numbers), *shape]."""
    return torch.stack([torch.randn(shape, generator=generator("cpu", *parts, number)) for number in numbers])
