"""Steps of the optimizer: clipped as torch clips, left out where they must be, and never waiting for the device."""

import copy
import json
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from torch import Tensor, nn
from torch.profiler import profile

from launch import DDP, FSDP2, losses, train
from vae_scale.config import OptimizerConfig, parse
from vae_scale.errors import UserError
from vae_scale.models.vae import VAE
from vae_scale.training import checkpoint
from vae_scale.training.stages import Stage
from vae_scale.training.trainer import MOST_LEFT_OUT, Trainer
from vae_scale.training.update import Update


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 2, 3))


def gradients(model: nn.Module, factor: float = 1.0) -> None:
    torch.manual_seed(1)
    (factor * model(torch.randn(4, 3, 8, 8))).square().sum().backward()


def update_of(model: nn.Module, scaler: torch.amp.GradScaler | None = None, **options: Any) -> Update:
    return Update([{"params": list(model.parameters())}], OptimizerConfig(**options), scaler)


def state_of(update: Update, model: nn.Module) -> dict[str, Tensor]:
    moments = {name: value.clone() for name, value in update.tensors(model.named_parameters())}
    return moments | {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("clip", [None, 0.5, 1e9])
def test_a_step_is_that_of_torchs_clipping_and_adamw(clip: float | None) -> None:
    ours, theirs = network(), network()
    update = update_of(ours, clip=clip)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(3):
        gradients(ours)
        gradients(theirs)
        norm, taken = update.step(0.01)
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), clip or float("inf"))
        adamw.step()
        adamw.zero_grad()
        assert taken
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
        assert mine.grad is None


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e6])
def test_a_gradient_that_is_not_finite_or_too_long_moves_nothing(factor: float) -> None:
    model = network()
    update = update_of(model, skip=1e4)
    gradients(model)
    assert update.step(0.01)[1]
    before = state_of(update, model)
    gradients(model, factor)
    assert not update.step(0.01)[1]
    after = state_of(update, model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    gradients(model)
    assert update.step(0.01)[1]
    assert not torch.equal(before["0.weight"], model.state_dict()["0.weight"])


def test_a_scaled_loss_takes_the_same_step_and_an_overflow_lowers_the_scale() -> None:
    plain, scaled = network(), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    updates = update_of(plain, clip=0.5), update_of(scaled, scaler, clip=0.5)
    gradients(plain)
    torch.manual_seed(1)
    scaler.scale(scaled(torch.randn(4, 3, 8, 8)).square().sum()).backward()
    (norm, _), (again, taken) = (update.step(0.01) for update in updates)
    assert taken
    assert again.item() == pytest.approx(norm.item(), rel=1e-6)
    for one, other in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    before = copy.deepcopy(scaled.state_dict())
    scaler.scale(scaled(torch.randn(4, 3, 8, 8)).square().sum() * float("inf")).backward()
    assert not updates[1].step(0.01)[1]
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(before[name], value) for name, value in scaled.state_dict().items())


def test_a_finite_gradient_beyond_skip_moves_nothing_where_the_loss_is_scaled_either() -> None:
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    update = update_of(model, scaler, skip=1e-6)
    torch.manual_seed(1)
    scaler.scale(model(torch.randn(4, 3, 8, 8)).square().sum()).backward()
    before = copy.deepcopy(model.state_dict())
    norm, taken = update.step(0.01)
    assert norm > 1e-6
    assert not taken
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert scaler.get_scale() == 1024.0  # the gradient did not overflow


def trainer_of(shards: Path, run: Path, *more: str) -> Trainer:
    return Trainer(parse([f"--data.shards={shards}", f"--run={run}", *TINY, "--track.tracker=none", *more])[0])


def test_between_two_log_lines_nothing_waits_for_the_device(shards: Path, tmp_path: Path) -> None:
    trainer = trainer_of(shards, tmp_path, "--train.images=100000", "--train.log_every=100")
    with closing(trainer._batches()) as batches, trainer._progress():
        for batch in islice(batches, 2):
            trainer._advance(batch)
        with profile() as found:
            for batch in islice(batches, 3):
                trainer._advance(batch)
    events = found.events()
    assert "aten::convolution_backward" in {event.name for event in events}
    assert waits(events) == {"aten::_fused_adamw_"}  # whose kernel for CPUs reads the number of steps; that for GPUs does not


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def waits(events: Iterable[Any]) -> set[str | None]:
    """From which operators a number is fetched to Python or to the host."""
    items = [event for event in events if event.name == "aten::item"]
    return {item.cpu_parent.name if item.cpu_parent else None for item in items}


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """The numbers of images seen at which the noise of a batch is not a number."""
    places: set[int] = set()
    original = Stage._normal

    def normal(self: Stage, images_seen: int, purpose: str, *shape: int) -> Tensor:
        drawn = original(self, images_seen, purpose, *shape)
        return drawn * float("nan") if images_seen in places else drawn

    monkeypatch.setattr(Stage, "_normal", normal)
    return places


