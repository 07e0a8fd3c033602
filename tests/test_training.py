"""Training with the commands that users run."""

import json
import platform
import resource
import subprocess
import time
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch
from conftest import COUNTS
from safetensors.torch import load_file

from launch import ACCELERATE, command, environment, losses, train, train_in_process, train_options
from vae_scale.config.parsing import parse
from vae_scale.models.vae import VAE
from vae_scale.runtime import checkpoint
from vae_scale.training.trainer import Trainer

IMAGES = COUNTS["train"] + COUNTS["unlabeled"]  # per epoch
RECORD = str(Path(__file__).parent / "programs" / "record_rows.py")


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Returns all tensors of the newest checkpoint."""
    folder = checkpoint.newest_checkpoint(run)
    assert folder is not None
    return {
        f"{part}.{name}": tensor
        for part in ("model", "ema", "optimizer")
        for name, tensor in load_file(folder / f"{part}.safetensors").items()
    }


def state(run: Path) -> dict[str, object]:
    folder = checkpoint.newest_checkpoint(run)
    assert folder is not None
    return json.loads((folder / "state.json").read_text())


def test_two_processes_split_each_epoch_hold_identical_weights_and_resume_after_a_kill(shards: Path, tmp_path: Path) -> None:
    run, record_dir = tmp_path / "run", tmp_path / "records"
    record_dir.mkdir()
    options = train_options(shards, run, f"--train.images={3 * IMAGES}", "--train.batch_size=30", "--checkpoint.every=30")
    launch = command(2, *options, program=RECORD)
    process = subprocess.Popen(launch, env=environment(RECORD_DIR=str(record_dir)), stderr=subprocess.DEVNULL)
    while process.poll() is None and len(checkpoint.list_checkpoints(run)) < 3:
        time.sleep(0.05)
    # Each worker runs in its own session and is killed separately.
    for child in [*psutil.Process(process.pid).children(recursive=True), process]:
        child.kill()
    process.wait()
    interrupted = state(run)
    assert 90 <= interrupted["images_seen"] < 3 * IMAGES  # type: ignore[operator]

    first_records = {path.name: path.read_text() for path in record_dir.iterdir()}
    assert set(first_records) == {"rank_0_of_2.jsonl", "rank_1_of_2.jsonl"}
    for path in record_dir.iterdir():
        path.unlink()
    output = train(2, *options, program=RECORD, RECORD_DIR=str(record_dir))
    assert f"resuming {run} at {interrupted['images_seen']:,} images" in output, output

    final = state(run)
    assert final["images_seen"] == 3 * IMAGES
    assert final["processes"] == 2
    weights = final["fingerprints"]
    assert isinstance(weights, list)
    assert len(weights) == 2
    assert weights[0] == weights[1]

    # The rows read before the kill (up to the checkpoint) and after it cover each epoch exactly once.
    seen: list[list[list[int]]] = []
    for rank in (0, 1):
        name = f"rank_{rank}_of_2.jsonl"
        before = [json.loads(line) for line in first_records[name].splitlines()][: interrupted["images_seen"] // 30]  # type: ignore[operator]
        seen.append(before + [json.loads(line) for line in (record_dir / name).read_text().splitlines()])
        assert all(len(rows) == 15 for rows in seen[rank])
    order = [row for halves in zip(*seen, strict=True) for rows in halves for row in rows]
    for epoch in range(3):
        assert Counter(order[epoch * IMAGES : (epoch + 1) * IMAGES]) == Counter(range(IMAGES))


def test_losses_do_not_depend_on_the_number_of_processes_or_microbatches(shards: Path, tmp_path: Path) -> None:
    common = ("--train.images=120", "--train.log_every=1")
    train(1, *train_options(shards, tmp_path / "one", *common))
    train(2, *train_options(shards, tmp_path / "two", *common, "--train.gradient_accumulation_steps=3"))
    train_in_process(*train_options(shards, tmp_path / "microbatches", *common, "--train.gradient_accumulation_steps=4"))
    one, two, microbatches = (losses(tmp_path / name) for name in ("one", "two", "microbatches"))
    assert set(one) == set(two) == set(microbatches) == set(range(12, 121, 12))
    for images, loss in one.items():
        assert two[images] == pytest.approx(loss, rel=1e-4)
        assert microbatches[images] == pytest.approx(loss, rel=1e-4)


def test_resumed_run_is_bit_identical_to_an_uninterrupted_run(shards: Path, tmp_path: Path) -> None:
    options = ("--train.images=180", "--train.log_every=1", "--checkpoint.every=60", "--optimizer.warmup_images=50")
    train_in_process(*train_options(shards, tmp_path / "uninterrupted", *options))
    train_in_process(*train_options(shards, tmp_path / "resumed", *options))
    for folder in checkpoint.list_checkpoints(tmp_path / "resumed")[1:]:
        (folder / "model.safetensors").write_bytes(b"damaged")  # resumes from the first checkpoint
    train_in_process(*train_options(shards, tmp_path / "resumed", *options))
    assert losses(tmp_path / "resumed") == losses(tmp_path / "uninterrupted")
    uninterrupted, resumed = tensors(tmp_path / "uninterrupted"), tensors(tmp_path / "resumed")
    assert uninterrupted.keys() == resumed.keys()
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


def test_training_improves_the_held_out_elbo(shards: Path, tmp_path: Path) -> None:
    options = train_options(shards, tmp_path, "--train.images=1200", "--evaluate.every=120", "--train.batch_size=6")
    trainer = train_in_process(*options)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval/neg_elbo" in line]
    assert evaluations[-1]["eval/neg_elbo"] < evaluations[0]["eval/neg_elbo"] - 3000
    assert evaluations[-1]["eval/psnr"] > evaluations[0]["eval/psnr"] + 1.5
    assert trainer.ema.model.mixture is not None
    image_names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert "samples_000001200.png" in image_names
    assert "reconstructions_000001200.png" in image_names


def test_mixture_is_fitted_for_each_checkpoint_and_samples_use_an_up_to_date_mixture(shards: Path, tmp_path: Path) -> None:
    options = train_options(shards, tmp_path, "--train.images=96", "--evaluate.every=24", "--checkpoint.every=48")
    train_in_process(*options)
    image_names = sorted(path.stem for path in (tmp_path / "samples").iterdir())
    assert image_names == [
        *(f"reconstructions_{images:09d}" for images in (24, 48, 72, 96)),
        *(f"samples_{images:09d}" for images in (48, 96)),
    ]
    assert all((folder / "mixture.safetensors").exists() for folder in checkpoint.list_checkpoints(tmp_path))


def test_stl10_configurations_use_eight_gpus_efficiently() -> None:
    folder = Path(__file__).parent.parent / "configs"
    for name in ("stl10", "stl10_large", "stl10_prior"):
        config = parse([f"--config={folder / name}.yaml"])[0]
        assert config.train.global_batch_size // 8 >= 128
        # Evaluations may take at most 2% of the time between them. On eight GPUs, an evaluation takes as long as training on
        # about 40,000 images (one second at 5,000 images/s per GPU).
        assert min(config.evaluate.every, config.checkpoint.every) * 0.02 > 40_000


# Recorded losses. The tolerance allows for rounding, which differs between machines.
GOLDEN = {
    "gaussian": [152561.2, 152853.1, 152743.7, 152447.6, 153964.6],
    "mse": [170909.9, 170847.8, 170834.1, 170887.9, 171064.1],
}


@pytest.mark.parametrize("likelihood", GOLDEN)
def test_golden_losses(shards: Path, tmp_path: Path, likelihood: str) -> None:
    options = (
        "--train.images=60",
        "--train.log_every=1",
        f"--model.likelihood={likelihood}",
        "--objective.beta=0.5",
    )
    train_in_process(*train_options(shards, tmp_path, *options))
    assert list(losses(tmp_path).values()) == pytest.approx(GOLDEN[likelihood], rel=2e-4)


def test_golden_losses_of_network_kl(shards: Path, tmp_path: Path) -> None:
    network = ("--model.preset=kl", "--model.width=8", "--model.channel_mult=[1,1,2,2]", "--model.num_res_blocks=1")
    train_in_process(*train_options(shards, tmp_path, "--train.images=60", "--train.log_every=1", *network))
    golden = [157765.0, 156000.0, 156124.1, 155096.8, 156761.4]
    assert list(losses(tmp_path).values()) == pytest.approx(golden, rel=2e-4)
    folder = checkpoint.newest_checkpoint(tmp_path)
    assert folder is not None
    assert VAE.from_pretrained(folder, "ema.safetensors").sample(2).shape == (2, 3, 96, 96)


def test_seed_notebook_config_reduces_the_loss(shards: Path, tmp_path: Path) -> None:
    config = Path(__file__).parent.parent / "configs" / "seed_notebook.yaml"
    options = [f"--config={config}", f"--data.shards={shards}", f"--run={tmp_path}", "--track.tracker=none"]
    trainer = Trainer(parse([*options, "--train.batch_size=10"])[0])
    step_losses = []
    for batch in islice(trainer.stream, 12):
        trainer.train_step(batch)
        step_losses.append(trainer.metrics.compute()["loss"])
    assert sum(step_losses[-3:]) < sum(step_losses[:3])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="requires glibc")
def test_cpu_step_reuses_the_memory_of_the_previous_step(shards: Path, tmp_path: Path) -> None:
    options = train_options(shards, tmp_path, "--train.images=1000000", "--train.log_every=1000", "--evaluate.early=false")
    trainer = Trainer(parse(options)[0])
    with closing(trainer.batches()) as batches, trainer.progress_bar():
        for batch in islice(batches, 20):
            trainer.train_iteration(batch)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for batch in islice(batches, 20):
            trainer.train_iteration(batch)
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20
    assert faults < 300  # pages; 1,700 if memory is returned to the system


@pytest.mark.parametrize("program", ["train", "evaluate", "sample", "encode"])
def test_the_silent_single_process_launch_is_refused(shards: Path, tmp_path: Path, program: str) -> None:
    run_option = [f"--run={tmp_path / 'run'}"]
    arguments = {
        "train": train_options(shards, tmp_path / "run"),
        "evaluate": [],
        "sample": ["--num=2", "--out=x.png"],
        "encode": ["--out=x"],
    }
    options = arguments[program] if program == "train" else [*run_option, *arguments[program]]
    options = ["--cpu", "--num_processes=2", "-m", f"vae_scale.{program}", *options]
    run = subprocess.run([*ACCELERATE, *options], env=environment(), capture_output=True, text=True)
    assert run.returncode != 0
    assert "error: 2 processes were requested, but accelerate launch started 1" in run.stderr
    assert not (tmp_path / "run").exists()


def test_batch_size_not_divisible_by_the_number_of_processes_is_refused(shards: Path, tmp_path: Path) -> None:
    launch = command(2, *train_options(shards, tmp_path / "run", "--train.batch_size=13"))
    run = subprocess.run(launch, env=environment(), capture_output=True, text=True)
    assert run.returncode != 0
    assert "error: train.batch_size is 13; it must be a multiple of 2" in run.stderr


def test_bf16_losses_are_close_to_fp32(shards: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        options = ("--train.images=60", "--train.log_every=1", f"--train.precision={precision}")
        train(1, *train_options(shards, tmp_path / precision, *options))
    exact, rounded = (losses(tmp_path / precision) for precision in ("fp32", "bf16"))
    assert list(rounded.values()) == pytest.approx(list(exact.values()), rel=0.01)
    assert rounded != exact


def test_non_finite_loss_stops_the_run_with_advice(shards: Path, tmp_path: Path) -> None:
    launch = command(
        1, *train_options(shards, tmp_path, "--optimizer.lr=1e10", "--train.images=600", "--checkpoint.every=6000")
    )
    run = subprocess.run(launch, env=environment(), capture_output=True, text=True)
    assert run.returncode == 2
    assert "lower optimizer.lr" in run.stderr
    assert checkpoint.newest_checkpoint(tmp_path) is None


def test_resume_with_another_network_or_other_images_is_refused(shards: Path, binaries: Path, tmp_path: Path) -> None:
    from vae_scale.errors import UserError
    from vae_scale.pack import main as pack

    train_in_process(*train_options(shards, tmp_path / "run", "--train.images=12"))
    with pytest.raises(UserError, match=r"another model\.latent_channels, seed;"):
        train_in_process(*train_options(shards, tmp_path / "run", "--train.images=24", "--model.latent_channels=3", "--seed=5"))
    pack(["--source=stl10", f"--data={binaries}", f"--out={tmp_path / 'other'}", "--limit=20"])
    with pytest.raises(UserError, match="other shards"):
        train_in_process(*train_options(tmp_path / "other", tmp_path / "run", "--train.images=24"))
    resumed = train_in_process(*train_options(shards, tmp_path / "run", "--train.images=12"))
    assert resumed.images_seen == 12


def test_wandb_without_an_api_key_runs_offline_without_a_prompt_and_keeps_its_run_id(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    options = [*train_options(shards, tmp_path / "run", "--train.images=60"), "--track.tracker=wandb"]
    extra = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    result = subprocess.run(
        command(1, *options), env=environment(**extra), capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stderr
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert str(state(tmp_path / "run")["wandb_id"]) in offline.name
    (written,) = offline.glob("*.wandb")
    content = written.read_bytes()
    for name in (
        b"train/bits_per_dim",
        b"eval/psnr",
        b"perf/data_loading_fraction",
        b"samples/reconstructions",
        b"train/grad_norm",
    ):
        assert name in content
    assert len(list(offline.rglob("*.png"))) == 2


def test_metrics_of_a_resumed_run_have_no_duplicate_intervals(shards: Path, tmp_path: Path) -> None:
    options = train_options(shards, tmp_path, "--train.log_every=1", "--checkpoint.every=48")
    train_in_process(*options, "--train.images=96")
    for folder in checkpoint.list_checkpoints(tmp_path)[1:]:
        (folder / "manifest.json").unlink()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"images": 1')  # a line that was cut off by a kill
    train_in_process(*options, "--train.images=120")
    images = [json.loads(line)["images"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert list(Counter(images)) == list(range(12, 121, 12))
    assert max(Counter(images).values()) <= 2  # training and evaluation
