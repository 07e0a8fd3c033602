"""The benchmarks: reports, FLOP counts, and checks of the images that loaders return."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import compare_loaders
import numpy as np
import pytest
import step_parts
import torch
from compare_loaders import check_peer, shuffle_quality
from conftest import TINY
from loader_peers import Peer
from torch import Tensor, nn

from vae_scale.bench import main, parse_training_options
from vae_scale.benchmark import data, measuring, training
from vae_scale.data.shards import ShardSet
from vae_scale.errors import UserError


def test_data_report_is_printed_and_written(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data, "SECONDS", 0.05)
    main(["data", "--shards", str(shards), "--batch=16", "--repeats=2", "--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ratios"]["of_gather_limit"] > 0
    assert set(report["speeds"]) == {data.LIMIT, "vae_scale, npy", "webdataset", "torchvision"}
    assert set(report["ratios"]) == {"of_gather_limit", "over_webdataset", "over_torchvision"}
    assert all(len(runs) == 2 and min(runs) > 0 for runs in report["speeds"].values())
    assert torch.__version__.startswith(report["machine"]["torch"])
    assert "of_gather_limit" in capsys.readouterr().out


def test_all_loaders_are_compared(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SECONDS", 0.05)
    compare_loaders.main(["--shards", str(shards), "--batch=16", "--repeats=1", "--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ratios"].keys() >= {"of_gather_limit", "over_webdataset", "png_over_webdataset", "jpg_over_webdataset"}
    assert [line["window"] for line in report["shuffle"]] == [1, 4, 9, None]


def test_bare_step_unscales_gradients(shards: Path) -> None:
    config = parse_training_options([f"--data.shards={shards}", *TINY])
    moments = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        with training.open_trainer(config) as measured:
            measured.trainer.accelerator.scaler = scaler
            measured.step()
            adamw = measured.trainer.optimizer_step.adamw
            moments.append(torch.cat([state["exp_avg"].flatten() for state in adamw.state.values()]))
    torch.testing.assert_close(moments[0], moments[1], rtol=1e-3, atol=1e-6)


def test_larger_windows_shuffle_better_and_a_window_of_all_shards_is_a_permutation() -> None:
    one, four, all_shards, permutation = shuffle_quality([50] * 20, 10, [1, 4, 20])
    assert one.same_shard > 0.95 > four.same_shard > all_shards.same_shard
    assert one.neighbors > four.neighbors > all_shards.neighbors
    for quality in (one, four, all_shards):
        assert quality.displacement == pytest.approx(1 / 3, abs=0.05)
    assert all_shards.same_shard == pytest.approx(permutation.same_shard, abs=0.02)
    assert all_shards.neighbors == pytest.approx(2 / 1000, abs=0.002)


def correct_peer(images: np.ndarray) -> Peer:
    def epoch() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(images)).split(8):
            yield torch.from_numpy(images[rows.numpy()]), rows

    return Peer("correct", "webdataset", True, epoch, lambda images: images)


def test_loader_that_returns_wrong_images_is_refused(shards: Path) -> None:
    shard_set = ShardSet.open(shards)
    images = shard_set.load_images(np.arange(len(shard_set)))
    peer = correct_peer(images)
    check_peer(peer, images)
    wrong = replace(peer, pixels=lambda images: images.roll(1, 0))
    with pytest.raises(UserError, match=r"correct: image \d+ differs from the set's"):
        check_peer(wrong, images)
    lossy = replace(wrong, pixels=lambda images: (images.int() + 1).clamp(max=255).to(torch.uint8), lossless=False)
    check_peer(lossy, images)
    fewer = replace(peer, epoch=lambda: iter(list(peer.epoch())[:-1]))
    with pytest.raises(UserError, match=r"correct: \d+ of 180 images are missing"):
        check_peer(fewer, images)


def test_too_few_images_are_refused(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "--shards", str(shards)])
    assert "180 images are too few to measure batches of 256" in capsys.readouterr().err


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short runs on small matrices."""
    monkeypatch.setattr(training, "SECONDS", 0.2)
    monkeypatch.setattr(measuring, "SIDES", {"cpu": 256})


