"""The peers of the training benchmark train the same network, and learn."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import TINY, discs

from vae_scale.bench import main, read
from vae_scale.benchmark import measuring, training
from vae_scale.benchmark.training_peers import Loss, Peer, compare, peers, plain
from vae_scale.config import parse
from vae_scale.errors import UserError
from vae_scale.models.networks import build
from vae_scale.training.objective import ELBO
from vae_scale.training.trainer import Trainer

FAMILIES = {"notebook", "torch", "lightning", "diffusers", "pythae"}
ALWAYS = {"notebook", "torch"}
KL = ["--model.network=kl", "--model.width=8", "--model.multipliers=[1,2,2]", "--data.flip=false"]


def trainer_of(shards: Path, run: Path, *words: str) -> Trainer:
    config = read(["train", f"--data.shards={shards}", *TINY, *words, f"--run={run}", "--track.tracker=none"])[1]
    assert config is not None
    return Trainer(config)


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Trainer, list[Peer], dict[str, str]]]:
    """A trainer of a network that all families know, and the peers after two runs each."""
    trainer = trainer_of(shards, tmp_path_factory.mktemp("run"), *KL)
    found, missing = peers(trainer, 0.2, tmp_path_factory.mktemp("peers"))
    for _ in range(2):
        for peer in found:
            assert peer.run() > 0
    yield trainer, found, missing
    trainer.writer.wait()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_peer_trains_the_same_network_and_learns(trained: tuple[Trainer, list[Peer], dict[str, str]], family: str) -> None:
    trainer, found, missing = trained
    if family not in ALWAYS and family in missing:
        assert "pip install" in missing[family]
        pytest.skip(missing[family])
    members = [peer for peer in found if peer.family == family]
    assert members
    for peer in members:
        assert sum(part.numel() for part in peer.model.parameters()) == sum(part.numel() for part in trainer.model.parameters())
        assert len(peer.losses) >= 12
        while not peer.learns and len(peer.losses) < 150:  # the first steps of some are mostly noise
            peer.run()
        assert peer.learns, (peer.name, peer.losses)


def test_families_are_had_or_told_in_one_line(trained: tuple[Trainer, list[Peer], dict[str, str]]) -> None:
    _, found, missing = trained
    assert {peer.family for peer in found} | set(missing) == FAMILIES
    assert len({peer.name for peer in found}) == len(found)
    assert all("\n" not in reason for reason in missing.values())


@pytest.mark.parametrize(
    "words",
    [
        ["--model.preset=tiny"],
        ["--model.preset=tiny", "--model.latent=vector", "--model.attention=true"],
        ["--model.preset=ladder", "--model.width=8"],
        ["--model.preset=kl", "--model.width=8"],
        ["--model.preset=seed_notebook"],
    ],
)
def test_the_plain_network_gives_the_same_loss(words: list[str]) -> None:
    config = parse([*words, "--data.flip=false"])[0]
    torch.manual_seed(0)
    model = build(config.model, 96)
    with torch.no_grad():
        for parameter in model.parameters():  # so that layers that start at zero count too
            parameter.add_(0.02 * torch.randn_like(parameter))
    written = Loss(plain(model))
    assert sum(part.numel() for part in written.parameters()) == sum(part.numel() for part in model.parameters())
    images = torch.from_numpy(discs(3, 0))
    noise = torch.randn(3, *model.latent_shape)
    ours = ELBO(model.to(memory_format=torch.channels_last), config)
    loss, _ = ours(images, {"noise": noise}, torch.tensor(1.0), torch.tensor(0.0))
    theirs = written(images.permute(0, 3, 1, 2).float() / 255, noise)
    assert theirs.item() == pytest.approx(loss.item() * model.dimensions, rel=1e-5)


def test_the_plain_network_stays_in_contiguous_memory() -> None:
    written = plain(build(parse(["--model.preset=tiny"])[0].model, 96))
    layouts: list[bool] = []
    for layer in written.modules():
        if isinstance(layer, torch.nn.GroupNorm):
            assert type(layer) is torch.nn.GroupNorm
            layer.register_forward_hook(lambda _, inputs, output: layouts.append(inputs[0].is_contiguous()))
    Loss(written)(torch.rand(2, 3, 96, 96))
    assert len(layouts) > 4
    assert all(layouts)


def test_a_peer_that_does_not_learn_does_not_count() -> None:
    def peer(name: str, family: str, losses: list[float]) -> Peer:
        return Peer(name, family, torch.nn.Identity(), lambda steps, ended: None, torch.device("cpu"), 1, 1.0, losses)

    found = [peer("a", "torch", [4.0, 3.0, 2.0, 1.0]), peer("b", "torch", [2.0, 1.0]), peer("c", "pythae", [1.0, 2.0])]
    found.append(peer("d", "lightning", [2.0, float("nan")]))
    rows = {name: measuring.Row(name, [speed]) for name, speed in zip("abcd", (10.0, 20.0, 400.0, 400.0), strict=True)}
    ratios, idle = compare(60.0, found, rows)
    assert ratios == {"over_torch": 3.0, "over_fastest_peer": 3.0}
    assert set(idle) == {"c", "d"}
    assert statistics.fmean(rows["b"].runs) == 20


@pytest.mark.parametrize(
    ("words", "told"),
    [(["--objective.adversarial=0.5"], "without prior.vae"), (["--train.batch_size=300"], "150 images are too few")],
)
def test_what_others_cannot_do_is_refused(shards: Path, tmp_path: Path, words: list[str], told: str) -> None:
    trainer = trainer_of(shards, tmp_path / "run", *words)
    with pytest.raises(UserError, match=told):
        peers(trainer, 0.1, tmp_path / "peers")


def test_a_peer_that_nobody_knows_is_refused(shards: Path, tmp_path: Path) -> None:
    trainer = trainer_of(shards, tmp_path / "run")
    with pytest.raises(UserError, match=r"--peers has no tensorflow; it has notebook, torch"):
        peers(trainer, 0.1, tmp_path / "peers", ["torch", "tensorflow"])


def test_rows_and_ratios_are_reported(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "SECONDS", 0.1)
    monkeypatch.setattr(measuring, "CEILING_SECONDS", 0.02)
    monkeypatch.setattr(measuring, "SIZES", {"cpu": (256,)})
    monkeypatch.setattr(measuring, "COPY_BYTES", {"cpu": 2**24})
    words = [
        f"--data.shards={shards}",
        *TINY,
        "--peers",
        "notebook,torch,diffusers",
        "--repeats=2",
        "--json",
        str(tmp_path / "report.json"),
    ]
    main(["step", *words])
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["name"]: row["runs"] for row in report["rows"]}
    assert all(len(runs) == 2 and min(runs) > 0 for runs in rows.values())
    assert "diffusers" in report["missing"]
    others = [name for name in rows if name.split(",")[0] in FAMILIES]
    assert {name.split(",")[0] for name in others} == ALWAYS
    fastest = max(statistics.median(rows[name]) for name in others)
    step = statistics.median(rows[training.STEP])
    assert report["ratios"]["over_fastest_peer"] == pytest.approx(step / fastest)
    assert report["ratios"]["over_notebook"] > 0
    printed = capsys.readouterr().out
    assert "left out: diffusers: its AutoencoderKL is another network" in printed
    assert "over_fastest_peer" in printed
