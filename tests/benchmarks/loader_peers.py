"""Other data loaders on the same images, each configured as its documentation recommends for speed."""

import contextlib
import functools
import gc
import hashlib
import io
import operator
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from libraries import create_peers
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vae_scale.benchmark.data import InMemorySTL10
from vae_scale.data.images import Images
from vae_scale.data.shard_file import SAVE_OPTIONS, write_shard

WORKERS = (0, 2)
CHUNK = 1000  # maximum images per tar file


@dataclass(frozen=True)
class Peer:
    """A data loader.

    Workers start with the first epoch and persist, so later epochs do not include their start-up.

    Attributes:
        name: Name in tables.
        family: torchvision, webdataset, litdata, mosaicml or ffcv.
        lossless: Whether pixels equal the originals. If not, they are decoded from JPEG and differ by at most 3 on average.
        epoch: Iterates over one shuffled epoch: images in the loader's format, and their indices, int64 [n]. A batch is
            valid until the next one is read.
        pixels: Converts a batch to uint8 [n, H, W, 3].
    """

    name: str
    family: str
    lossless: bool
    epoch: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    pixels: Callable[[Tensor], Tensor]


def _identity(images: Tensor) -> Tensor:
    return images


def _from_planes(images: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1)


def _from_normalized(images: Tensor) -> Tensor:
    return _from_planes((images + 1).mul(127.5).round().to(torch.uint8))


def peers(images: Images, scratch: Path, batch: int) -> tuple[list[Peer], dict[str, str]]:
    """Writes images in each loader's format, unless they exist, and creates the loaders.

    Args:
        images: uint8 [n, H, W, 3], contiguous. An image's index is its label in each format.
        scratch: Output folder. Sets written before are kept.
        batch: Images per batch.

    Returns:
        The loaders, and for each library that is not available, the reason in one line.
    """
    # litdata and mosaicml return read-only views of a file, which are copied.
    warnings.filterwarnings("ignore", "The given (NumPy array|buffer) is not writable")
    folder = scratch / hashlib.sha256(images.data).hexdigest()[:16]
    families = {
        "torchvision": _torchvision,
        "webdataset": _webdataset,
        "litdata": _litdata,
        "mosaicml": _mosaicml,
        "ffcv": _ffcv,
    }
    with _restore_torch_threads():
        return create_peers({name: partial(family, images, folder / name, batch) for name, family in families.items()})


def _torchvision(images: Images, folder: Path, batch: int) -> list[Peer]:
    from torchvision.transforms import Compose, Normalize, ToTensor

    @functools.cache
    def stl10() -> Dataset[Any]:
        return InMemorySTL10(images, Compose([ToTensor(), Normalize(0.5, 0.5)]))

    def loader(workers: int) -> Iterable[Any]:
        return DataLoader(stl10(), batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0)

    return [_peer("torchvision", "STL10", workers, loader, _from_normalized) for workers in WORKERS]


