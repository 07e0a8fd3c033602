"""The peers of the data benchmark read what was written for them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import discs
from loader_peers import Peer, peers

COUNT, BATCH = 64, 24
ALWAYS = {"torchvision", "webdataset"}
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


@pytest.fixture(scope="module")
def loaders(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Peer], dict[str, str]]:
    return peers(discs(COUNT, 0), tmp_path_factory.mktemp("peers"), BATCH)


@pytest.mark.parametrize("family", ["torchvision", "webdataset", "litdata", "mosaicml", "ffcv"])
def test_each_image_comes_once_an_epoch(loaders: tuple[list[Peer], dict[str, str]], family: str) -> None:
    if family not in ALWAYS and family in loaders[1]:
        assert "pip install" in loaders[1][family]
        pytest.skip(loaders[1][family])
    originals = torch.from_numpy(discs(COUNT, 0))
    members = [peer for peer in loaders[0] if peer.family == family]
    assert members
    for peer in members:
        for _ in range(2):
            seen: list[int] = []
            for images, numbers in peer.epoch():
                pixels = peer.pixels(images)
                assert numbers.dtype == torch.int64
                assert pixels.dtype == torch.uint8
                assert len(images) == len(numbers) <= BATCH
                difference = (pixels.float() - originals[numbers].float()).abs().mean(dim=(1, 2, 3))
                assert difference.max() <= (0 if peer.lossless else 3), peer.name
                seen += numbers.tolist()
            assert sorted(seen) == list(range(COUNT)), peer.name
            assert seen != sorted(seen), peer.name


def test_missing_libraries_are_reported_in_one_line(loaders: tuple[list[Peer], dict[str, str]]) -> None:
    assert {peer.family for peer in loaders[0]} >= ALWAYS
    assert {peer.family for peer in loaders[0]} | set(loaders[1]) == ALWAYS | {"litdata", "mosaicml", "ffcv"}
    assert len({peer.name for peer in loaders[0]}) == len(loaders[0])
    assert all("\n" not in reason for reason in loaders[1].values())


def test_images_are_written_once_and_other_sets_are_kept(tmp_path: Path) -> None:
    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    images = np.ascontiguousarray(discs(COUNT, 0)[:, :32, :32])
    peers(images, tmp_path, BATCH)
    before = written()
    peers(images, tmp_path, BATCH)
    assert written() == before
    loaders, _ = peers(images[::-1].copy(), tmp_path, BATCH)
    assert written().items() > before.items()
    peer = next(peer for peer in loaders if peer.name == "webdataset, npy, 0 workers")
    for pixels, numbers in peer.epoch():
        assert np.array_equal(peer.pixels(pixels).numpy(), images[::-1][numbers.numpy()])
