"""Exported models give the outputs of the model, and a failed export leaves no files."""

import importlib.util
import json
import math
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from vae_scale.config.options import PRESETS, VAEConfig
from vae_scale.errors import UserError
from vae_scale.export import main
from vae_scale.models import exporting
from vae_scale.models.exporting import Function
from vae_scale.models.kl import KLVAE
from vae_scale.models.mixture import GaussianMixture
from vae_scale.models.networks import build_model
from vae_scale.models.vae import VAE
from vae_scale.runtime import checkpoint

SIDE = 16
CONFIGS = {
    "map": VAEConfig("tiny", **{**PRESETS["tiny"], "width": 8, "channel_mult": [1], "attention": True}),
    "vector": VAEConfig("tiny", **{**PRESETS["tiny"], "width": 8, "channel_mult": [1], "latent": "vector"}),
    "notebook": VAEConfig("seed_notebook", **PRESETS["seed_notebook"]),
}
KL = VAEConfig("tiny", "kl", width=24, channel_mult=[1, 2], num_res_blocks=1, latent_channels=4)


def perturb(model: VAE) -> VAE:
    """Moves the parameters away from their initial values, since zero-initialized layers would hide errors."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter += scale * torch.randn(parameter.shape, generator=random)
    return model.eval()


def mixture_of(model: VAE) -> GaussianMixture:
    """Returns a prior of two wide Gaussians."""
    dim = math.prod(model.latent_shape)
    means = torch.stack([torch.full((dim,), 1.0), torch.full((dim,), -2.0)])
    return GaussianMixture(torch.tensor([0.5, 0.5]), means, 2 * torch.eye(dim).repeat(2, 1, 1))


def save_run(model: VAE, folder: Path, mixture: GaussianMixture | None = None) -> Path:
    """Saves a run with one checkpoint, whose averaged weights are those of the model and whose last weights are zero."""
    weights = model.state_dict()
    tensors = {"ema": weights, "model": {name: torch.zeros_like(tensor) for name, tensor in weights.items()}}
    if mixture:
        tensors["mixture"] = vars(mixture)
    writer = checkpoint.CheckpointWriter(folder, keep=1)
    writer.save(4800, tensors, {"config": {"data": {}}}, dict(model.to_config()))
    writer.wait()
    return folder


def error_of(options: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the line that the command prints when it fails."""
    with pytest.raises(SystemExit) as caught:
        main(options)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error:")
    assert error.count("\n") == 1
    return error


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> VAE:
    return perturb(build_model(CONFIGS[request.param], SIDE))


