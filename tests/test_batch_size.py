"""`train.batch_size auto`."""

from pathlib import Path

import pytest
import torch

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
        batch_size._saved_bytes(lambda images: model(torch.zeros(images, 1000)).sum().backward(), images)
        for images in (2, 4, 6)
    )
    assert four - two == six - four == 2 * 2 * 1000 * 4  # input and output, fp32


@pytest.mark.parametrize("most", [0, 1, 5, 12, 24, 40, 10**9])
def test_batch_size_on_a_gpu_is_the_largest_that_trains(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fractions, tried = torch.nn.Linear(1000, 1), [], []
    for name, value in {"mem_get_info": (10**6, 2 * 10**6), "memory_reserved": 0, "memory_allocated": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: fractions.append(fraction))
    monkeypatch.setattr(torch, "tensor", lambda values, device, tensor=torch.tensor: tensor(values))

    def loss_fn(images: int) -> torch.Tensor:
        tried.append(images)
        if images > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model(torch.zeros(images, 1000)).sum()

    def find() -> int:
        return batch_size.find_batch_size(loss_fn, model.parameters(), torch.device("cuda"), 6, 200, 2, SINGLE_PROCESS)

    if most < 3:
        with pytest.raises(UserError, match="not even 6 images fit"):
            find()
    else:
        assert find() == {5: 6, 12: 24, 24: 48, 40: 48, 10**9: 192}[most]
        assert max(tried) <= 96
    assert fractions == [pytest.approx(0.45, abs=0.01), 1.0]
    assert all(parameter.grad is None for parameter in model.parameters())


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
