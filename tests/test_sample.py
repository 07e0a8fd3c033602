"""`python -m vae_scale.sample`."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from launch import ACCELERATE, DDP, environment
from vae_scale import ResNetVAE
from vae_scale.config.parsing import parse
from vae_scale.data.shards import ShardSet
from vae_scale.data.transfer import normalize_images
from vae_scale.evaluation import gallery
from vae_scale.evaluation.features import load_extractor
from vae_scale.evaluation.image_grids import to_uint8
from vae_scale.evaluation.sampling import sample_images
from vae_scale.models.vae import SamplingConfig
from vae_scale.runtime import checkpoint
from vae_scale.sample import main
from vae_scale.training.trainer import train


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    words = [f"--data.shards={shards}", f"--run={folder}", *TINY, "--track.tracker=none", "--model.latent=vector"]
    train(parse([*words, "--train.images=480", "--evaluate.every=240", "--checkpoint.every=240"])[0])
    return folder


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_grid_and_single_images_are_written(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, folder = tmp_path / "deep" / "grid.png", tmp_path / "images"
    main([f"--run={run}", "--num=9", f"--out={out}", f"--save-images={folder}"])
    assert "from the prior mixture of" in capsys.readouterr().out
    assert Image.open(out).size == (3 * 98 + 2, 3 * 98 + 2)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"{number:06d}.png" for number in range(9)]
    assert np.array_equal(pixels(out)[2:98, 100:196], pixels(folder / "000001.png"))
    assert pixels(out).std() > 5  # not uniform


def test_checkpoint_is_a_pretrained_model(run: Path, tmp_path: Path) -> None:
    folder = checkpoint.newest_checkpoint(run)
    assert folder is not None
    last, averaged = (ResNetVAE.from_pretrained(folder, f"{name}.safetensors") for name in ("model", "ema"))
    assert not torch.equal(last.sample(1), averaged.sample(1))
    main([f"--run={run}", "--num=1", f"--out={tmp_path / 'x.png'}", f"--save-images={tmp_path}"])
    assert np.abs(to_uint8(averaged.sample(1))[0].numpy().astype(int) - pixels(tmp_path / "000000.png")).max() <= 1


def test_images_depend_on_the_seed_and_not_on_the_batch_size(run: Path, tmp_path: Path) -> None:
    for name, batch, seed in (("a", 64, 1), ("b", 3, 1), ("c", 64, 2)):
        main([f"--run={run}", "--num=10", f"--out={tmp_path / name}.png", f"--batch-size={batch}", f"--seed={seed}"])
    first, second, other = (pixels(tmp_path / f"{name}.png") for name in "abc")
    assert np.abs(first - second).max() <= 1  # rounding
    assert (first == second).mean() > 0.999
    assert np.abs(first - other).max() > 10


def run_two_processes(*words: str) -> str:
    """Runs the command on two processes and returns its output."""
    launched = [*ACCELERATE, f"--config_file={DDP}", "--num_processes=2", "-m", "vae_scale.sample", *words]
    done = subprocess.run(launched, env=environment(), capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_processes_write_the_same_grid_and_files_as_one(run: Path, tmp_path: Path) -> None:
    words = [f"--run={run}", "--num=5", "--batch-size=2"]  # rank 1 has two images and one of padding
    for name, sample in (("one", main), ("two", lambda words: run_two_processes(*words))):
        sample([*words, f"--out={tmp_path / name}.png", f"--save-images={tmp_path / name}"])
    assert np.array_equal(pixels(tmp_path / "two.png"), pixels(tmp_path / "one.png"))
    one, two = ({path.name: pixels(path) for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one.keys() == two.keys() == {f"{number:06d}.png" for number in range(5)}
    assert all(np.array_equal(two[name], image) for name, image in one.items())


def test_other_grids_are_computed_by_rank_0(run: Path, tmp_path: Path) -> None:
    words = [f"--run={run}", "--num=3", "--interpolate"]
    output = run_two_processes(*words, f"--out={tmp_path / 'two.png'}")
    assert output.count("interpolations between samples") == 1
    main([*words, f"--out={tmp_path / 'one.png'}"])
    assert np.array_equal(pixels(tmp_path / "two.png"), pixels(tmp_path / "one.png"))


def test_grid_is_limited_when_images_are_saved(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vae_scale.sample.MAX_GRID_IMAGES", 4)
    main([f"--run={run}", "--num=7", "--batch-size=3", f"--out={tmp_path / 'x.png'}", f"--save-images={tmp_path / 'all'}"])
    assert "the first 4 of 7 samples" in capsys.readouterr().out
    assert len(list((tmp_path / "all").iterdir())) == 7
    grid = pixels(tmp_path / "x.png")
    assert grid.shape == (2 * 98 + 2, 2 * 98 + 2, 3)
    assert np.array_equal(grid[100:196, 100:196], pixels(tmp_path / "all" / "000003.png"))


def test_bf16_is_close_to_fp32(run: Path, tmp_path: Path) -> None:
    folder = checkpoint.newest_checkpoint(run)
    assert folder is not None
    exact = to_uint8(ResNetVAE.from_pretrained(folder, weights="ema.safetensors").sample(4)).numpy()
    main([f"--run={run}", "--num=4", f"--out={tmp_path / 'x.png'}", f"--save-images={tmp_path}", "--precision=bf16"])
    images = np.stack([pixels(tmp_path / f"{number:06d}.png") for number in range(4)])
    difference = np.abs(images - exact)
    assert 0 < difference.max() < 20
    assert difference.mean() < 2


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler on a CPU")
def test_compiled_samples_equal_eager_samples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    config = parse(["--data.shards=none", "--run=none", "--model.preset=tiny", "--model.width=8", "--model.channel_mult=[1]",
                    "--model.num_res_blocks=1", "--model.patch_size=8"])[0].model  # fmt: skip
    model = ResNetVAE(config, 96).eval()
    for parameter in [*model.parameters(), *model.add_flow(32, 1, []).parameters()]:  # zero-initialized weights
        torch.nn.init.normal_(parameter, std=0.1)

    def sample_latents(numbers: range) -> torch.Tensor:
        return model.sample_latents(numbers, sampling=SamplingConfig(steps=2))

    eager = sample_images(model, sample_latents, 3, 2, 3)
    compiled = sample_images(model, sample_latents, 3, 2, 3, compiled=True)
    assert eager is not None
    assert compiled is not None
    assert eager.float().std() > 5
    assert (eager.int() - compiled.int()).abs().max() <= 1
    assert list(tmp_path.glob("**/*.so"))  # the code was compiled


def test_prior_is_selectable_and_printed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for prior in ("normal", "gmm"):
        main([f"--run={run}", "--num=4", f"--out={tmp_path / prior}.png", f"--prior={prior}"])
    output = capsys.readouterr().out
    assert "N(0, I)" in output
    assert "mixture" in output
    assert not np.array_equal(pixels(tmp_path / "normal.png"), pixels(tmp_path / "gmm.png"))


def test_temperature_scales_the_variation(run: Path, tmp_path: Path) -> None:
    spreads = []
    for temperature in ("0.1", "1.0"):
        main([f"--run={run}", "--num=16", f"--out={tmp_path / 'x.png'}", "--prior=normal", f"--temperature={temperature}",
              f"--save-images={tmp_path / temperature}"])  # fmt: skip
        images = np.stack([pixels(path) for path in (tmp_path / temperature).iterdir()])
        spreads.append(images.std(0).mean())
    assert spreads[0] < 0.5 * spreads[1]


def test_interpolations_start_and_end_at_samples(run: Path, tmp_path: Path) -> None:
    main([f"--run={run}", "--num=5", f"--out={tmp_path / 'l.png'}", "--interpolate"])
    main([f"--run={run}", "--num=16", f"--out={tmp_path / 'x.png'}", f"--save-images={tmp_path / 'ends'}"])
    grid = pixels(tmp_path / "l.png")
    assert grid.shape == (8 * 98 + 2, 5 * 98 + 2, 3)
    assert np.abs(grid[2:98, 2:98] - pixels(tmp_path / "ends" / "000000.png")).max() <= 2
    assert np.abs(grid[2:98, 394:490] - pixels(tmp_path / "ends" / "000008.png")).max() <= 2


def test_interpolation_between_photos_starts_and_ends_at_their_reconstructions(run: Path, tmp_path: Path) -> None:
    from conftest import discs

    wide = np.zeros((96, 130, 3), np.uint8)  # center-cropped
    wide[:, 17:113] = discs(2, 5)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated by 90 degrees
    Image.fromarray(wide).rotate(90, expand=True).save(tmp_path / "first.png", exif=exif)
    Image.fromarray(discs(2, 5)[1]).save(tmp_path / "last.png")
    ends = [str(tmp_path / f"{name}.png") for name in ("first", "last")]
    main([f"--run={run}", "--num=5", f"--out={tmp_path / 'l.png'}", f"--gif={tmp_path / 'l.gif'}", "--interpolate", *ends])
    folder = checkpoint.newest_checkpoint(run)
    assert folder is not None
    model = ResNetVAE.from_pretrained(folder, weights="ema.safetensors")
    with torch.inference_mode():
        reconstructed = to_uint8(model.reconstruct(normalize_images(torch.from_numpy(discs(2, 5))))).numpy()
    grid = pixels(tmp_path / "l.png")
    assert grid.shape == (98 + 2, 5 * 98 + 2, 3)
    assert np.abs(grid[2:98, 2:98] - reconstructed[0]).max() <= 2
    assert np.abs(grid[2:98, 394:490] - reconstructed[1]).max() <= 2
    with Image.open(tmp_path / "l.gif") as animation:
        assert animation.n_frames == 8  # five forwards, three backwards


def test_traversals_cross_one_sample_along_principal_directions(run: Path, tmp_path: Path) -> None:
    main([f"--run={run}", "--num=5", f"--out={tmp_path / 't.png'}", "--traverse"])
    main([f"--run={run}", "--num=1", f"--out={tmp_path / 'x.png'}", f"--save-images={tmp_path}"])
    grid = pixels(tmp_path / "t.png")
    rows = grid[:-2].reshape(-1, 98, *grid.shape[1:])[:, 2:, :-2].reshape(-1, 96, 5, 98, 3).transpose(0, 2, 1, 3, 4)[..., 2:, :]
    assert rows.shape[0] == 4  # the number of latent dimensions
    assert np.abs(rows[:, 2] - pixels(tmp_path / "000000.png")).max() <= 2
    change = np.abs(rows - rows[:, 2:3]).mean((2, 3, 4))
    assert change[0, 0] > change[0, 1] > 0.1
    assert change[0, [0, 4]].sum() > change[-1, [0, 4]].sum()  # the first direction has the largest variance


def test_neighbours_are_nearest_training_images(run: Path, shards: Path, tmp_path: Path) -> None:
    main([f"--run={run}", "--num=2", f"--out={tmp_path / 'n.png'}", "--neighbours"])
    grid = pixels(tmp_path / "n.png")
    assert grid.shape == (2 * 98 + 2, 6 * 98 + 2, 3)
    train_set = ShardSet.open(shards).select("train", "unlabeled")
    all_images = train_set.load_images(np.arange(len(train_set))).astype(int)
    for column in range(1, 6):
        neighbour = grid[2:98, 98 * column + 2 : 98 * column + 98]
        assert (all_images == neighbour).all((1, 2, 3)).any()
    # The nearest neighbour of a training image is the image itself.
    extractor = load_extractor("efficientnet_lite0")
    rows = gallery.retrieve_neighbours(
        normalize_images(torch.from_numpy(all_images[7:9].astype(np.uint8))), train_set, extractor, 32
    )
    assert torch.allclose(rows[0], rows[1], atol=1e-6)
    assert torch.allclose(rows[6], rows[7], atol=1e-6)
    assert not torch.allclose(rows[0], rows[2], atol=1e-2)


def test_gif_animates_the_sample_grids_of_training(run: Path, tmp_path: Path) -> None:
    main([f"--run={run}", "--num=1", f"--out={tmp_path / 'x.png'}", f"--gif={tmp_path / 'x.gif'}", "--grid=1"])
    with Image.open(tmp_path / "x.gif") as animation:
        assert animation.n_frames == len(list((run / "samples").glob("samples_*.png"))) == 2


def test_reconstructions_follow_held_out_images(run: Path, shards: Path, tmp_path: Path) -> None:
    from conftest import discs

    main([f"--run={run}", "--num=4", f"--out={tmp_path / 'r.png'}", "--reconstruct"])
    grid = pixels(tmp_path / "r.png")
    assert np.array_equal(grid[2:98, 2:98], discs(30, 1)[0])
    assert np.abs(grid[2:98, 100:196] - discs(30, 1)[0]).mean() < 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run=/nowhere", "--out=x.png"], "/nowhere"),
        (["--run=/nowhere", "--out=x.jpg"], "must end in .png"),
        (["--run=/nowhere", "--out=x.png", "--num=0"], "--num"),
        (["--run=/nowhere", "--out=x.png", "--temperature=-1"], "--temperature"),
        (["--run=/nowhere", "--out=x.png", "--interpolate", "only_one.png"], "--interpolate requires two"),
        (["--run=/nowhere", "--out=x.png", "--gif=x.png"], "must end in .gif"),
        (["--run=/nowhere", "--out=x.png", "--gif=x.gif", "--reconstruct"], "--gif requires"),
        (["--run=/nowhere", "--out=x.png", "--steps=0"], "--steps"),
    ],
)
def test_user_errors_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(options)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error:")
    assert error.count("\n") == 1
    assert message in error


def test_missing_priors_and_unreadable_photos_are_reported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no image")
    for options, message in (
        (["--prior=flow"], "prior flow: this model has none; use prior gmm"),
        (["--class=cat"], "--class: this model has no class-conditional flow"),
        (["--interpolate", str(tmp_path / "text.png"), str(tmp_path / "text.png")], "text.png: cannot be read as an image"),
    ):
        with pytest.raises(SystemExit):
            main([f"--run={run}", f"--out={tmp_path / 'x.png'}", *options])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
