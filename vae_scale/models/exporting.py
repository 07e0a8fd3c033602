"""Export to torch.export programs, ONNX, and diffusers' AutoencoderKL."""

import importlib.metadata
import importlib.util
import io
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vae_scale.errors import UserError
from vae_scale.files import write_json
from vae_scale.models.kl import KLVAE
from vae_scale.models.pretrained import MIXTURE
from vae_scale.models.vae import VAE

Format = Literal["torch", "onnx", "diffusers"]
Part = Literal["decoder", "encoder"]
Function = Callable[[Tensor], Sequence[Tensor]]
DESCRIPTION = "export.json"
PACKAGES = {"torch": [], "onnx": ["onnx", "onnxscript", "onnxruntime"], "diffusers": ["diffusers"]}
PARTS: dict[Part, tuple[str, list[str]]] = {"decoder": ("latent", ["image"]), "encoder": ("image", ["mean", "log_sigma"])}
BATCH_SIZES = [1, 3]  # for which outputs are compared
TOLERANCE = 1e-3  # maximum difference from the model's output, relative to the largest output or 1: 1/8 grey level


class _PartModule(nn.Module):
    """The decoder, from latents to the expected images, or the encoder, from images to the posterior's mean and log sigma."""

    def __init__(self, vae: VAE, part: Part) -> None:
        super().__init__()
        self.vae, self.part = vae, part

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.part == "decoder":
            return (self.vae.decode(x),)
        posterior = self.vae.encode(x)
        return posterior.mean, posterior.log_sigma


def export_model(model: VAE, out: Path, form: Format, source: dict[str, Any]) -> dict[str, Any]:
    """Exports `model` to the folder `out` and verifies the outputs. Returns the content of `export.json`.

    Format torch writes `decoder.pt2` and `encoder.pt2`, onnx `decoder.onnx` and `encoder.onnx`, for fp32 and any batch size;
    diffusers writes a folder for `AutoencoderKL.from_pretrained`. The mixture prior, if any, is saved to
    `mixture.safetensors`. `export.json` describes the export and is written last.

    Args:
        model: The model, on the CPU.
        out: The folder, which need not exist.
        form: The format.
        source: Entries of `export.json` about the origin of the weights.

    Raises:
        UserError: if a package is missing, the network does not support the format, or outputs differ by more than `TOLERANCE`.
    """
    missing = [name for name in PACKAGES[form] if not _is_installed(name)]
    if missing:
        raise UserError(f'--format {form} requires {", ".join(missing)}: pip install "vae_scale[export]"')
    temporary = out.resolve().with_name(f".{out.resolve().name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.eval()
    try:
        description = {
            "format": form,
            "network": type(model).__name__,
            "resolution": model.resolution,
            "latent_shape": list(model.latent_shape),
            "prior": model.describe_prior(),
            "tolerance": TOLERANCE,
            "versions": {name: importlib.metadata.version(name) for name in ["vae_scale", "torch", *PACKAGES[form]]},
        }
        parts = _export_diffusers(model, temporary) if form == "diffusers" else _export_programs(model, temporary, form)
        description |= source | parts
        if model.mixture:
            save_file(vars(model.mixture), temporary / MIXTURE)
        write_json(temporary / DESCRIPTION, description)
        out.mkdir(parents=True, exist_ok=True)
        (out / DESCRIPTION).unlink(missing_ok=True)  # so that it never describes the files of another export
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == DESCRIPTION):
            path.replace(out / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return description


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _random_input(model: VAE, part: Part, batch_size: int) -> Tensor:
    random = torch.Generator().manual_seed(batch_size)
    if part == "decoder":
        return torch.randn(batch_size, *model.latent_shape, generator=random)
    return 2 * torch.rand(batch_size, 3, model.resolution, model.resolution, generator=random) - 1


def _export_programs(model: VAE, folder: Path, form: Format) -> dict[str, Any]:
    parts = {}
    for part, (input_name, output_names) in PARTS.items():
        inputs = (_random_input(model, part, 2),)  # a batch size of 1 would be traced as a constant
        with torch.no_grad():
            program = torch.export.export(_PartModule(model, part).eval(), inputs, dynamic_shapes=({0: Dim("batch")},))
        _strip(program)
        path = folder / f"{part}.{'onnx' if form == 'onnx' else 'pt2'}"
        function = _save_onnx(program, part, path) if form == "onnx" else _save_program(program, path)
        difference = _compare(model, part, function)
        parts[part] = {"file": path.name, "input": input_name, "outputs": output_names, "max_difference": difference}
    return {"parts": parts}


def _strip(program: ExportedProgram) -> None:
    """Removes unused parameters, the example inputs (they would be pickled) and stack traces, which contain source paths."""
    program.example_inputs = None
    specs = program.graph_signature.input_specs
    for node, spec in zip(program.graph.find_nodes(op="placeholder"), list(specs), strict=True):
        if spec.target is not None and not node.users:
            program.graph.erase_node(node)
            specs.remove(spec)
            program.state_dict.pop(spec.target, None)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    program.graph_module.recompile()


def _save_program(program: ExportedProgram, path: Path) -> Function:
    buffer = io.BytesIO()  # torch.export.save reports a full disk without the file name
    torch.export.save(program, buffer)
    with zipfile.ZipFile(buffer) as archive:
        names = [entry.filename for entry in archive.infolist() if entry.file_size]
    pickled = [name for name in names if name.endswith((".pt", ".pkl"))]
    if pickled:
        raise UserError(f"torch {torch.__version__} would pickle {pickled[0]}; update torch, or use --format onnx")
    path.write_bytes(buffer.getbuffer())
    return program.module()


def _save_onnx(program: ExportedProgram, part: Part, path: Path) -> Function:
    import onnxruntime

    input_name, output_names = PARTS[part]
    shapes = ({0: Dim("batch")},)  # repeated, to name the axis in the ONNX graph
    exported = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=[input_name], output_names=output_names, dynamic_shapes=shapes
    )
    assert exported is not None
    exported.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(output) for output in session.run(None, {input_name: x.numpy()})]