def _webdataset(images: Images, folder: Path, batch: int) -> list[Peer]:
    import torchvision
    import webdataset

    # Workers read whole shards, so small sets are divided into at least 8.
    size = min(CHUNK, -(-len(images) // 8))
    starts = range(0, len(images), size)

    def write(encoding: str, folder: Path) -> None:
        def shard(start: int) -> None:
            part = images[start : start + size]
            numbers = range(start, start + len(part))
            write_shard(folder / f"{start:09d}.tar", [f"{number:09d}" for number in numbers], numbers, part, encoding)

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(tqdm(threads.map(shard, starts), f"writing WebDataset {encoding}", len(starts)))

    def planes(encoded: bytes) -> Tensor:
        content = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        return torchvision.io.decode_image(content, torchvision.io.ImageReadMode.RGB)

    def loader(encoding: str, decoder: Any, workers: int) -> Iterable[Any]:
        # The README's pipeline: shuffled before decoding, batched in the workers. Its training example also rebatches and
        # shuffles in the main process, which is omitted since it takes time.
        urls = [str(folder / encoding / f"{start:09d}.tar") for start in starts]
        dataset = webdataset.WebDataset(urls, shardshuffle=100).shuffle(1000).decode(decoder)
        batches = dataset.to_tuple(encoding, "cls").batched(batch)
        return webdataset.WebLoader(batches, batch_size=None, num_workers=workers, persistent_workers=workers > 0)

    # rgb8 decodes to uint8 with Pillow. The documentation shows how to replace the decoder; torchvision's is faster.
    faster = webdataset.handle_extension("png jpg", planes)
    loaders = []
    names = ["npy", "png", "jpg"]
    if hasattr(torchvision.io, "decode_image"):  # deprecated in 0.29
        names += ["png by torchvision", "jpg by torchvision"]
    for name in names:
        encoding = name[:3]
        decoder, pixels = (faster, _from_planes) if "torchvision" in name else ("rgb8", _identity)
        make = partial(loader, encoding, decoder)
        _write_once(folder / encoding, partial(write, encoding))
        loaders += [_peer("webdataset", name, workers, make, pixels, encoding != "jpg") for workers in WORKERS]
    return loaders


def _litdata(images: Images, folder: Path, batch: int) -> list[Peer]:
    import litdata

    def array(number: int) -> tuple[Any, int]:
        return images[number], number

    def jpg(number: int) -> tuple[Any, int]:
        encoded = io.BytesIO()
        Image.fromarray(images[number]).save(encoded, **SAVE_OPTIONS["jpg"])
        return litdata.Image(bytes=encoded.getvalue()), number

    def write(sample: Callable[[int], Any], folder: Path) -> None:
        # The README recommends chunks of 64 MB. Forked processes share the images; for spawned ones they would be pickled.
        numbers = list(range(len(images)))
        with contextlib.redirect_stdout(io.StringIO()):  # suppresses its messages; the progress bar is on standard error
            litdata.optimize(sample, numbers, str(folder), chunk_bytes="64MB", num_workers=os.cpu_count(), start_method="fork")

    def loader(name: str, workers: int) -> Iterable[Any]:
        dataset = litdata.StreamingDataset(str(folder / name), shuffle=True, drop_last=False)
        return litdata.StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, persistent_workers=workers > 0)

    # The README recommends JPEG for images. Arrays need no decoding, and are read faster than tensors.
    for sample in (array, jpg):
        _write_once(folder / sample.__name__, partial(write, sample))
    return [
        _peer("litdata", name, workers, partial(loader, name), pixels, lossless=name == "array")
        for name, pixels in (("array", _identity), ("jpg", _from_planes))
        for workers in WORKERS
    ]


def _mosaicml(images: Images, folder: Path, batch: int) -> list[Peer]:
    import streaming

    def write(folder: Path) -> None:
        columns = {"image": f"ndarray:uint8:{','.join(map(str, images.shape[1:]))}", "number": "int"}
        with streaming.MDSWriter(out=str(folder), columns=columns) as file:
            for number in tqdm(range(len(images)), "writing MDS"):
                file.write({"image": images[number], "number": number})

    local = str(_write_once(folder, write))

    def loader(workers: int) -> Iterable[Any]:
        # Recommended by the FAQ: batch_size for the dataset, too, and persistent workers.
        dataset = streaming.StreamingDataset(local=local, shuffle=True, batch_size=batch)
        return DataLoader(dataset, batch, num_workers=workers, persistent_workers=workers > 0)

    pair = operator.itemgetter("image", "number")
    return [_peer("mosaicml", "ndarray", workers, loader, pair=pair) for workers in WORKERS]


def _ffcv(images: Images, folder: Path, batch: int) -> list[Peer]:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor
    from ffcv.writer import DatasetWriter

    def write(folder: Path) -> None:
        # Raw pixels are fastest if they fit into the page cache (its guide to images).
        writer = DatasetWriter(str(folder / "images.beton"), {"image": RGBImageField(write_mode="raw"), "number": IntField()})
        writer.from_indexed_dataset(_Numbered(len(images), images.__getitem__))

    file = _write_once(folder, write) / "images.beton"

    # The settings of its tuning guide for a small dataset. Workers are threads.
    def loader(workers: int) -> Iterable[Any]:
        decoders = {"image": [SimpleRGBImageDecoder(), ToTensor()], "number": [IntDecoder(), ToTensor()]}
        settings = {"order": OrderOption.RANDOM, "os_cache": True, "drop_last": False}
        return Loader(str(file), batch, workers, pipelines=decoders, **settings)

    def pair(sample: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return sample[0], sample[1].flatten()

    return [_peer("ffcv", "raw", max(WORKERS), loader, pair=pair)]


@contextlib.contextmanager
def _restore_torch_threads() -> Iterator[None]:
    """Restores the number of threads, which ffcv changes for the whole process."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """Returns `folder`, filled by `write` unless it exists."""
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        partial.rename(folder)
    return folder


def _peer(
    family: str,
    name: str,
    workers: int,
    loader: Callable[[int], Iterable[Any]],
    pixels: Callable[[Tensor], Tensor] = _identity,
    lossless: bool = True,
    pair: Callable[[Any], tuple[Tensor, Tensor]] = tuple,
) -> Peer:
    @functools.cache
    def cached_loader() -> Iterable[Any]:
        gc.collect()  # otherwise forked workers inherit earlier loaders and warn when collecting them
        return loader(workers)

    def epoch() -> Iterator[tuple[Tensor, Tensor]]:
        with _restore_torch_threads():
            yield from map(pair, cached_loader())

    return Peer(f"{family}, {name}, {workers} workers", family, lossless, epoch, pixels)


class _Numbered(Dataset[tuple[Any, int]]):
    """An indexed dataset of samples with their numbers."""

    def __init__(self, samples: int, sample: Callable[[int], Any]) -> None:
        self.samples = samples
        self.sample = sample

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, number: int) -> tuple[Any, int]:
        return self.sample(number), number
