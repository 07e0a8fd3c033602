"""Export to torch.export programs, ONNX, and diffusers' AutoencoderKL."""

import importlib.metadata
import importlib.util
import io
import tempfile
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
ONNX_PACKAGES = ["onnx", "onnxscript", "onnxruntime"]
PARTS: dict[Part, tuple[str, list[str]]] = {"decoder": ("latent", ["image"]), "encoder": ("image", ["mean", "log_sigma"])}
BATCH_SIZES = (1, 3)  # for which outputs are compared
MAX_KL_BATCH = 63  # images; diffusers' layers take another path for larger batches
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
    """Exports `model` to the folder `out`. Returns the content of `export.json`.

    Format torch writes `decoder.pt2` and `encoder.pt2`, onnx `decoder.onnx` and `encoder.onnx`, for fp32 and any batch size
    (network kl: at most 63), whose outputs are compared with those of the model; diffusers writes a folder for
    `AutoencoderKL.from_pretrained`. The mixture prior, if any, is saved to `mixture.safetensors`. `export.json` describes the
    export and is written last.

    Args:
        model: The model, on the CPU.
        out: The folder, which need not exist.
        form: The format.
        source: Entries of `export.json` about the origin of the weights.

    Raises:
        UserError: if a package is missing, the network does not support the format, or outputs differ by more than `TOLERANCE`.
    """
    packages = ONNX_PACKAGES if form == "onnx" else []
    if missing := [name for name in packages if not importlib.util.find_spec(name)]:
        raise UserError(f'--format onnx requires {", ".join(missing)}: pip install "vae_scale[export]"')
    if form == "diffusers" and not isinstance(model, KLVAE):
        raise UserError(f"--format diffusers requires model.network kl; this is a {type(model).__name__}: use torch or onnx")
    description = {
        "format": form,
        "network": type(model).__name__,
        "resolution": model.resolution,
        "latent_shape": list(model.latent_shape),
        "prior": model.describe_prior(),
        "versions": {name: importlib.metadata.version(name) for name in ["vae_scale", "torch", *packages]},
        **source,
    }
    model.eval()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as name:
        temporary = Path(name)
        if isinstance(model, KLVAE) and form == "diffusers":
            description["scaling_factor"] = _save_diffusers(model, temporary)
        else:
            description["parts"] = {part: _export_part(model, part, temporary, form) for part in PARTS}
        if model.mixture:
            save_file(vars(model.mixture), temporary / MIXTURE)
        (out / DESCRIPTION).unlink(missing_ok=True)  # so that it never describes the files of another export
        for path in temporary.iterdir():
            path.replace(out / path.name)
    write_json(out / DESCRIPTION, description)
    return description


def _export_part(model: VAE, part: Part, folder: Path, form: Format) -> dict[str, Any]:
    """Exports the decoder or the encoder, and returns its description."""
    inputs = (_random_input(model, part, 2),)  # a batch size of 1 would be traced as a constant
    shapes = ({0: Dim("batch", max=MAX_KL_BATCH if isinstance(model, KLVAE) else None)},)
    with torch.no_grad():
        program = torch.export.export(_PartModule(model, part).eval(), inputs, dynamic_shapes=shapes)
    _remove_unused(program)
    path = folder / f"{part}.{'onnx' if form == 'onnx' else 'pt2'}"
    function = _save_onnx(program, part, shapes, path) if form == "onnx" else _save_program(program, path)
    input_name, output_names = PARTS[part]
    difference = _compare(model, part, function)
    return {"file": path.name, "input": input_name, "outputs": output_names, "max_difference": difference}


def _random_input(model: VAE, part: Part, batch_size: int) -> Tensor:
    random = torch.Generator().manual_seed(batch_size)
    if part == "decoder":
        return torch.randn(batch_size, *model.latent_shape, generator=random)
    return 2 * torch.rand(batch_size, 3, model.resolution, model.resolution, generator=random) - 1


def _remove_unused(program: ExportedProgram) -> None:
    """Removes the parameters of the other part, and the example inputs, which would be pickled."""
    program.example_inputs = None
    specs = program.graph_signature.input_specs
    for node, spec in zip(program.graph.find_nodes(op="placeholder"), list(specs), strict=True):
        if spec.target is not None and not node.users:
            program.graph.erase_node(node)
            specs.remove(spec)
            program.state_dict.pop(spec.target, None)
    program.graph_module.recompile()


def _save_program(program: ExportedProgram, path: Path) -> Function:
    buffer = io.BytesIO()  # torch.export.save reports a full disk without the file name
    torch.export.save(program, buffer)
    with zipfile.ZipFile(buffer) as archive:
        if any(entry.file_size and entry.filename.endswith(".pt") for entry in archive.infolist()):
            raise UserError(f"torch {torch.__version__} would pickle the weights; update torch, or use --format onnx")
    path.write_bytes(buffer.getbuffer())
    return program.module()


def _save_onnx(program: ExportedProgram, part: Part, shapes: tuple[dict[int, Dim]], path: Path) -> Function:
    import onnxruntime

    input_name, output_names = PARTS[part]
    # The shapes are repeated to name the axis in the ONNX graph.
    exported = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=[input_name], output_names=output_names, dynamic_shapes=shapes
    )
    assert exported is not None
    exported.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(output) for output in session.run(None, {input_name: x.numpy()})]


def _save_diffusers(model: KLVAE, folder: Path) -> float:
    """Saves an AutoencoderKL. Returns its scaling factor: 1 / the standard deviation of latents under the mixture, or 1."""
    factor = 1.0
    if mixture := model.mixture:
        mean = mixture.weights @ mixture.means
        square = mixture.weights @ (mixture.means.square() + mixture.factors.square().sum(2))
        factor = float((square.mean() - mean.mean().square()) ** -0.5)
    model.to_diffusers(factor).save_pretrained(folder)
    return factor


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
