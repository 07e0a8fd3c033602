"""The optimizer step: clips as torch does, skips bad gradients, and does not synchronize with the device."""

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
from vae_scale.config.options import OptimizerConfig
from vae_scale.config.parsing import parse
from vae_scale.errors import UserError
from vae_scale.models.vae import VAE
from vae_scale.runtime import checkpoint
from vae_scale.training.optimizer_step import OptimizerStep
from vae_scale.training.stages import Stage
from vae_scale.training.trainer import MAX_SKIPPED_STEPS, Trainer


def build_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 2, 3))


def compute_gradients(model: nn.Module, scaler: torch.amp.GradScaler | None = None, factor: float = 1.0) -> None:
    torch.manual_seed(1)
    loss = (factor * model(torch.randn(4, 3, 8, 8))).square().sum()
    (scaler.scale(loss) if scaler else loss).backward()


def build_step(model: nn.Module, scaler: torch.amp.GradScaler | None = None, **options: Any) -> OptimizerStep:
    return OptimizerStep(list(model.parameters()), OptimizerConfig(**options), scaler)


def state_of(step: OptimizerStep, model: nn.Module) -> dict[str, Tensor]:
    moments = {name: value.clone() for name, value in step.tensors(model.named_parameters())}
    return moments | {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e9])
def test_a_step_equals_clip_grad_norm_and_adamw(max_grad_norm: float | None) -> None:
    model, reference = build_network(), build_network()
    step = build_step(model, max_grad_norm=max_grad_norm)
    adamw = torch.optim.AdamW(reference.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(3):
        compute_gradients(model)
        compute_gradients(reference)
        grad_norm, is_taken = step.step(0.01)
        expected = nn.utils.clip_grad_norm_(reference.parameters(), max_grad_norm or float("inf"))
        adamw.step()
        adamw.zero_grad()
        assert is_taken
        assert grad_norm.item() == pytest.approx(expected.item(), rel=1e-6)
    for parameter, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected)
        assert parameter.grad is None


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e6])
def test_a_step_with_a_gradient_that_is_not_finite_or_too_large_changes_nothing(factor: float) -> None:
    model = build_network()
    step = build_step(model, skip_threshold=1e4)
    compute_gradients(model)
    assert step.step(0.01)[1]
    before = state_of(step, model)
    compute_gradients(model, factor=factor)
    assert not step.step(0.01)[1]
    after = state_of(step, model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    compute_gradients(model)
    assert step.step(0.01)[1]
    assert not torch.equal(before["0.weight"], model.state_dict()["0.weight"])


def test_loss_scaling_does_not_change_the_step_and_an_overflow_lowers_the_scale() -> None:
    model, scaled_model = build_network(), build_network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    step, scaled_step = build_step(model, max_grad_norm=0.5), build_step(scaled_model, scaler, max_grad_norm=0.5)
    compute_gradients(model)
    compute_gradients(scaled_model, scaler)
    (grad_norm, _), (scaled_grad_norm, is_taken) = step.step(0.01), scaled_step.step(0.01)
    assert is_taken
    assert scaled_grad_norm.item() == pytest.approx(grad_norm.item(), rel=1e-6)
    for parameter, scaled_parameter in zip(model.parameters(), scaled_model.parameters(), strict=True):
        torch.testing.assert_close(parameter, scaled_parameter)
    before = copy.deepcopy(scaled_model.state_dict())
    compute_gradients(scaled_model, scaler, factor=float("inf"))
    assert not scaled_step.step(0.01)[1]
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(before[name], value) for name, value in scaled_model.state_dict().items())


def test_with_loss_scaling_a_finite_gradient_above_the_threshold_changes_nothing() -> None:
    model = build_network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    step = build_step(model, scaler, skip_threshold=1e-6)
    compute_gradients(model, scaler)
    before = copy.deepcopy(model.state_dict())
    grad_norm, is_taken = step.step(0.01)
    assert grad_norm > 1e-6
    assert not is_taken
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert scaler.get_scale() == 1024.0  # the gradient did not overflow


def build_trainer(shards: Path, run: Path, *options: str) -> Trainer:
    return Trainer(parse([f"--data.shards={shards}", f"--run={run}", *TINY, "--track.tracker=none", *options])[0])


def test_between_two_log_intervals_nothing_synchronizes_with_the_device(shards: Path, tmp_path: Path) -> None:
    trainer = build_trainer(shards, tmp_path, "--train.images=100000", "--train.log_every=100")
    with closing(trainer.batches()) as batches, trainer.progress_bar():
        for batch in islice(batches, 2):
            trainer.train_iteration(batch)
        with profile() as profiled:
            for batch in islice(batches, 3):
                trainer.train_iteration(batch)
    events = profiled.events()
    assert "aten::convolution_backward" in {event.name for event in events}
    assert synchronizing_operators(events) == {"aten::_fused_adamw_"}  # reads the step count on CPUs, but not on GPUs


def read_events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def synchronizing_operators(events: Iterable[Any]) -> set[str | None]:
    """Returns the operators that copy a number to the host."""
    items = [event for event in events if event.name == "aten::item"]
    return {item.cpu_parent.name if item.cpu_parent else None for item in items}