def _export_diffusers(model: VAE, folder: Path) -> dict[str, Any]:
    """Saves an AutoencoderKL. Its scaling factor is 1 / the standard deviation of latents under the mixture prior, or 1."""
    if not isinstance(model, KLVAE):
        raise UserError(f"--format diffusers requires model.network kl; this is a {type(model).__name__}: use torch or onnx")
    factor = 1.0
    if mixture := model.mixture:
        mean = mixture.weights @ mixture.means
        square = mixture.weights @ (mixture.means.square() + mixture.factors.square().sum(2))
        factor = float((square.mean() - mean.mean().square()) ** -0.5)
    model.to_diffusers(factor).save_pretrained(folder)

    from diffusers import AutoencoderKL

    saved = AutoencoderKL.from_pretrained(folder)

    def encode(images: Tensor) -> list[Tensor]:
        posterior = saved.encode(images).latent_dist
        return [posterior.mean, posterior.logvar / 2]

    def decode(latents: Tensor) -> list[Tensor]:
        return [saved.decode(latents).sample.clamp(-1, 1)]

    functions: dict[Part, Function] = {"decoder": decode, "encoder": encode}
    parts = {part: {"max_difference": _compare(model, part, function)} for part, function in functions.items()}
    return {"scaling_factor": factor, "parts": parts}


@torch.no_grad()
def _compare(model: VAE, part: Part, function: Function) -> float:
    """Returns the maximum absolute difference between the outputs of `model` and `function`, if it is within `TOLERANCE`."""
    maximum = 0.0
    for batch_size in BATCH_SIZES:
        inputs = _random_input(model, part, batch_size)
        for expected, actual in zip(_PartModule(model, part)(inputs), function(inputs), strict=True):
            difference = float((expected - actual).abs().max())
            if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
                raise UserError(f"the exported {part} differs from the model by {difference:.1g}; nothing was written")
            maximum = max(maximum, difference)
    return maximum
