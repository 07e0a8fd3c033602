"""`train.batch_size auto`."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch import train, train_options
from vae_scale.config.parsing import parse
from vae_scale.errors import UserError
from vae_scale.runtime import batch_size, checkpoint
from vae_scale.runtime.distributed import SINGLE_PROCESS
from vae_scale.training.trainer import Trainer

CPU = torch.device("cpu")


def auto_options(shards: Path, run: Path, *more: str) -> list[str]:
    return train_options(shards, run, "--train.batch_size=auto", *more)


def test_batch_size_is_the_largest_possible_and_kept_on_resume(shards: Path, tmp_path: Path) -> None:
    output = train(2, *auto_options(shards, tmp_path, "--train.gradient_accumulation_steps=3", "--train.images=96"))
    assert "train.batch_size auto: 96 images" in output  # 2 ranks x 3 microbatches x 2^4, of 150 images
    folder = checkpoint.newest_checkpoint(tmp_path)
    assert folder is not None
    assert checkpoint.load_checkpoint(folder)[0]["config"]["train"]["batch_size"] == 96
    trainer = Trainer(parse(auto_options(shards, tmp_path, "--train.images=192"))[0])
    assert trainer.config.train.global_batch_size == 96
    assert trainer.images_seen == 96


def test_batch_size_on_the_host_follows_available_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2**14, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    initial = [parameter.detach().clone() for parameter in model.parameters()]

    def find(fraction: float) -> int:
        monkeypatch.setattr(batch_size, "HOST_MEMORY_FRACTION", fraction)
        return batch_size.find_batch_size(
            lambda count: model(torch.zeros(count, 2**14)).sum(), model.parameters(), CPU, 3, 10**8, 1, SINGLE_PROCESS
        )

    small, large = find(0.01), find(0.1)
    assert small % 3 == 0
    assert large > small >= 3
    with pytest.raises(UserError, match="not even 3 images fit"):
        find(0.0)
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), initial, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_saved_bytes_grow_with_the_batch_and_not_with_the_weights() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1000, 1000), torch.nn.Tanh())
    two, four, six = (
        batch_size._saved_bytes(lambda count: model(torch.zeros(count, 1000)).sum(), count) for count in (2, 4, 6)
    )
    assert four - two == six - four == 2 * 2 * 1000 * 4  # input and output, fp32


@given(
    weights=st.integers(0, 10**9),
    bytes_per_image=st.integers(1, 10**8),
    available=st.integers(0, 10**11),
    smallest=st.integers(1, 5),
    error=st.floats(0.5, 2),
)
def test_largest_batch_is_found_despite_a_wrong_prediction(
    weights: int, bytes_per_image: int, available: int, smallest: int, error: float
) -> None:
    counts = [smallest * 2**power for power in range(12)]

    def can_train(count: int) -> bool:
        return weights + count * bytes_per_image <= available

    def measure_peak(count: int) -> int:
        return int(weights + count * bytes_per_image * error)

    probe = next(count for count in counts if count >= batch_size.MIN_PROBE_IMAGES)
    result = batch_size.find_max_images(counts, can_train, measure_peak, probe, available)
    largest = max(filter(can_train, counts), default=0)
    assert result == 0 or can_train(result)
    if error <= 1 or largest < 2 * probe:
        assert result == largest
    else:
        assert result >= largest // 4


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", True),
        ("CUDA error: out of memory", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_out_of_memory_errors_are_recognized(message: str, expected: bool) -> None:
    assert batch_size.is_out_of_memory(RuntimeError(message)) is expected
    assert batch_size.is_out_of_memory(torch.OutOfMemoryError("no text"))


def test_dry_run_accepts_an_automatic_batch_size(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vae_scale.train import main

    main([*auto_options(shards, tmp_path), "--dry-run"])
    assert "steps" in capsys.readouterr().out
