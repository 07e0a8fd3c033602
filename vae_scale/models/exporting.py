"""Models in formats that others read: torch.export, ONNX, and diffusers' AutoencoderKL."""

import importlib.metadata
import importlib.util
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vae_scale.errors import UserError
from vae_scale.models.kl import KLVAE
from vae_scale.models.vae import CONFIG, MIXTURE, VAE

Format = Literal["torch", "onnx", "diffusers"]
Run = Callable[[Tensor], Sequence[Tensor]]
DESCRIPTION = "export.json"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"  # the name that diffusers looks for
ONNX_PACKAGES = ["onnx", "onnxscript", "onnxruntime"]
BATCHES = [1, 3]  # sizes at which outputs are compared
TOLERANCE = 1e-3  # largest difference from the model's own output, relative to the largest output or 1: 1/8 grey level
LARGEST_ONNX = 1_800_000_000  # bytes of weights in one file: protobuf ends at 2 GiB


@dataclass
class Part:
    """The decoder or the encoder, and its tensors by name: shape, range and meaning.

    Attributes:
        module: One tensor to a tuple of tensors.
        example: Random inputs of a batch size.
        inputs: The input.
        outputs: The outputs, in order.
    """

    module: nn.Module
    example: Callable[[int], Tensor]
    inputs: dict[str, dict[str, Any]]
    outputs: dict[str, dict[str, Any]]