@pytest.fixture(scope="module")
def run(model: VAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(model, tmp_path_factory.mktemp("run"), mixture_of(model))


@pytest.fixture(scope="module")
def programs(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("programs")
    main([f"--run={run}", f"--out={out}"])
    return out


@torch.no_grad()
def assert_same_outputs(model: VAE, decode: Function, encode: Function) -> None:
    for batch_size in (1, 3):
        latents = torch.randn(batch_size, *model.latent_shape)
        images = 2 * torch.rand(batch_size, 3, model.resolution, model.resolution) - 1
        (decoded,), (mean, log_sigma) = decode(latents), encode(images)
        posterior = model.encode(images)
        for expected, actual in ((model.decode(latents), decoded), (posterior.mean, mean), (posterior.log_sigma, log_sigma)):
            assert expected.std() > 0.01  # not a constant output
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_torch_programs_give_the_outputs_of_the_model(model: VAE, programs: Path) -> None:
    decode, encode = (torch.export.load(programs / f"{name}.pt2").module() for name in ("decoder", "encoder"))
    assert_same_outputs(model, decode, encode)
    files = ["decoder.pt2", "encoder.pt2", "export.json", "mixture.safetensors"]
    assert sorted(path.name for path in programs.iterdir()) == files


def test_torch_programs_hold_no_pickle_and_no_unused_weights(programs: Path) -> None:
    for part, used, unused in (("decoder", "vae.decoder.", "vae.encoder."), ("encoder", "vae.encoder.", "vae.decoder.")):
        with zipfile.ZipFile(programs / f"{part}.pt2") as archive:
            for entry in archive.infolist():
                content = archive.read(entry)
                if "/weights/weight_" not in entry.filename:  # raw tensor data
                    assert not content.startswith((b"\x80", b"PK")), entry.filename
            name = next(entry for entry in archive.namelist() if entry.endswith("weights_config.json"))
            weights = archive.read(name).decode()
            assert used in weights
            assert unused not in weights


def test_the_description_names_the_checkpoint_and_the_difference(model: VAE, run: Path, programs: Path) -> None:
    description = json.loads((programs / "export.json").read_text())
    assert description["checkpoint"] == str(run / "checkpoints" / "images_000004800")
    assert description["images_seen"] == 4800
    assert description["latent_shape"] == list(model.latent_shape)
    assert "torch" in description["versions"]
    assert description["parts"]["decoder"]["outputs"] == ["image"]
    assert 0 <= description["parts"]["decoder"]["max_difference"] <= exporting.TOLERANCE


def onnx_functions(folder: Path) -> tuple[Function, Function]:
    """Returns the decoder and the encoder in a folder of ONNX models."""
    import onnxruntime

    def load(name: str, inputs: str, outputs: list[str]) -> Function:
        session = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        return lambda x: [torch.from_numpy(output) for output in session.run(outputs, {inputs: x.numpy()})]

    return load("decoder.onnx", "latent", ["image"]), load("encoder.onnx", "image", ["mean", "log_sigma"])


def test_onnx_models_give_the_outputs_of_the_model(model: VAE, run: Path, tmp_path: Path) -> None:
    main([f"--run={run}", f"--out={tmp_path}", "--format=onnx"])
    assert_same_outputs(model, *onnx_functions(tmp_path))


@pytest.fixture
def kl(tmp_path: Path) -> tuple[KLVAE, Path]:
    """A model of network kl, and its run."""
    model = KLVAE(KL, SIDE)
    perturb(model)
    return model, save_run(model, tmp_path / "run", mixture_of(model))


def test_diffusers_loads_the_same_autoencoder(kl: tuple[KLVAE, Path], tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    model, run = kl
    main([f"--run={run}", f"--out={tmp_path / 'kl'}", "--format=diffusers"])
    loaded, loading_info = AutoencoderKL.from_pretrained(tmp_path / "kl", output_loading_info=True)
    assert not any(loading_info.values()), loading_info
    latents, images = torch.randn(3, *model.latent_shape), 2 * torch.rand(3, 3, SIDE, SIDE) - 1
    with torch.no_grad():
        posterior, reference = model.encode(images), loaded.encode(images).latent_dist
        torch.testing.assert_close(reference.mean, posterior.mean, atol=1e-4, rtol=0)
        torch.testing.assert_close(reference.std, posterior.log_sigma.exp(), atol=1e-4, rtol=0)
        torch.testing.assert_close(loaded.decode(latents).sample, model.decoder(latents), atol=1e-4, rtol=0)
    # Components at 1 and -2 with variance 4: 4 + 1.5^2.
    assert loaded.config.scaling_factor == pytest.approx(6.25**-0.5)


def test_a_model_of_network_kl_exports_to_onnx(kl: tuple[KLVAE, Path], tmp_path: Path) -> None:
    model, run = kl
    main([f"--run={run}", f"--out={tmp_path}", "--format=onnx"])
    assert_same_outputs(model, *onnx_functions(tmp_path))


def test_network_kl_without_diffusers_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r'requires diffusers: pip install "vae_scale\[diffusers\]"'):
        KLVAE(KL, SIDE)


def test_extreme_variances_are_clamped_as_in_diffusers() -> None:
    model = KLVAE(KL, SIDE).eval()
    with torch.no_grad():
        model.encoder.conv_out.bias[4:] = torch.tensor([-100.0, 100.0, 0.0, 1.0])
        images = torch.zeros(1, 3, SIDE, SIDE)
        log_sigma = model.encode(images).log_sigma
        torch.testing.assert_close(log_sigma, model.to_diffusers().encode(images).latent_dist.logvar / 2)
    assert (log_sigma.min(), log_sigma.max()) == (-15, 10)


def test_an_export_with_different_outputs_leaves_no_files(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "export.json").write_text("of an earlier export")
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)  # always exceeded
    assert "differs from the model" in error_of([f"--run={run}", f"--out={tmp_path}"], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["export.json"]
    assert (tmp_path / "export.json").read_text() == "of an earlier export"


@pytest.fixture
def resnet_run(tmp_path: Path) -> Path:
    return save_run(perturb(build_model(CONFIGS["map"], SIDE)), tmp_path / "run")


def test_a_missing_package_is_named(
    resnet_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    error = error_of([f"--run={resnet_run}", f"--out={tmp_path / 'out'}", "--format=onnx"], capsys)
    assert 'requires onnxruntime: pip install "vae_scale[export]"' in error
    assert not (tmp_path / "out").exists()


def test_user_errors_are_reported_in_one_line(resnet_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "/nowhere" in error_of(["--run=/nowhere", f"--out={tmp_path / 'out'}"], capsys)
    assert "network kl" in error_of([f"--run={resnet_run}", f"--out={tmp_path / 'out'}", "--format=diffusers"], capsys)
    (tmp_path / "file").write_text("")
    assert "is a file" in error_of([f"--run={resnet_run}", f"--out={tmp_path / 'file'}"], capsys)
    assert not (tmp_path / "out").exists()
