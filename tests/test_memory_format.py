"""On GPUs, convolutions get channels_last memory in both directions: anything else costs them a transposition."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import discs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vae_scale.config import VAEConfig, parse
from vae_scale.models.blocks import MIN_GROUP_CHANNELS, GroupNorm, group_norm_channels_last, norm
from vae_scale.models.critic import Critic
from vae_scale.models.networks import build
from vae_scale.models.vae import VAE
from vae_scale.training.objective import ELBO

OPTIONS = {
    "resnet": ["--model.preset=base", "--model.blocks=1"],
    "vector": ["--model.preset=small", "--model.latent=vector"],
    "logistic mixture": ["--model.preset=tiny", "--model.likelihood=logistic_mixture"],
    "laplace": ["--model.preset=tiny", "--model.likelihood=laplace"],
    "critic": ["--model.preset=tiny", "--objective.adversarial=0.5"],
    "ladder": ["--model.preset=ladder", "--model.patch=4", "--model.blocks=1"],
    "kl": ["--model.preset=kl", "--model.blocks=1", "--model.multipliers=[1,2]"],
    "augmented": ["--model.preset=kl", "--model.blocks=1", "--model.multipliers=[1,2]", "--data.crop=0.2", "--data.colour=0.2"],
    "bce": ["--model.preset=seed_notebook", "--model.likelihood=bce"],
}


class ConvolutionInputs(TorchDispatchMode):
    """Records which inputs of convolutions, and of their gradients, are not channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.others: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ("aten::convolution", "aten::convolution_backward"):
            for tensor in args[:3]:
                if isinstance(tensor, Tensor) and tensor.ndim == 4:
                    self.count += 1
                    if not tensor.is_contiguous(memory_format=torch.channels_last):
                        self.others.append(f"{func.name()} {list(tensor.shape)} {tensor.stride()}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def norms_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """GroupNorm as it is compiled for GPUs."""

    def forward(self: GroupNorm, x: Tensor) -> Tensor:
        return group_norm_channels_last(x, self.num_groups, self.weight, self.bias, self.eps)

    monkeypatch.setattr(GroupNorm, "forward", forward)


def objective_of(options: list[str]) -> tuple[ELBO, tuple[Any, ...]]:
    torch.manual_seed(0)
    config = parse(["--data.shards=none", "--run=none", "--model.width=16", *options])[0]
    model = build(config.model, 96)
    if config.objective.critic:
        model.critic = Critic(8)
    model.to(memory_format=torch.channels_last)
    for parameter in model.parameters():  # zeros at the start would let no gradient through
        torch.nn.init.normal_(parameter, std=0.05)
    draws = {"noise": torch.randn(4, *model.latent_shape), "flips": torch.arange(4) % 2 == 0}
    if config.data.crop:
        draws["augmentation"] = torch.rand(4, 6)
    return ELBO(model, config), (torch.from_numpy(discs(4, 0)), draws, torch.ones(()), torch.ones(()))


@pytest.mark.usefixtures("norms_of_gpus")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_convolution_gets_channels_last_inputs_and_gradients(options: list[str]) -> None:
    objective, batch = objective_of(options)
    with ConvolutionInputs() as recorded:
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = objective(*batch)
        loss.backward()
    assert recorded.count > 20
    assert recorded.others == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_group_norm_of_gpus_is_torchs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (3 + torch.randn(4, 32, 5, 7)).to(dtype).to(memory_format=torch.channels_last)
    theirs = nn.GroupNorm(2, 32)
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    mine, other = (x.clone().requires_grad_() for _ in range(2))
    y = group_norm_channels_last(mine, 2, theirs.weight, theirs.bias, theirs.eps)
    expected = theirs(other.float())
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)
    direction = torch.randn(4, 32, 5, 7).to(memory_format=torch.channels_last)
    gradient = torch.autograd.grad((y.float() * direction).sum(), mine)[0]
    torch.testing.assert_close(
        gradient.float(), torch.autograd.grad((expected * direction).sum(), other)[0].float(), rtol=tolerance, atol=tolerance
    )
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024])
def test_groups_fill_a_sector_of_memory(channels: int) -> None:
    layer = norm(channels)
    assert channels // layer.num_groups >= MIN_GROUP_CHANNELS
    assert layer.num_groups <= 32
    if channels % 32 == 0:
        assert layer.num_groups > 1


def biases_before_norms(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.bias is not None
            yield name, layer.bias


@pytest.mark.parametrize("network", ["resnet", "vector", "kl"])
def test_no_bias_is_undone_by_the_norm_behind_it(network: str) -> None:
    objective, (images, draws, *_) = objective_of(OPTIONS[network])
    x = objective.prepare(images, draws)

    def outputs() -> Tensor:
        terms = objective.model(x, draws["noise"])
        return torch.cat([terms.output.flatten(), terms.kl.flatten()])

    with torch.no_grad():
        before = outputs()
        for name, bias in biases_before_norms(objective.model):
            change = 3 * torch.randn(bias.shape)
            bias += change
            assert (outputs() - before).abs().max() > 1e-4, name  # rounding is a hundredth of this
            bias -= change


def test_a_saved_model_computes_in_channels_last_memory(tmp_path: Path) -> None:
    config = VAEConfig(preset="tiny", patch=4, width=16, multipliers=[1, 2], blocks=1, latent_channels=4)
    build(config, 32).save_pretrained(tmp_path)
    model = VAE.from_pretrained(tmp_path)
    weights = [weight for weight in model.parameters() if weight.ndim == 4]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    with ConvolutionInputs() as recorded, torch.inference_mode():
        model.sample(2)
        model.reconstruct(torch.rand(2, 32, 32, 3).permute(0, 3, 1, 2))
    # A latent comes in contiguous memory, and is small.
    assert [line for line in recorded.others if "[2, 4, 4, 4]" not in line] == []