class Decoder(nn.Module):
    """Latents [b, c, h, w] to expected images [b, 3, side, side] in [-1, 1]."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent: Tensor) -> tuple[Tensor, ...]:
        """The image, in a tuple of one."""
        return (self.vae.decode(latent),)


class Encoder(nn.Module):
    """Images [b, 3, side, side] in [-1, 1] to mean and log sigma of their posteriors, [b, c, h, w] each."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """The mean and log sigma."""
        posterior = self.vae.encode(image)
        return posterior.mean, posterior.log_sigma


def export(model: VAE, out: Path, form: Format, source: dict[str, Any]) -> dict[str, Any]:
    """Writes `model` into the folder `out`. Nothing gets its final name before it was compared with the model's own output.

    torch writes `decoder.pt2` and `encoder.pt2` for `torch.export.load`, onnx `decoder.onnx` and `encoder.onnx`: fp32 and any
    batch size. diffusers writes `config.json` and `diffusion_pytorch_model.safetensors` for `AutoencoderKL.from_pretrained`.
    Beside them stand `mixture.safetensors`, the learned prior if there is one, and, written last, `export.json`.

    Args:
        model: On the CPU.
        out: Made if it is not there.
        form: The format.
        source: What `export.json` says of the weights' origin.

    Returns:
        What `export.json` holds.

    Raises:
        UserError: a package is missing, the network does not fit the format, or outputs differ by more than `TOLERANCE`.
    """
    missing = [name for name in ONNX_PACKAGES if form == "onnx" and not _installed(name)]
    if missing:
        raise UserError(f'--format onnx needs {", ".join(missing)}: pip install "vae_scale[export]"')
    aside = out.resolve().with_name(f".{out.resolve().name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    model.eval()
    try:
        description = _describe(model, form) | source
        description |= _write_diffusers(model, aside) if form == "diffusers" else _write_programs(model, aside, form)
        if model.mixture:
            (aside / MIXTURE).write_bytes(save(vars(model.mixture)))
        (aside / DESCRIPTION).write_text(json.dumps(description, indent=2))
        out.mkdir(parents=True, exist_ok=True)
        (out / DESCRIPTION).unlink(missing_ok=True)  # it vouches for the others: the first to go and the last to come
        for path in sorted(aside.iterdir(), key=lambda path: path.name == DESCRIPTION):
            path.replace(out / path.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return description


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _describe(model: VAE, form: Format) -> dict[str, Any]:
    used = ["vae_scale", "torch", *{"torch": [], "onnx": ONNX_PACKAGES, "diffusers": ["diffusers"]}[form]]
    latent: dict[str, Any] = {"shape": list(model.latent_shape), "prior": model.name_prior()}
    if model.mixture:
        mean, square = _moments(model)
        latent |= {"mean_of_channels": mean.tolist(), "std_of_channels": (square - mean.square()).sqrt().tolist()}
    return {
        "format": form,
        "network": type(model).__name__,
        "likelihood": model.config.likelihood,
        "resolution": model.resolution,
        "latent": latent,
        "tolerance": TOLERANCE,
        "versions": {name: importlib.metadata.version(name) for name in used if _installed(name)},
    }


def _moments(model: VAE) -> tuple[Tensor, Tensor]:
    """Mean and mean square of each latent channel, [c] and [c], over the learned prior, which is fitted to the posteriors."""
    mixture = model.mixture
    assert mixture is not None
    mean = mixture.weights @ mixture.means
    square = mixture.weights @ (mixture.means.square() + mixture.factors.square().sum(2))
    channels = model.latent_shape[0]
    return mean.reshape(channels, -1).mean(1), square.reshape(channels, -1).mean(1)


def _parts(model: VAE) -> dict[str, Part]:
    random = torch.Generator().manual_seed(0)
    images = (3, model.resolution, model.resolution)
    image = {"shape": ["batch", *images], "dtype": "float32", "range": [-1, 1], "channels": "red, green, blue"}
    latent = {"shape": ["batch", *model.latent_shape], "dtype": "float32", "range": None}
    return {
        "decoder": Part(
            Decoder(model).eval(),
            lambda batch: torch.randn(batch, *model.latent_shape, generator=random),
            {"latent": {**latent, "meaning": f"a draw from the prior, {model.name_prior()}, or from a posterior"}},
            {"image": {**image, "meaning": "the expected image"}},
        ),
        "encoder": Part(
            Encoder(model).eval(),
            lambda batch: 2 * torch.rand(batch, *images, generator=random) - 1,
            {"image": {**image, "meaning": "grey levels / 127.5 - 1"}},
            {
                "mean": {**latent, "meaning": "mean of the posterior, a Gaussian for each number of the latent"},
                "log_sigma": {**latent, "meaning": "natural logarithm of the posterior's standard deviation"},
            },
        ),
    }


def _write_programs(model: VAE, folder: Path, form: Format) -> dict[str, Any]:
    described = {}
    for name, part in _parts(model).items():
        with torch.no_grad():
            # Traced at batch 2, since a size of 1 would become a constant.
            program = torch.export.export(part.module, (part.example(2),), dynamic_shapes=({0: Dim("batch")},))
        _tidy(program)
        path = folder / f"{name}.{'onnx' if form == 'onnx' else 'pt2'}"
        run = _write_onnx(program, part, path) if form == "onnx" else _write_torch(program, path)
        described[name] = {
            "file": path.name,
            "inputs": part.inputs,
            "outputs": part.outputs,
            "batches_compared": BATCHES,
            "largest_difference": _compare(name, part.example, part.module, run),
        }
    return {"parts": described}


def _tidy(program: ExportedProgram) -> None:
    """Takes out what the file should not hold: weights of the other part, a pickle, and names of this machine's folders."""
    program.example_inputs = None  # would be pickled
    specs = program.graph_signature.input_specs
    inputs = program.graph.find_nodes(op="placeholder")
    for node, spec in zip(inputs, list(specs), strict=True):
        if spec.target is not None and not node.users:
            program.graph.erase_node(node)
            specs.remove(spec)
            program.state_dict.pop(spec.target, None)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    program.graph_module.recompile()


