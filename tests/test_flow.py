"""The rectified-flow prior: the network, its training as a second stage, and sampling."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_server import Server
from conftest import COUNTS, TINY
from safetensors.torch import load_file, save_file

from launch import DDP, FSDP2, losses, train
from vae_scale import load
from vae_scale.config.parsing import parse
from vae_scale.data.transfer import normalize_images
from vae_scale.errors import UserError
from vae_scale.evaluate import main as evaluate
from vae_scale.models.flow import AUGMENTATION_DIM, Flow
from vae_scale.models.vae import VAE, Posterior, SamplingConfig
from vae_scale.runtime import checkpoint
from vae_scale.sample import main as sample
from vae_scale.training import stages
from vae_scale.training.stages import FlowStage
from vae_scale.training.trainer import Trainer

SHAPE = (3, 4, 4)
FLOW = ["--prior.width=32", "--prior.depth=1", "--track.tracker=none"]


def small_flow(num_classes: int = 2) -> Flow:
    torch.manual_seed(0)
    flow = Flow(64, 1, SHAPE, num_classes)
    for parameter in flow.parameters():  # zero-initialized layers would hide errors
        torch.nn.init.normal_(parameter, std=0.1)
    return flow


@pytest.fixture(scope="module")
def vae(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    Trainer(parse([f"--data.shards={shards}", f"--run={folder}", *TINY, "--track.tracker=none", "--train.images=240"])[0]).run()
    return folder


def words(shards: Path, vae: Path, run: Path, *more: object) -> list[str]:
    return [f"--data.shards={shards}", f"--run={run}", *TINY, *FLOW, f"--prior.vae={vae}", *map(str, more)]


@pytest.mark.parametrize("shape", [(3, 4, 4), (5, 1, 1), (2, 3, 3)])
def test_the_velocity_has_the_shape_of_the_latents_and_is_initialized_to_zero(shape: tuple[int, int, int]) -> None:
    flow = Flow(64, 1, shape, 2)
    z = torch.randn(5, *shape)
    velocity = flow(z, torch.rand(5), torch.tensor([0, 1, 2, 2, 0]), torch.zeros(5, AUGMENTATION_DIM))
    assert velocity.shape == z.shape
    assert not velocity.any()


def test_the_velocity_depends_on_all_inputs_but_not_on_other_images() -> None:
    flow = small_flow()
    z, time, label, plain = (
        torch.randn(2, *SHAPE),
        torch.tensor([0.3, 0.6]),
        torch.tensor([0, 1]),
        torch.zeros(2, AUGMENTATION_DIM),
    )
    velocity = flow(z, time, label, plain)
    assert torch.allclose(flow(z[:1], time[:1], label[:1], plain[:1]), velocity[:1], atol=1e-5)
    for changed in (
        flow(z, time + 0.2, label, plain),
        flow(z, time, label + 1, plain),
        flow(z, time, label, plain + 1),
        flow(z.flip(3), time, label, plain).flip(3),
    ):
        assert (changed - velocity).abs().max() > 1e-3


def test_more_steps_lower_the_integration_error() -> None:
    flow, noise, label = small_flow(), torch.randn(4, *SHAPE), torch.full((4,), 2)
    exact = flow.sample(noise, label, 1.0, 300)
    error = [(flow.sample(noise, label, 1.0, steps) - exact).abs().mean() for steps in (2, 8, 32)]
    assert error[0] > error[1] > error[2]


@torch.no_grad()
def test_sampling_is_more_accurate_than_eulers_method_with_as_many_steps() -> None:
    flow, noise, label = small_flow(), torch.randn(4, *SHAPE), torch.zeros(4, dtype=torch.long)
    exact = flow.sample(noise, label, 1.0, 300)
    euler = noise
    for step in range(16, 0, -1):
        euler = euler - flow(euler, torch.full((4,), step / 16), label, torch.zeros(4, AUGMENTATION_DIM)) / 16
    assert (flow.sample(noise, label, 1.0, 16) - exact).abs().mean() < (euler - exact).abs().mean()


def test_guidance_extrapolates_the_velocity_from_that_of_the_guide() -> None:
    flow, noise, label = small_flow(), torch.randn(4, *SHAPE), torch.zeros(4, dtype=torch.long)
    other = small_flow()
    with torch.no_grad():
        other.head.weight *= 0.5
    plain = flow.sample(noise, label, 1.0, 4)
    assert torch.equal(flow.sample(noise, label, 2.0, 4), plain)
    assert torch.equal(flow.sample(noise, label, 1.0, 4, other), plain)
    assert torch.allclose(flow.sample(noise, label, 2.0, 4, flow), plain, atol=1e-4)
    assert torch.allclose(flow.sample(noise, label, 0.0, 4, other), other.sample(noise, label, 1.0, 4), atol=1e-4)
    guided, weaker = flow.sample(noise, label, 2.0, 1, other), other.sample(noise, label, 1.0, 1)
    one_step = flow.sample(noise, label, 1.0, 1)
    assert torch.allclose(guided, weaker + 2 * (one_step - weaker), atol=1e-4)


def test_labels_without_a_class_name_become_no_class() -> None:
    classes = small_flow(3).assign_classes(torch.tensor([0, 2, 3, -1, 9]), torch.randn(5, *SHAPE))
    assert classes.tolist() == [0, 2, 3, 3, 3]


def test_labels_are_drawn_with_the_frequencies_of_the_training_images() -> None:
    flow = small_flow(3)
    assert flow.sample_labels(torch.rand(100)).unique().tolist() == [3]  # no class
    flow.class_probs = torch.tensor([0.5, 0.0, 0.3, 0.2])
    labels = flow.sample_labels((torch.arange(1000) + 0.5) / 1000)
    assert torch.bincount(labels, minlength=4).tolist() == [500, 0, 300, 200]
    assert flow.sample_labels(torch.tensor([0.0, 1.0])).tolist() == [0, 3]


def test_sampling_inverts_the_normalization() -> None:
    flow = Flow(64, 1, SHAPE, 0)  # its velocity is zero
    flow.latent_mean, flow.latent_std = torch.randn(3, 1, 1), torch.rand(3, 1, 1) + 0.5
    noise = torch.randn(2, *SHAPE)
    samples = flow.sample(noise, torch.zeros(2, dtype=torch.long), 1.0, 3)
    assert torch.allclose(flow.normalize(samples), noise, atol=1e-5)


def test_a_flow_learns_a_bimodal_distribution() -> None:
    """Two points, +1 and -1 in all values, with equal probability."""
    torch.manual_seed(0)
    flow = Flow(64, 1, (1, 2, 2), 0)
    optimizer = torch.optim.Adam(flow.parameters(), 2e-3)
    no_label = torch.zeros(128, dtype=torch.long)
    for _ in range(400):
        latent = (torch.randint(0, 2, (128, 1, 1, 1)) * 2.0 - 1).expand(128, 1, 2, 2)
        start, time = torch.randn(128, 1, 2, 2), torch.randn(128).sigmoid()
        t = time[:, None, None, None]
        velocity = flow((1 - t) * latent + t * start, time, no_label, torch.zeros(128, AUGMENTATION_DIM))
        loss = (velocity - (start - latent)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    samples = flow.sample(torch.randn(512, 1, 2, 2), torch.zeros(512, dtype=torch.long), 1.0, 25)
    assert (samples.abs() - 1).abs().mean() < 0.15
    assert 0.4 < (samples[:, 0, 0, 0] > 0).float().mean() < 0.6
    assert (samples.flatten(1).sign().sum(1).abs() == 4).float().mean() > 0.95


def test_the_second_stage_learns_and_does_not_change_the_vae(shards: Path, vae: Path, tmp_path: Path) -> None:
    run = tmp_path / "flow"
    more = ("--prior.width=64", "--optimizer.lr=0.001", "--train.images=960", "--evaluate.every=240", "--data.random_crop=0.2")
    trainer = Trainer(parse(words(shards, vae, run, *more))[0])
    trainer.run()
    folder, before = checkpoint.newest_checkpoint(run), checkpoint.newest_checkpoint(vae)
    assert folder is not None
    assert before is not None
    frozen, weights = load_file(before / "ema.safetensors"), load_file(folder / "ema.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in frozen.items())
    assert {name.split(".")[0] for name in weights.keys() - frozen.keys()} == {"flow"}
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    errors = [line["eval/velocity_error"] for line in metrics if "eval/velocity_error" in line]
    # A zero velocity has error 2, the sum of the variances of noise and latents.
    assert errors[-1] < 1.4 < errors[0] < 1.6

    model = VAE.from_pretrained(folder, "ema.safetensors")
    assert model.describe_prior() == "rectified flow (12 steps, guidance 2.5)"
    assert model.class_names == tuple(trainer.train_set.class_names)
    assert model.flow is not None
    expected = np.bincount(np.where(trainer.train_set.labels < 0, 10, trainer.train_set.labels), minlength=11)
    assert model.flow.class_probs.tolist() == pytest.approx((expected / len(trainer.train_set)).tolist())
    samples = model.sample(3, seed=1, sampling=SamplingConfig(steps=3))
    assert samples.shape == (3, 3, 96, 96)
    assert torch.allclose(model.sample(2, seed=1, sampling=SamplingConfig(steps=3), batch_size=1), samples[:2], atol=1e-4)
    first, second = (model.sample_latents(3, seed=1, sampling=SamplingConfig(steps=3, label=label)) for label in (0, 1))
    assert not torch.allclose(first, second, atol=1e-3)
    assert model.describe_prior("gmm").startswith("mixture") == (model.mixture is not None)


def test_a_flow_is_sampled_by_class_and_evaluated(
    shards: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "flow", tmp_path / "x.png"
    Trainer(parse(words(shards, vae, run, "--train.images=48", "--optimizer.lr=0.01"))[0]).run()
    few = [f"--run={run}", "--steps=2"]
    for label in ("cat", "3"):
        sample([*few, "--num=2", f"--out={out}", f"--class={label}", "--guidance=2"])
        assert "from the prior rectified flow (2 steps, guidance 2)" in capsys.readouterr().out
    for label in ("unicorn", "10"):
        with pytest.raises(SystemExit):
            sample([*few, "--num=2", f"--out={out}", f"--class={label}"])
        assert f"--class {label}: not one of airplane" in capsys.readouterr().err
    sizes = ["--images=10", "--samples=8", "--importance-samples=1"]

    def evaluate_samples(*guidance: str) -> dict[str, Any]:
        evaluate([*few, *sizes, "--guidance", *guidance, "--prior=flow", f"--json={tmp_path / 'report.json'}"])
        report: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
        return report

    one = evaluate_samples("1")
    assert one["prior"] == "rectified flow (2 steps, guidance 1)"
    assert one["frechet_distance"] > 0
    both = evaluate_samples("2", "1")
    assert both["prior"][1] == one["prior"]
    for metric in ("frechet_distance", "precision", "coverage"):
        assert both[metric][1] == pytest.approx(one[metric])
    assert both["frechet_distance"][0] != both["frechet_distance"][1]
    assert both["reconstruction_frechet_distance"] == pytest.approx(one["reconstruction_frechet_distance"])


def test_the_averaged_flow_after_a_quarter_of_training_guides_samples(shards: Path, vae: Path, tmp_path: Path) -> None:
    def train(*more: str) -> VAE:
        Trainer(parse(words(shards, vae, tmp_path / "flow", "--checkpoint.keep=9", "--checkpoint.every=12", *more))[0]).run()
        return load(tmp_path / "flow")

    model = train("--train.images=96")
    first = load(tmp_path / "flow" / "checkpoints" / "images_000000012")
    assert first.guide is None
    assert first.describe_prior().endswith("guidance 1)")
    with pytest.raises(UserError, match="guidance 2: the flow prior has no guide before a quarter"):
        first.sample(1, sampling=SamplingConfig(guidance=2))
    quarter = load(tmp_path / "flow" / "checkpoints" / "images_000000024").flow
    guide = model.load_guide()
    assert guide is not None
    assert quarter is not None
    assert model.flow is not None
    for name, weight in guide.state_dict().items():
        assert torch.equal(weight, quarter.state_dict()[name])
    assert not torch.equal(guide.head.weight, model.flow.head.weight)

    few, unguided = SamplingConfig(steps=3), SamplingConfig(steps=3, guidance=1)
    samples = model.sample(4, seed=1, sampling=few)
    assert not torch.allclose(samples, model.sample(4, seed=1, sampling=unguided), atol=1e-3)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved").sample(4, seed=1, sampling=few), samples)

    # A resumed run has the same guide.
    for folder in ("images_000000096", "images_000000084"):
        shutil.rmtree(tmp_path / "flow" / "checkpoints" / folder)
    assert torch.equal(train("--train.images=96").sample(4, seed=1, sampling=few), samples)


def test_a_guide_of_another_shape_is_a_user_error(shards: Path, vae: Path, tmp_path: Path) -> None:
    Trainer(parse(words(shards, vae, tmp_path / "flow", "--train.images=12"))[0]).run()
    load(tmp_path / "flow").save_pretrained(tmp_path / "saved")
    guide = load_file(tmp_path / "saved" / "guide.safetensors")
    save_file(guide | {"head.bias": torch.zeros(7)}, tmp_path / "saved" / "guide.safetensors")
    with pytest.raises(UserError, match=r"head.bias: shape in the file is \[7\]"):
        load(tmp_path / "saved")


def test_latents_are_normalized_by_the_aggregate_posterior(shards: Path, vae: Path, tmp_path: Path) -> None:
    trainer = Trainer(parse(words(shards, vae, tmp_path, "--train.images=12", "--evaluate.prior_fit_images=150"))[0])
    model, flow = trainer.model, trainer.model.flow
    assert flow is not None
    assert len(trainer.train_set) == COUNTS["train"] + COUNTS["unlabeled"]
    with torch.no_grad():
        posterior: Posterior = model.encode(normalize_images(torch.from_numpy(trainer.train_set.load_images(np.arange(150)))))
    samples = torch.cat([posterior.sample(torch.randn_like(posterior.mean)) for _ in range(20)])
    normalized = flow.normalize(samples)
    assert normalized.mean((0, 2, 3)).abs().max() < 0.02
    assert (normalized.std((0, 2, 3)) - 1).abs().max() < 0.02


def test_resuming_the_second_stage_is_bit_identical(shards: Path, vae: Path, tmp_path: Path) -> None:
    more = ("--train.images=180", "--train.log_every=1", "--checkpoint.every=60")
    Trainer(parse(words(shards, vae, tmp_path / "uninterrupted", *more))[0]).run()
    Trainer(parse(words(shards, vae, tmp_path / "resumed", *more))[0]).run()
    for folder in checkpoint.list_checkpoints(tmp_path / "resumed")[1:]:
        (folder / "model.safetensors").write_bytes(b"truncated")
    Trainer(parse(words(shards, vae, tmp_path / "resumed", *more))[0]).run()
    assert losses(tmp_path / "resumed") == losses(tmp_path / "uninterrupted")
    uninterrupted, resumed = (
        load_file(checkpoint.checkpoint_folder(tmp_path / name, 180) / "ema.safetensors")
        for name in ("uninterrupted", "resumed")
    )
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items())


def test_one_and_two_processes_give_the_same_losses_with_ddp_and_fsdp2(shards: Path, vae: Path, tmp_path: Path) -> None:
    more = ("--train.images=60", "--train.log_every=1")
    Trainer(parse(words(shards, vae, tmp_path / "one", *more))[0]).run()
    for name, config in (("ddp", DDP), ("fsdp2", FSDP2)):
        train(2, *words(shards, vae, tmp_path / name, *more), config=config)
    one = list(losses(tmp_path / "one").values())
    assert len(one) == 5
    guides = {name: load(tmp_path / name).guide for name in ("one", "ddp", "fsdp2")}
    for name in ("ddp", "fsdp2"):
        assert list(losses(tmp_path / name).values()) == pytest.approx(one, rel=1e-4)
        for key, weight in guides["one"].items():
            assert torch.allclose(guides[name][key], weight, atol=1e-4)


def test_images_are_encoded_once_with_the_losses_of_encoding_them_in_each_step(
    shards: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--train.images=312", "--train.log_every=1", "--evaluate.early=false")  # 150 images and their reflections are fewer
    trainer = Trainer(parse(words(shards, vae, tmp_path / "once", *more))[0])
    assert isinstance(trainer.stage, FlowStage)
    encoded = trainer.stage.encoded
    assert encoded is not None
    images = torch.from_numpy(trainer.train_set.load_images(np.arange(150)))
    for flipped in (False, True):
        with torch.no_grad():
            posterior = trainer.model.encode(normalize_images(images, torch.full((150,), flipped)))
        mean, log_sigma = encoded[:, int(flipped)].float().permute(0, 1, 4, 2, 3).unbind(1)
        torch.testing.assert_close(mean, posterior.mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(log_sigma, posterior.log_sigma, rtol=1e-3, atol=1e-4)
    trainer.run()
    train(2, *words(shards, vae, tmp_path / "two", *more))
    monkeypatch.setattr(stages, "MAX_ENCODED_BYTES", 0)
    Trainer(parse(words(shards, vae, tmp_path / "each", *more))[0]).run()
    each = list(losses(tmp_path / "each").values())
    assert len(each) == 26
    for name in ("once", "two"):
        assert list(losses(tmp_path / name).values()) == pytest.approx(each, rel=1e-3)


def test_a_resumed_second_stage_encodes_with_its_own_vae(shards: Path, vae: Path, tmp_path: Path) -> None:
    run, changed = tmp_path / "flow", tmp_path / "vae"
    shutil.copytree(vae, changed)
    more = ("--train.images=312", "--train.log_every=1", "--checkpoint.every=156")
    Trainer(parse(words(shards, changed, run, *more))[0]).run()
    expected = losses(run)
    shutil.rmtree(checkpoint.checkpoint_folder(run, 312))
    options = [f"--data.shards={shards}", f"--run={changed}", *TINY, "--track.tracker=none", "--train.images=360"]
    Trainer(parse(options)[0]).run()
    Trainer(parse(words(shards, changed, run, *more))[0]).run()
    assert losses(run) == expected


@pytest.mark.parametrize("option", ["--data.random_crop=0.1", "--data.color_jitter=0.1", "--train.images=300", "URL"])
def test_images_are_not_encoded_once_if_they_are_augmented_too_many_or_remote(
    option: str, shards: Path, vae: Path, server: Server, tmp_path: Path
) -> None:
    if option == "URL":
        option = f"--data.shards={server.url}"
    more = ("--train.images=312", f"--data.cache_dir={tmp_path / 'cache'}", option)
    trainer = Trainer(parse(words(shards, vae, tmp_path / "run", *more))[0])
    assert isinstance(trainer.stage, FlowStage)
    assert trainer.stage.encoded is None


def test_a_second_stage_requires_a_trained_vae(shards: Path, vae: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prior\.vae .*nowhere: has no checkpoint yet"):
        Trainer(parse(words(shards, tmp_path / "nowhere", tmp_path / "run"))[0])
    Trainer(parse(words(shards, vae, tmp_path / "run", "--train.images=12"))[0]).run()
    with pytest.raises(UserError, match=r"another prior\.depth;"):
        Trainer(parse(words(shards, vae, tmp_path / "run", "--train.images=24", "--prior.depth=3"))[0])


def test_a_missing_prior_raises_an_error(vae: Path) -> None:
    folder = checkpoint.newest_checkpoint(vae)
    assert folder is not None
    with pytest.raises(UserError, match="prior flow: this model has none"):
        VAE.from_pretrained(folder).sample(1, prior="flow")


def test_clusters_of_the_latents_replace_the_labels(shards: Path, vae: Path, tmp_path: Path) -> None:
    more = ("--train.images=24", "--prior.clusters=3", "--train.log_every=1")
    trainer = Trainer(parse(words(shards, vae, tmp_path / "one", *more))[0])
    model, flow = trainer.model, trainer.model.flow
    assert flow is not None
    assert flow.cluster_centers is not None
    with torch.no_grad():
        means = model.encode(normalize_images(torch.from_numpy(trainer.train_set.load_images(np.arange(150))))).mean
    labels = torch.zeros(150, dtype=torch.long)
    clusters, normalized = flow.assign_classes(labels, means), flow.normalize(means).flatten(1)
    assert clusters.unique().tolist() == [0, 1, 2]
    assert torch.allclose(flow.class_probs, torch.bincount(clusters, minlength=4) / 150)
    for cluster in range(3):  # a fixed point of k-means, up to its limited number of iterations
        center = flow.cluster_centers[cluster]
        assert (normalized[clusters == cluster] - center).norm(dim=1).mean() < (normalized - center).norm(dim=1).mean()
    trainer.run()
    loaded = load(tmp_path / "one")
    assert loaded.class_names == ("0", "1", "2")
    assert loaded.flow is not None
    assert torch.equal(loaded.flow.assign_classes(labels, means), clusters)
    train(2, *words(shards, vae, tmp_path / "two", *more), config=DDP)
    expected = list(losses(tmp_path / "one").values())
    assert list(losses(tmp_path / "two").values()) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UserError, match=r"prior\.clusters is 200; it must be at most the number of images used, 150"):
        Trainer(parse(words(shards, vae, tmp_path / "many", "--prior.clusters=200"))[0])