@pytest.fixture
def nan_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Numbers of images seen at which the noise of a batch is NaN."""
    images: set[int] = set()
    original = Stage._normal

    def normal(self: Stage, images_seen: int, purpose: str, *shape: int) -> Tensor:
        noise = original(self, images_seen, purpose, *shape)
        return noise * float("nan") if images_seen in images else noise

    monkeypatch.setattr(Stage, "_normal", normal)
    return images


def test_a_batch_that_gives_nan_is_skipped_counted_and_changes_nothing(
    shards: Path, tmp_path: Path, nan_batches: set[int]
) -> None:
    nan_batches |= {36, 48}
    trainer = build_trainer(shards, tmp_path, "--train.images=84", "--train.log_every=1", "--checkpoint.every=36")
    trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    skipped = {line["images"]: line["train/skipped_steps"] for line in lines if "train/skipped_steps" in line}
    assert skipped == {12: 0, 24: 0, 36: 0, 48: 1, 60: 1, 72: 0, 84: 0}
    assert set(losses(tmp_path)) == {12, 24, 36, 72, 84}
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    assert trainer.optimizer_step.adamw.state[next(trainer.model.parameters())]["step"] == 5
    assert [(event["event"], event["images"]) for event in read_events(tmp_path)] == [
        ("started", 0),
        ("skipped_steps", 48),
        ("skipped_steps", 60),
        ("finished", 84),
    ]


def test_too_many_skipped_steps_in_a_row_stop_the_run_and_name_the_first_batch(
    shards: Path, tmp_path: Path, nan_batches: set[int]
) -> None:
    first = 36
    nan_batches |= set(range(first, 12 * 100, 12))
    trainer = build_trainer(shards, tmp_path, "--train.images=1200", "--checkpoint.every=24")
    with pytest.raises(UserError, match=r"steps in a row were skipped, from step 4 \(image 36\) on") as error:
        trainer.run()
    assert trainer.images_seen <= first + 12 * (MAX_SKIPPED_STEPS + 5)
    report = json.loads((tmp_path / "skipped_steps.json").read_text())
    assert report["images_seen"] == first
    assert report["images"] == trainer.train_set.sample_names(trainer.stream.plan.rows(first))
    assert f"training resumes from {checkpoint.newest_checkpoint(tmp_path)}" in str(error.value)
    assert read_events(tmp_path)[-1]["event"] == "failed"
    assert read_events(tmp_path)[-1]["text"] == " ".join(str(error.value).split())


def test_fsdp2_trains_saves_and_resumes_as_ddp_does_and_ddp_resumes_from_it(shards: Path, tmp_path: Path) -> None:
    words = [
        f"--data.shards={shards}",
        *TINY,
        "--track.tracker=none",
        "--train.log_every=1",
        "--train.gradient_accumulation_steps=2",
    ]
    words += ["--optimizer.schedule=constant"]
    train(2, *words, f"--run={tmp_path / 'ddp'}", "--train.images=60")
    for images, config in ((24, FSDP2), (48, FSDP2), (60, DDP)):
        output = train(2, *words, f"--run={tmp_path / 'both'}", f"--train.images={images}", config=config)
    assert "at 48 images" in output
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "ddp"), rel=1e-5)
    folders = [checkpoint.newest_checkpoint(tmp_path / name) for name in ("ddp", "both")]
    for part in ("model", "ema", "optimizer"):
        ddp, fsdp = (checkpoint.load_checkpoint(folder, part)[1][part] for folder in folders if folder)
        assert ddp.keys() == fsdp.keys()
        for name in ddp:
            if ddp[name].ndim > 1:  # gradients of some biases are rounding errors, which Adam amplifies
                torch.testing.assert_close(ddp[name], fsdp[name], rtol=1e-3, atol=1e-5)
    models = [VAE.from_pretrained(folder, "ema.safetensors") for folder in folders if folder]
    x, noise = torch.rand(4, 3, 96, 96) * 2 - 1, torch.randn(4, *models[0].latent_shape)
    with torch.inference_mode():
        ddp_terms, fsdp_terms = (model(x, noise) for model in models)
    torch.testing.assert_close(ddp_terms.output, fsdp_terms.output, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ddp_terms.elbo, fsdp_terms.elbo, rtol=1e-4, atol=0.0)


def test_gradients_averaged_in_bf16_give_the_same_training_up_to_rounding(shards: Path, tmp_path: Path) -> None:
    words = [f"--data.shards={shards}", *TINY, "--track.tracker=none", "--train.log_every=1", "--train.images=60"]
    build_trainer(shards, tmp_path / "fp32", "--train.log_every=1", "--train.images=60").run()
    for name, config in (("ddp", DDP), ("fsdp2", FSDP2)):
        train(
            2, *words, f"--run={tmp_path / name}", "--train.grad_reduce_dtype=bf16", config=config
        )  # which compares the processes
        exact, rounded = losses(tmp_path / "fp32"), losses(tmp_path / name)
        assert list(rounded.values()) == pytest.approx(list(exact.values()), rel=1e-2)
        assert list(rounded.values())[1:] != pytest.approx(list(exact.values())[1:], rel=1e-7)  # it is used
