"""The benchmark of the data plane: it measures what it says, and refuses to time wrong images."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vae_scale.bench import main
from vae_scale.benchmark import data
from vae_scale.benchmark.data_peers import Peer
from vae_scale.data.shards import ShardSet
from vae_scale.errors import UserError


def test_the_report_is_printed_and_written(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data, "SECONDS", 0.05)
    main(["data", "--shards", str(shards), "--batch=16", "--repeats=2", "--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ratios"]["of_gather_limit"] > 0
    assert {row["name"] for row in report["rows"]} >= {f"{data.LIMIT}, 1 thread", "vae_scale, npy"}
    assert all(len(row["runs"]) == 2 and min(row["runs"]) > 0 for row in report["rows"])
    assert report["machine"]["torch"] == torch.__version__
    assert [line["window"] for line in report["shuffle"]] == [1, 4, 9, None]
    printed = capsys.readouterr().out
    assert "of_gather_limit" in printed
    assert "random permutation" in printed


def test_a_wider_window_shuffles_better_and_all_shards_as_well_as_chance() -> None:
    one, four, everything, chance = data.shuffle_quality([50] * 20, 10, [1, 4, 20])
    assert one.same_shard > 0.95 > four.same_shard > everything.same_shard
    assert one.neighbours > four.neighbours > everything.neighbours
    for found in (one, four, everything):
        assert found.displacement == pytest.approx(1 / 3, abs=0.05)
    assert everything.same_shard == pytest.approx(chance.same_shard, abs=0.02)
    assert everything.neighbours == pytest.approx(2 / 1000, abs=0.002)


def honest(images: np.ndarray) -> Peer:
    def epoch() -> Iterator[tuple[Tensor, Tensor]]:
        for numbers in torch.randperm(len(images)).split(8):
            yield torch.from_numpy(images[numbers.numpy()]), numbers

    return Peer("honest", "webdataset", True, epoch, lambda found: found)


def test_a_peer_that_gives_other_images_is_not_timed(shards: Path) -> None:
    found = ShardSet.open(shards)
    images = found.images(np.arange(len(found)))
    peer = honest(images)
    data._verify(peer, images)
    wrong = replace(peer, pixels=lambda found: found.roll(1, 0))
    with pytest.raises(UserError, match=r"honest: image \d+ differs from the set's"):
        data._verify(wrong, images)
    lossy = replace(wrong, pixels=lambda found: (found.int() + 1).clamp(max=255).to(torch.uint8), lossless=False)
    data._verify(lossy, images)
    fewer = replace(peer, epoch=lambda: iter(list(peer.epoch())[:-1]))
    with pytest.raises(UserError, match=r"honest: \d+ of 180 images did not come"):
        data._verify(fewer, images)


def test_too_few_images_are_refused(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "--shards", str(shards)])
    assert "180 images are too few to measure batches of 256" in capsys.readouterr().err
