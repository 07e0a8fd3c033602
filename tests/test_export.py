"""Exported models give what the model gives, and a failed export leaves nothing."""

import json
import math
import zipfile
from pathlib import Path

import pytest
import torch

from vae_scale.config import PRESETS, VAEConfig
from vae_scale.export import main
from vae_scale.models import exporting
from vae_scale.models.exporting import Run
from vae_scale.models.kl import KLVAE
from vae_scale.models.networks import build
from vae_scale.models.prior import GaussianMixture
from vae_scale.models.vae import VAE
from vae_scale.training import checkpoint

SIDE = 16
CONFIGS = {
    "map": VAEConfig(
        "tiny", **{**PRESETS["tiny"], "width": 8, "multipliers": [1], "attention": True, "likelihood": "logistic_mixture"}
    ),
    "vector": VAEConfig("tiny", **{**PRESETS["tiny"], "width": 8, "multipliers": [1], "latent": "vector"}),
    "notebook": VAEConfig("seed_notebook", **PRESETS["seed_notebook"]),
}
KL = VAEConfig("tiny", "kl", width=24, multipliers=[1, 2], blocks=1, latent_channels=4, likelihood="laplace")


def awake(model: VAE) -> VAE:
    """The model with weights moved away from where they start, since zeros would hide mistakes."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter += scale * torch.randn(parameter.shape, generator=random)
    return model.eval()


def mixture_of(model: VAE) -> GaussianMixture:
    """A prior of two wide Gaussians."""
    length = math.prod(model.latent_shape)
    means = torch.stack([torch.full((length,), 1.0), torch.full((length,), -2.0)])
    return GaussianMixture(torch.tensor([0.5, 0.5]), means, 2 * torch.eye(length).repeat(2, 1, 1))


def save_run(model: VAE, folder: Path, mixture: GaussianMixture | None = None) -> Path:
    """A run with one checkpoint, whose averaged weights are the model's and whose last weights are others."""
    weights = model.state_dict()
    tensors = {"ema": weights, "model": {name: torch.zeros_like(tensor) for name, tensor in weights.items()}}
    if mixture:
        tensors["mixture"] = vars(mixture)
    writer = checkpoint.Writer(folder, keep=1)
    writer.save(4800, tensors, {}, dict(model.describe()))
    writer.wait()
    return folder


