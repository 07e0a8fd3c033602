"""Losses and gradients in lower precision, and compiled, compared with fp64 and eager mode."""

import copy
import shutil

import pytest
import torch
from conftest import discs
from torch import Tensor

from vae_scale.config.parsing import parse
from vae_scale.models.networks import build_model
from vae_scale.runtime import compiling
from vae_scale.training.objectives import ELBO, Tensors

Batch = tuple[Tensor, Tensors]  # images and random inputs

NETWORKS = {
    "resnet": ["--model.preset=tiny", "--model.width=16"],
    "mse": ["--model.preset=tiny", "--model.width=16", "--model.likelihood=mse"],
    "shallow": [
        "--model.preset=tiny",
        "--model.width=8",
        "--model.channel_mult=[1]",
        "--model.num_res_blocks=1",
        "--model.patch_size=8",
    ],
}


def objective_and_batch(network: str) -> tuple[ELBO, Batch]:
    torch.manual_seed(0)
    config = parse(["--data.shards=none", "--run=none", *NETWORKS[network]])[0]
    model = build_model(config.model, 96)
    for parameter in model.parameters():  # zero-initialized layers would hide errors
        torch.nn.init.normal_(parameter, std=0.05) if parameter.ndim > 1 else None
    images = torch.from_numpy(discs(8, 1))
    random_inputs = {"noise": torch.randn(8, *model.latent_shape), "flips": torch.arange(8) % 2 == 0}
    return ELBO(model, config), (images, random_inputs)


def loss_and_gradient(objective: ELBO, batch: Batch, bf16: bool = False) -> tuple[float, Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss, _ = objective(*batch)
    gradients = torch.autograd.grad(loss, [p for p in objective.parameters() if p.requires_grad], allow_unused=True)
    return loss.item(), torch.cat([gradient.double().flatten() for gradient in gradients if gradient is not None])


def relative_difference(gradient: Tensor, reference: Tensor) -> float:
    """Returns the norm of the difference, relative to that of the reference."""
    return ((gradient - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("network", NETWORKS)
def test_fp32_and_bf16_are_close_to_fp64(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = objective_and_batch(network)
    fp32 = loss_and_gradient(objective, batch)
    bf16 = loss_and_gradient(objective, batch, bf16=True)
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "float", torch.Tensor.double)  # casts to fp32 become casts to fp64
        images, random_inputs = batch
        exact = (images, random_inputs | {"noise": random_inputs["noise"].double()})
        reference = loss_and_gradient(copy.deepcopy(objective).double(), exact)
    assert fp32[0] == pytest.approx(reference[0], rel=1e-5)
    assert relative_difference(fp32[1], reference[1]) < 1e-4
    assert bf16[0] == pytest.approx(reference[0], rel=1e-2)
    assert relative_difference(bf16[1], reference[1]) < 0.1


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler on a CPU")
def test_compiled_and_eager_results_are_equal_up_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        compiling.CACHE_VARIABLE, str(compiling.cache_folder())
    )  # torch's cache does not distinguish instruction sets
    objective, batch = objective_and_batch("shallow")
    eager = loss_and_gradient(objective, batch)
    compiled = loss_and_gradient(torch.compile(objective), batch)  # type: ignore[arg-type]
    assert compiled[0] == pytest.approx(eager[0], rel=1e-5)
    assert relative_difference(compiled[1], eager[1]) < 1e-4