def _write_torch(program: ExportedProgram, path: Path) -> Run:
    buffer = io.BytesIO()  # so that a full disk is an OSError that names the file
    torch.export.save(program, buffer)
    with zipfile.ZipFile(buffer) as archive:
        files = [entry.filename for entry in archive.infolist() if entry.file_size]
    pickled = [name for name in files if name.endswith((".pt", ".pkl"))]
    if pickled:
        raise UserError(f"torch {torch.__version__} would pickle {pickled[0]}; update torch, or use --format onnx")
    path.write_bytes(buffer.getbuffer())
    return program.module()


def _write_onnx(program: ExportedProgram, part: Part, path: Path) -> Run:
    import onnxruntime

    exported = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=list(part.inputs),
        output_names=list(part.outputs),
        dynamic_shapes=({0: Dim("batch")},),  # once more, for the name of the axis
    )
    assert exported is not None
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    exported.save(path, external_data=size > LARGEST_ONNX)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = part.inputs
    return lambda x: [torch.from_numpy(output) for output in session.run(None, {name: x.numpy()})]


def _write_diffusers(model: VAE, folder: Path) -> dict[str, Any]:
    if not isinstance(model, KLVAE):
        raise UserError(
            f"--format diffusers needs a model with model.network kl; this is a {type(model).__name__}: use torch or onnx"
        )
    factor, told = 1.0, "1, as no prior was fitted to say how large latents are"
    if model.mixture:
        mean, square = _moments(model)
        factor = float((square.mean() - mean.mean().square()) ** -0.5)
        told = "1 / standard deviation of all latents under the learned prior (Rombach et al., 2022, appendix G)"
    config, weights = model.as_diffusers(factor)
    (folder / CONFIG).write_text(json.dumps(config, indent=2))
    (folder / DIFFUSERS_WEIGHTS).write_bytes(save({name: tensor.contiguous() for name, tensor in weights.items()}))
    parts = _parts(model)
    # What AutoencoderKL's own methods take and give, in its terms.
    methods = {"decoder": "decode(latent).sample, not clamped to [-1, 1]", "encoder": "encode(image).latent_dist"}
    described: dict[str, Any] = {
        name: {"file": DIFFUSERS_WEIGHTS, "call": methods[name], "inputs": part.inputs, "outputs": part.outputs}
        | {"batches_compared": [], "largest_difference": None}
        for name, part in parts.items()
    }
    if _installed("diffusers"):
        for name, run in _load_diffusers(folder).items():
            difference = _compare(name, parts[name].example, parts[name].module, run)
            described[name] |= {"batches_compared": BATCHES, "largest_difference": difference}
    return {"scaling_factor": factor, "scaling_factor_is": told, "parts": described}


def _load_diffusers(folder: Path) -> dict[str, Run]:
    """The decoder and the encoder of the AutoencoderKL in `folder`, with inputs and outputs like ours."""
    from diffusers import AutoencoderKL

    loaded, told = AutoencoderKL.from_pretrained(folder, output_loading_info=True)
    wrong = [key for keys in told.values() for key in keys]
    if wrong:
        raise UserError(f"diffusers reads these weights otherwise: {wrong[0]}")

    def encode(images: Tensor) -> list[Tensor]:
        posterior = loaded.encode(images).latent_dist
        return [posterior.mean, posterior.logvar / 2]

    return {"decoder": lambda latents: [loaded.decode(latents).sample.clamp(-1, 1)], "encoder": encode}


@torch.no_grad()
def _compare(name: str, example: Callable[[int], Tensor], module: nn.Module, run: Run) -> float:
    """The largest absolute difference between what `module` and `run` give.

    Raises:
        UserError: it is above `TOLERANCE`, relative to the output's largest number or 1, or not a number.
    """
    largest = 0.0
    for batch in BATCHES:
        inputs = example(batch)
        for ours, theirs in zip(module(inputs), run(inputs), strict=True):
            difference = float((ours - theirs).abs().max())
            if not difference <= TOLERANCE * max(1.0, float(ours.abs().max())):
                raise UserError(f"the exported {name} differs from the model by {difference:.1g}; nothing was written")
            largest = max(largest, difference)
    return largest