def fails(options: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as caught:
        main(options)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error:")
    assert error.count("\n") == 1
    return error


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> VAE:
    return awake(build(CONFIGS[request.param], SIDE))


@pytest.fixture(scope="module")
def run(model: VAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(model, tmp_path_factory.mktemp("run"), mixture_of(model))


@pytest.fixture(scope="module")
def programs(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("programs")
    main([f"--run={run}", f"--out={out}"])
    return out


@torch.no_grad()
def assert_same(model: VAE, decode: Run, encode: Run) -> None:
    for batch in (1, 3):
        latents = torch.randn(batch, *model.latent_shape)
        images = 2 * torch.rand(batch, 3, model.resolution, model.resolution) - 1
        (decoded,), (mean, log_sigma) = decode(latents), encode(images)
        posterior = model.encode(images)
        for ours, theirs in ((model.decode(latents), decoded), (posterior.mean, mean), (posterior.log_sigma, log_sigma)):
            assert ours.std() > 0.01  # not a model that gives the same for everything
            torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_torch_programs_give_what_the_model_gives(model: VAE, programs: Path) -> None:
    decode, encode = (torch.export.load(programs / f"{name}.pt2").module() for name in ("decoder", "encoder"))
    assert_same(model, decode, encode)
    assert sorted(path.name for path in programs.iterdir()) == [
        "decoder.pt2",
        "encoder.pt2",
        "export.json",
        "mixture.safetensors",
    ]


def test_torch_programs_hold_no_pickle_and_no_folders_of_this_machine(programs: Path) -> None:
    for name, own, other in (("decoder", "vae.decoder.", "vae.encoder."), ("encoder", "vae.encoder.", "vae.decoder.")):
        with zipfile.ZipFile(programs / f"{name}.pt2") as archive:
            for entry in archive.infolist():
                content = archive.read(entry)
                if "/weights/weight_" not in entry.filename:  # those are numbers as they are
                    assert not content.startswith((b"\x80", b"PK")), entry.filename
                assert str(Path(exporting.__file__).parent).encode() not in content
            weights = next(entry for entry in archive.namelist() if entry.endswith("weights_config.json"))
            told = archive.read(weights).decode()
            assert own in told
            assert other not in told


def test_the_description_says_where_it_came_from_and_how_close_it_is(model: VAE, run: Path, programs: Path) -> None:
    told = json.loads((programs / "export.json").read_text())
    assert told["checkpoint"] == str(run / "checkpoints" / "images_000004800")
    assert told["images_seen"] == 4800
    assert told["latent"]["shape"] == list(model.latent_shape)
    # half at 1 and half at -2, each of variance 4
    assert told["latent"]["mean_of_channels"] == pytest.approx([-0.5] * model.latent_shape[0])
    assert told["latent"]["std_of_channels"] == pytest.approx([6.25**0.5] * model.latent_shape[0])
    assert "torch" in told["versions"]
    decoder = told["parts"]["decoder"]
    assert decoder["inputs"]["latent"]["shape"] == ["batch", *model.latent_shape]
    assert decoder["outputs"]["image"]["range"] == [-1, 1]
    assert 0 <= decoder["largest_difference"] <= told["tolerance"]


def sessions(folder: Path) -> tuple[Run, Run]:
    """The decoder and the encoder in a folder of ONNX models."""
    import onnxruntime

    def load(name: str, inputs: str, outputs: list[str]) -> Run:
        session = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        return lambda x: [torch.from_numpy(part) for part in session.run(outputs, {inputs: x.numpy()})]

    return load("decoder.onnx", "latent", ["image"]), load("encoder.onnx", "image", ["mean", "log_sigma"])


def test_onnx_models_give_what_the_model_gives(model: VAE, run: Path, tmp_path: Path) -> None:
    main([f"--run={run}", f"--out={tmp_path}", "--format=onnx"])
    assert_same(model, *sessions(tmp_path))


@pytest.fixture
def kl(tmp_path: Path) -> tuple[KLVAE, Path]:
    """An AutoencoderKL of ours, and its run."""
    model = KLVAE(KL, SIDE)
    awake(model)
    return model, save_run(model, tmp_path / "run", mixture_of(model))


def test_diffusers_loads_the_same_autoencoder(kl: tuple[KLVAE, Path], tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    model, run = kl
    main([f"--run={run}", f"--out={tmp_path / 'kl'}", "--format=diffusers"])
    loaded, told = AutoencoderKL.from_pretrained(tmp_path / "kl", output_loading_info=True)
    assert not any(told.values()), told
    latents, images = torch.randn(3, *model.latent_shape), 2 * torch.rand(3, 3, SIDE, SIDE) - 1
    with torch.no_grad():
        ours, theirs = model.encode(images), loaded.encode(images).latent_dist
        torch.testing.assert_close(theirs.mean, ours.mean, atol=1e-4, rtol=0)
        torch.testing.assert_close(theirs.std, ours.log_sigma.exp(), atol=1e-4, rtol=0)
        torch.testing.assert_close(loaded.decode(latents).sample, model.decoder(latents), atol=1e-4, rtol=0)
    # half at 1 and half at -2, each of variance 4: 4 + 1.5^2
    assert loaded.config.scaling_factor == pytest.approx(6.25**-0.5)


def test_an_autoencoder_kl_is_an_onnx_model_too(kl: tuple[KLVAE, Path], tmp_path: Path) -> None:
    model, run = kl
    main([f"--run={run}", f"--out={tmp_path}", "--format=onnx"])
    assert_same(model, *sessions(tmp_path))


def test_extreme_variances_are_clamped_as_diffusers_clamps_them() -> None:
    from diffusers import AutoencoderKL

    model = KLVAE(KL, SIDE).eval()
    config, _ = model.as_diffusers()
    with torch.no_grad():
        model.encoder.quant_conv.bias[4:] = torch.tensor([-100.0, 100.0, 0.0, 1.0])
        loaded = AutoencoderKL.from_config(config).eval()
        loaded.load_state_dict(model.as_diffusers()[1])
        images = torch.zeros(1, 3, SIDE, SIDE)
        ours = model.encode(images).log_sigma
        torch.testing.assert_close(ours, loaded.encode(images).latent_dist.logvar / 2)
    assert (ours.min(), ours.max()) == (-15, 10)


@pytest.mark.parametrize("form", ["torch", "diffusers"])
def test_what_differs_from_the_model_is_not_left_behind(
    form: str, kl: tuple[KLVAE, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "export.json").write_text("of an earlier export")
    monkeypatch.setattr(KLVAE, "encode", lambda self, images: VAE.encode(self, images))  # another meaning of the output
    if form == "torch":
        monkeypatch.setattr(exporting, "TOLERANCE", -1.0)  # nothing is that close
    assert "differs from the model" in fails([f"--run={kl[1]}", f"--out={out}", f"--format={form}"], capsys)
    assert [path.name for path in out.iterdir()] == ["export.json"]
    assert (out / "export.json").read_text() == "of an earlier export"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return save_run(awake(build(CONFIGS["map"], SIDE)), tmp_path / "run")


def test_a_missing_package_is_named(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exporting, "_installed", lambda name: name != "onnxruntime")
    error = fails([f"--run={small}", f"--out={tmp_path / 'out'}", "--format=onnx"], capsys)
    assert 'needs onnxruntime: pip install "vae_scale[export]"' in error
    assert not (tmp_path / "out").exists()


def test_mistakes_are_told_in_one_line(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "/nowhere" in fails(["--run=/nowhere", f"--out={tmp_path / 'out'}"], capsys)
    assert "network kl" in fails([f"--run={small}", f"--out={tmp_path / 'out'}", "--format=diffusers"], capsys)
    (tmp_path / "file").write_text("")
    assert "is a file" in fails([f"--run={small}", f"--out={tmp_path / 'file'}"], capsys)
    assert not (tmp_path / "out").exists()