@pytest.mark.usefixtures("quick")
def test_the_trainer_is_compared_with_its_step(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--data.shards={shards}", *TINY, f"--run={tmp_path / 'run'}", "--optimizer.max_grad_norm=0.5"]
    main(["train", *options, "--repeats=2", "--json", str(tmp_path / "report.json"), "--profile", str(tmp_path / "traces")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["speeds"]) == [training.STEP, training.TRAIN]
    assert all(len(runs) == 2 and min(runs) > 0 for runs in report["speeds"].values())
    ratios = report["ratios"]
    assert 0 < ratios["mfu"] < 1.5
    assert 0.1 < ratios["train_over_step"] < 1.5
    assert 0 <= ratios["data_wait"] < 1
    assert report["batch"] == 12
    assert report["precision"] == "fp32"
    assert json.loads((tmp_path / "traces" / "train.json").read_text())["traceEvents"]
    assert not (tmp_path / "run").exists()
    assert "train_over_step" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_step_report_has_no_trainer(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["step", f"--data.shards={shards}", *TINY, "--repeats=1", "--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["ratios"]) == {"mfu"}
    assert set(report["speeds"]) == {training.STEP}
    assert "training step" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_parts_of_a_step_are_measured(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--data.shards={shards}", *TINY, "--train.gradient_accumulation_steps=2"]
    step_parts.main([*options, "--json", str(tmp_path / "parts.json")])
    parts = json.loads((tmp_path / "parts.json").read_text())["parts"]
    names = {"data wait", "random inputs", "forward", "backward", "clip and optimizer", "EMA", "logging", "checkpoint stall"}
    assert set(parts) == names | {"other"}
    assert all(parts[name]["ms_each"] > 0 for name in names)
    assert parts["forward"]["ms_per_step"] == pytest.approx(2 * parts["forward"]["ms_each"])  # two microbatches
    assert parts["logging"]["ms_per_step"] == pytest.approx(parts["logging"]["ms_each"] / 5)
    assert parts["checkpoint stall"]["ms_per_step"] == pytest.approx(parts["checkpoint stall"]["ms_each"] * 12 / 500_000)
    assert "checkpoint stall" in capsys.readouterr().out


def test_measuring_the_step_does_not_change_the_weights(shards: Path) -> None:
    with training.open_trainer(parse_training_options([f"--data.shards={shards}", *TINY])) as measured:
        weights = [parameter.clone() for parameter in measured.trainer.model.parameters()]
        measured.step()
        assert all(map(torch.equal, weights, measured.trainer.model.parameters()))
        measured.train()
        assert not all(map(torch.equal, weights, measured.trainer.model.parameters()))


def test_flops_match_a_manual_count() -> None:
    linear = nn.Linear(7, 5)  # the gradient of the weights costs as much as the product; the input needs no gradient
    assert training.count_flops(lambda: linear(torch.randn(3, 7)).sum()) == 2 * (2 * 3 * 7 * 5)
    convolution = nn.Conv2d(4, 6, 3, padding=1)
    images = torch.randn(2, 4, 8, 8, requires_grad=True)
    assert training.count_flops(lambda: convolution(images).sum()) == 3 * (2 * 2 * 6 * 8 * 8 * 4 * 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data", "--shards=x", "--model.width=3"], "unrecognized arguments: --model.width=3"),
        (["step", "--train.bacth_size=3"], "train.bacth_size"),
        (["train", "--data.shards=nowhere"], "nowhere"),
        (["train", "--dry-run"], "--dry-run is an option of python -m vae_scale.train"),
        (["train", "--repeats=0"], "argument --repeats: 0; it must be at least 1"),
    ],
)
def test_invalid_options_are_reported_in_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(options)
    assert message in capsys.readouterr().err.splitlines()[-1]
