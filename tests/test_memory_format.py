"""Convolutions have channels_last inputs and gradients, which avoids transpositions on GPUs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import discs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vae_scale.config.options import VAEConfig
from vae_scale.config.parsing import parse
from vae_scale.models.blocks import MIN_GROUP_CHANNELS, GroupNorm, group_norm, group_norm_channels_last
from vae_scale.models.networks import build_model
from vae_scale.models.vae import VAE
from vae_scale.training.objectives import ELBO, FlowMatching

OPTIONS = {
    "resnet": ["--model.preset=base", "--model.num_res_blocks=1"],
    "vector": ["--model.preset=small", "--model.latent=vector"],
    "augmented": ["--model.preset=tiny", "--data.random_crop=0.2", "--data.color_jitter=0.2"],
    "mse": ["--model.preset=seed_notebook"],
}


class ConvolutionInputs(TorchDispatchMode):
    """Records which inputs of convolutions, and of their gradients, are not channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.not_channels_last: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ("aten::convolution", "aten::convolution_backward"):
            for tensor in args[:3]:
                if isinstance(tensor, Tensor) and tensor.ndim == 4:
                    self.count += 1
                    if not tensor.is_contiguous(memory_format=torch.channels_last):
                        self.not_channels_last.append(f"{func.name()} {list(tensor.shape)} {tensor.stride()}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def gpu_group_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces GroupNorm with the implementation that is compiled on GPUs."""

    def forward(self: GroupNorm, x: Tensor) -> Tensor:
        return group_norm_channels_last(x, self.num_groups, self.weight, self.bias, self.eps)

    monkeypatch.setattr(GroupNorm, "forward", forward)


def build_objective(options: list[str]) -> tuple[ELBO, tuple[Any, ...]]:
    torch.manual_seed(0)
    config = parse(["--data.shards=none", "--run=none", "--model.width=16", *options])[0]
    model = build_model(config.model, 96)
    model.to(memory_format=torch.channels_last)
    for parameter in model.parameters():  # zero-initialized layers would block gradients
        torch.nn.init.normal_(parameter, std=0.05)
    random_inputs = {"noise": torch.randn(4, *model.latent_shape), "flips": torch.arange(4) % 2 == 0}
    if config.data.random_crop:
        random_inputs["augmentation"] = torch.rand(4, 6)
    return ELBO(model, config), (torch.from_numpy(discs(4, 0)), random_inputs)


@pytest.mark.usefixtures("gpu_group_norm")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_convolution_has_channels_last_inputs_and_gradients(options: list[str]) -> None:
    objective, batch = build_objective(options)
    with ConvolutionInputs() as recorded:
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = objective(*batch)
        loss.backward()
    assert recorded.count > 20
    assert recorded.not_channels_last == []


@pytest.mark.usefixtures("gpu_group_norm")
@pytest.mark.parametrize("encoded", [False, True])
def test_every_convolution_of_the_flow_has_channels_last_inputs_and_gradients(encoded: bool) -> None:
    torch.manual_seed(0)
    config = parse(["--data.shards=none", "--run=none", "--model.preset=tiny"])[0]
    model = build_model(config.model, 96)
    flow = model.add_flow(32, 1, ["a", "b"]).to(memory_format=torch.channels_last)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.requires_grad_(False).to(memory_format=torch.channels_last)
    flow.requires_grad_(True)
    inputs = {name: torch.randn(4, *model.latent_shape) for name in ("noise", "start")}
    inputs |= {"time": torch.rand(4), "label": torch.arange(4) % 3, "augmentation": torch.zeros(4, 6)}
    if encoded:
        channels, height, width = model.latent_shape
        inputs["posterior"] = torch.zeros(4, 2, height, width, channels, dtype=torch.float16)
    with ConvolutionInputs() as recorded:
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = FlowMatching(model, config)(torch.from_numpy(discs(4, 0)), inputs)
        loss.backward()
    assert recorded.count > 20
    assert recorded.not_channels_last == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_channels_last_group_norm_equals_pytorchs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (3 + torch.randn(4, 32, 5, 7)).to(dtype).to(memory_format=torch.channels_last)
    reference = nn.GroupNorm(2, 32)
    nn.init.normal_(reference.weight)
    nn.init.normal_(reference.bias)
    x1, x2 = (x.clone().requires_grad_() for _ in range(2))
    y = group_norm_channels_last(x1, 2, reference.weight, reference.bias, reference.eps)
    expected = reference(x2.float())
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)
    direction = torch.randn(4, 32, 5, 7).to(memory_format=torch.channels_last)
    gradient = torch.autograd.grad((y.float() * direction).sum(), x1)[0]
    torch.testing.assert_close(
        gradient.float(), torch.autograd.grad((expected * direction).sum(), x2)[0].float(), rtol=tolerance, atol=tolerance
    )
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024])
def test_groups_have_at_least_16_channels(channels: int) -> None:
    layer = group_norm(channels)
    assert channels // layer.num_groups >= MIN_GROUP_CHANNELS
    assert layer.num_groups <= 32
    if channels % 32 == 0:
        assert layer.num_groups > 1


def conv_biases(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.bias is not None
            yield name, layer.bias


@pytest.mark.parametrize("network", ["resnet", "vector"])
def test_group_norm_does_not_cancel_the_bias_of_a_convolution(network: str) -> None:
    objective, (images, random_inputs) = build_objective(OPTIONS[network])
    x = objective.preprocess(images, random_inputs)

    def outputs() -> Tensor:
        terms = objective.model(x, random_inputs["noise"])
        return torch.cat([terms.output.flatten(), terms.kl.flatten()])

    with torch.no_grad():
        before = outputs()
        for name, bias in conv_biases(objective.model):
            change = 3 * torch.randn(bias.shape)
            bias += change
            assert (outputs() - before).abs().max() > 1e-4, name  # rounding errors are 100 times smaller
            bias -= change


def test_a_loaded_model_computes_in_channels_last_memory(tmp_path: Path) -> None:
    config = VAEConfig(preset="tiny", patch_size=4, width=16, channel_mult=[1, 2], num_res_blocks=1, latent_channels=4)
    build_model(config, 32).save_pretrained(tmp_path)
    model = VAE.from_pretrained(tmp_path)
    weights = [weight for weight in model.parameters() if weight.ndim == 4]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    with ConvolutionInputs() as recorded, torch.inference_mode():
        model.sample(2)
        model.reconstruct(torch.rand(2, 32, 32, 3).permute(0, 3, 1, 2))
    # Latents are contiguous, and small.
    assert [line for line in recorded.not_channels_last if "[2, 4, 4, 4]" not in line] == []
