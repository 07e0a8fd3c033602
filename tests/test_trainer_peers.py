"""The peers of the training benchmark train the same network, and learn."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compare_trainers import main
from conftest import TINY, discs
from plain_network import Loss, plain
from trainer_peers import Peer, compare, peers

from vae_scale.benchmark import training
from vae_scale.config.parsing import parse
from vae_scale.errors import UserError
from vae_scale.models.networks import build_model
from vae_scale.training.objectives import ELBO
from vae_scale.training.trainer import Trainer

FAMILIES = {"notebook", "torch", "lightning", "diffusers", "pythae"}
ALWAYS = {"notebook", "torch"}
KL = ["--model.network=kl", "--model.width=8", "--model.channel_mult=[1,2,2]", "--data.horizontal_flip=false"]


def trainer_of(shards: Path, run: Path, *words: str) -> Trainer:
    config = parse([f"--data.shards={shards}", *TINY, *words, f"--run={run}", "--track.tracker=none"])[0]
    return Trainer(config)


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Trainer, list[Peer], dict[str, str]]]:
    """A trainer of a network that all families know, and the peers after two runs each."""
    trainer = trainer_of(shards, tmp_path_factory.mktemp("run"), *KL)
    loops, missing = peers(trainer, 0.2, tmp_path_factory.mktemp("peers"))
    for _ in range(2):
        for peer in loops:
            assert peer.run() > 0
    yield trainer, loops, missing
    trainer.writer.wait()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_peer_trains_the_same_network_and_learns(trained: tuple[Trainer, list[Peer], dict[str, str]], family: str) -> None:
    trainer, loops, missing = trained
    if family not in ALWAYS and family in missing:
        assert "pip install" in missing[family]
        pytest.skip(missing[family])
    members = [peer for peer in loops if peer.family == family]
    assert members
    for peer in members:
        assert sum(part.numel() for part in peer.model.parameters()) == sum(part.numel() for part in trainer.model.parameters())
        assert len(peer.losses) >= 12
        while not peer.learns and len(peer.losses) < 150:  # the first steps of some are mostly noise
            peer.run()
        assert peer.learns, (peer.name, peer.losses)


def test_missing_libraries_are_reported_in_one_line(trained: tuple[Trainer, list[Peer], dict[str, str]]) -> None:
    _, loops, missing = trained
    assert {peer.family for peer in loops} | set(missing) == FAMILIES
    assert len({peer.name for peer in loops}) == len(loops)
    assert all("\n" not in reason for reason in missing.values())


@pytest.mark.parametrize(
    "words",
    [
        ["--model.preset=tiny"],
        ["--model.preset=tiny", "--model.latent=vector", "--model.attention=true"],
        ["--model.preset=kl", "--model.width=8"],
        ["--model.preset=seed_notebook"],
    ],
)
def test_the_plain_network_gives_the_same_loss(words: list[str]) -> None:
    config = parse([*words, "--data.horizontal_flip=false"])[0]
    torch.manual_seed(0)
    model = build_model(config.model, 96)
    with torch.no_grad():
        for parameter in model.parameters():  # so that layers that start at zero count too
            parameter.add_(0.02 * torch.randn_like(parameter))
    written = Loss(plain(model))
    assert sum(part.numel() for part in written.parameters()) == sum(part.numel() for part in model.parameters())
    images = torch.from_numpy(discs(3, 0))
    noise = torch.randn(3, *model.latent_shape)
    objective = ELBO(model.to(memory_format=torch.channels_last), config)
    loss, _ = objective(images, {"noise": noise})
    expected = written(images.permute(0, 3, 1, 2).float() / 255, noise)
    assert expected.item() == pytest.approx(loss.item() * model.dimensions, rel=1e-5)


def test_the_plain_network_stays_in_contiguous_memory() -> None:
    written = plain(build_model(parse(["--model.preset=tiny"])[0].model, 96))
    layouts: list[bool] = []
    for layer in written.modules():
        if isinstance(layer, torch.nn.GroupNorm):
            assert type(layer) is torch.nn.GroupNorm
            layer.register_forward_hook(lambda _, inputs, output: layouts.append(inputs[0].is_contiguous()))
    Loss(written)(torch.rand(2, 3, 96, 96))
    assert len(layouts) > 4
    assert all(layouts)


def test_a_loop_that_does_not_learn_is_excluded() -> None:
    def peer(name: str, family: str, losses: list[float]) -> Peer:
        return Peer(name, family, torch.nn.Identity(), lambda steps, ended: None, torch.device("cpu"), 1, 1.0, losses)

    loops = [peer("a", "torch", [4.0, 3.0, 2.0, 1.0]), peer("b", "torch", [2.0, 1.0]), peer("c", "pythae", [1.0, 2.0])]
    loops.append(peer("d", "lightning", [2.0, float("nan")]))
    ratios, idle = compare(loops, {"a": [10.0], "b": [20.0], "c": [400.0], "d": [400.0], training.TRAIN: [60.0]})
    assert ratios == {"over_torch": 3.0, "over_fastest_peer": 3.0}
    assert set(idle) == {"c", "d"}


def test_a_batch_of_more_images_than_the_set_has_is_refused(shards: Path, tmp_path: Path) -> None:
    trainer = trainer_of(shards, tmp_path / "run", "--train.batch_size=300")
    with pytest.raises(UserError, match="150 images are too few"):
        peers(trainer, 0.1, tmp_path / "peers")


def test_a_trainer_of_a_prior_is_refused(shards: Path, tmp_path: Path) -> None:
    trainer = trainer_of(shards, tmp_path / "run")
    trainer.config.prior.vae = "runs/vae"
    with pytest.raises(UserError, match=r"--peers requires a VAE without prior\.vae"):
        peers(trainer, 0.1, tmp_path / "peers")


def test_an_unknown_library_is_refused(shards: Path, tmp_path: Path) -> None:
    trainer = trainer_of(shards, tmp_path / "run")
    with pytest.raises(UserError, match=r"--peers has no tensorflow; it has notebook, torch"):
        peers(trainer, 0.1, tmp_path / "peers", ["torch", "tensorflow"])


def test_speeds_and_ratios_are_reported(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "SECONDS", 0.1)
    options = ["--peers=notebook,torch,diffusers", "--repeats=2", "--json", str(tmp_path / "report.json")]
    main([f"--data.shards={shards}", *TINY, *options])
    report = json.loads((tmp_path / "report.json").read_text())
    speeds = report["speeds"]
    assert all(len(runs) == 2 and min(runs) > 0 for runs in speeds.values())
    assert "diffusers" in report["missing"]
    others = [name for name in speeds if name.split(",")[0] in FAMILIES]
    assert {name.split(",")[0] for name in others} == ALWAYS
    fastest = max(statistics.median(speeds[name]) for name in others)
    assert report["ratios"]["over_fastest_peer"] == pytest.approx(statistics.median(speeds[training.TRAIN]) / fastest)
    assert report["ratios"]["over_notebook"] > 0
    printed = capsys.readouterr().out
    assert "skipped diffusers: its AutoencoderKL is a different network" in printed
    assert "over_fastest_peer" in printed