def test_a_batch_that_gives_nan_is_left_out_counted_and_changes_nothing(
    shards: Path, tmp_path: Path, poisoned: set[int]
) -> None:
    poisoned |= {36, 48}
    trainer = trainer_of(shards, tmp_path, "--train.images=84", "--train.log_every=1", "--checkpoint.every=36")
    trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    left_out = {line["images"]: line["train/left_out"] for line in lines if "train/left_out" in line}
    assert left_out == {12: 0, 24: 0, 36: 0, 48: 1, 60: 1, 72: 0, 84: 0}
    assert set(losses(tmp_path)) == {12, 24, 36, 72, 84}
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    assert trainer.update.adamw.state[next(trainer.model.parameters())]["step"] == 5
    assert [(event["event"], event["images"]) for event in events(tmp_path)] == [
        ("started", 0),
        ("left_out", 48),
        ("left_out", 60),
        ("finished", 84),
    ]


def test_too_many_in_a_row_stop_the_run_and_tell_what_was_in_the_first(
    shards: Path, tmp_path: Path, poisoned: set[int]
) -> None:
    first = 36
    poisoned |= set(range(first, 12 * 100, 12))
    trainer = trainer_of(shards, tmp_path, "--train.images=1200", "--checkpoint.every=24")
    with pytest.raises(UserError, match=r"steps in a row were left out, from step 4 \(image 36\) on") as error:
        trainer.run()
    assert trainer.images_seen <= first + 12 * (MOST_LEFT_OUT + 5)
    told = json.loads((tmp_path / "left_out.json").read_text())
    assert told["images_seen"] == first
    assert told["images"] == trainer.train_set.names(trainer.stream.plan.rows(first))
    assert f"training goes on from {checkpoint.newest(tmp_path)}" in str(error.value)
    assert events(tmp_path)[-1]["event"] == "failed"
    assert events(tmp_path)[-1]["text"] == " ".join(str(error.value).split())


def test_fsdp2_trains_saves_and_resumes_as_ddp_does_and_ddp_goes_on_from_it(shards: Path, tmp_path: Path) -> None:
    words = [f"--data.shards={shards}", *TINY, "--track.tracker=none", "--train.log_every=1", "--train.accumulation=2"]
    words += ["--optimizer.schedule=constant"]
    train(2, *words, f"--run={tmp_path / 'ddp'}", "--train.images=60")
    for images, config in ((24, FSDP2), (48, FSDP2), (60, DDP)):
        told = train(2, *words, f"--run={tmp_path / 'both'}", f"--train.images={images}", config=config)
    assert "at 48 images" in told
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "ddp"), rel=1e-5)
    folders = [checkpoint.newest(tmp_path / name) for name in ("ddp", "both")]
    for part in ("model", "ema", "optimizer"):
        ours, theirs = (checkpoint.load(folder, part)[1][part] for folder in folders if folder)
        assert ours.keys() == theirs.keys()
        for name in ours:
            if ours[name].ndim > 1:  # the gradients of some biases are little more than rounding, which Adam makes steps of
                torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)
    models = [VAE.from_pretrained(folder, "ema.safetensors") for folder in folders if folder]
    x, noise = torch.rand(4, 3, 96, 96) * 2 - 1, torch.randn(4, *models[0].latent_shape)
    with torch.inference_mode():
        (mine, other) = (model(x, noise) for model in models)
    torch.testing.assert_close(mine.output, other.output, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mine.elbo, other.elbo, rtol=1e-4, atol=0.0)


def test_gradients_averaged_in_bf16_train_alike_to_its_rounding_and_processes_stay_the_same(
    shards: Path, tmp_path: Path
) -> None:
    words = [f"--data.shards={shards}", *TINY, "--track.tracker=none", "--train.log_every=1", "--train.images=60"]
    trainer_of(shards, tmp_path / "fp32", "--train.log_every=1", "--train.images=60").run()
    for name, config in (("ddp", DDP), ("fsdp2", FSDP2)):
        train(2, *words, f"--run={tmp_path / name}", "--train.exchange=bf16", config=config)  # which compares the processes
        exact, rounded = losses(tmp_path / "fp32"), losses(tmp_path / name)
        assert list(rounded.values()) == pytest.approx(list(exact.values()), rel=1e-2)
        assert list(rounded.values())[1:] != pytest.approx(list(exact.values())[1:], rel=1e-7)  # it is used
