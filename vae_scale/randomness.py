"""Random numbers that depend only on seed, purpose, and position (images seen or sample number).

They do not depend on the number of processes, the batch size or earlier draws. They depend on the device: CUDA and CPU
generators differ, and GPU models differ above about a million numbers per call. Noise is the same for any number of processes
if all GPUs are of the same model.
"""

import hashlib

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """Returns a seed in [0, 2^63), a hash of `parts`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def make_generator(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """Returns a generator on `device`, seeded by `derive_seed(*parts)`."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))


def per_sample_noise(numbers: range, shape: tuple[int, ...], *parts: int | str) -> Tensor:
    """Returns N(0, I) noise on the CPU, each sample seeded by `parts` and its number: [len(numbers), *shape]."""
    return torch.stack([torch.randn(shape, generator=make_generator("cpu", *parts, number)) for number in numbers])
