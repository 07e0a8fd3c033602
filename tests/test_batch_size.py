"""`train.batch_size auto`."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import COUNTS, TINY
from hypothesis import given
from hypothesis import strategies as st

from launch import train
from vae_scale.config import parse
from vae_scale.errors import UserError
from vae_scale.training import batch_size, checkpoint
from vae_scale.training.evaluation import ALONE
from vae_scale.training.trainer import Trainer

IMAGES = COUNTS["train"] + COUNTS["unlabeled"]


def words(shards: Path, run: Path, *more: str) -> list[str]:
    return [f"--data.shards={shards}", f"--run={run}", *TINY, "--track.tracker=none", "--train.batch_size=auto", *more]


def test_it_is_the_largest_that_the_set_allows_and_a_resumed_run_keeps_it(shards: Path, tmp_path: Path) -> None:
    told = train(2, *words(shards, tmp_path, "--train.accumulation=3", "--train.images=96"))
    assert "train.batch_size auto: 96 images" in told  # 2 processes x 3 pieces x 2^4, of 150 images
    folder = checkpoint.newest(tmp_path)
    assert folder is not None
    assert checkpoint.load(folder)[0]["config"]["train"]["batch_size"] == 96
    trainer = Trainer(parse(words(shards, tmp_path, "--train.images=192"))[0])
    assert trainer.config.train.batch == 96
    assert trainer.images_seen == 96


def test_memory_decides_and_nothing_is_trained(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(parse([*words(shards, tmp_path), "--train.batch_size=12"])[0])
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}

    def found(share: float, unit: int = 3) -> int:
        monkeypatch.setattr(batch_size, "OF_HOST", share)
        return batch_size.largest_batch(trainer.stage, trainer.stage.objective, (96, 96, 3), unit, 10**6, 1, nullcontext, ALONE)

    little, much = found(0.01), found(0.1)
    assert little % 3 == 0
    assert much > little >= 3
    with pytest.raises(UserError, match="not even 3 images fit"):
        found(0.0)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_what_is_counted_grows_with_the_batch_and_not_with_the_weights(shards: Path, tmp_path: Path) -> None:
    trainer = Trainer(parse([*words(shards, tmp_path), "--train.batch_size=12"])[0])

    def loss(count: int) -> torch.Tensor:
        images = torch.zeros(count, 96, 96, 3, dtype=torch.uint8)
        return trainer.stage.objective(images, trainer.stage.draws(0, count), *trainer.stage.arguments(0))[0]

    two, four, six = (batch_size._kept(loss, count) for count in (2, 4, 6))
    assert four - two == pytest.approx(six - four, rel=0.01)
    assert four - two > 2 * 96 * 96 * 3 * 4  # more than the images themselves, in fp32


@given(
    weights=st.integers(0, 10**9), of_one=st.integers(1, 10**8), available=st.integers(0, 10**11), first=st.integers(1, 5),
    error=st.floats(0.5, 2),
)  # fmt: skip
def test_the_largest_number_of_images_that_fits_is_found_even_where_the_forecast_is_off(
    weights: int, of_one: int, available: int, first: int, error: float
) -> None:
    counts = [first * 2**power for power in range(12)]

    def can_train(count: int) -> bool:
        return weights + count * of_one <= available

    def peak(count: int) -> int:
        return int(weights + count * of_one * error)

    few = next(count for count in counts if count >= batch_size.FEW)
    found = batch_size.largest_fitting(counts, can_train, peak, few, available)
    best = max(filter(can_train, counts), default=0)
    assert found == 0 or can_train(found)
    if error <= 1 or best < 2 * few:
        assert found == best
    else:
        assert found >= best // 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", True),
        ("CUDA error: out of memory", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_memory_that_cannot_be_had_is_recognised_whichever_library_says_so(text: str, expected: bool) -> None:
    assert batch_size.is_out_of_memory(RuntimeError(text)) is expected
    assert batch_size.is_out_of_memory(torch.OutOfMemoryError("no text"))


def test_commands_that_need_a_number_ask_for_one(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vae_scale.bench import main as bench
    from vae_scale.train import main

    main([*words(shards, tmp_path), "--dry-run"])
    assert "as many images each as fit into memory" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench(["scaling", "--step-ms=10", *words(shards, tmp_path)])
    assert "train.batch_size is auto" in capsys.readouterr().err
