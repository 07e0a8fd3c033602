"""The order of training images: a pure function of shard sizes, seed and number of images seen.

Shards are permuted and divided into S streams, and rows are permuted within windows of W shards of a stream. Epochs are
concatenated. A batch has S equal parts, one per stream, and each rank takes its slice of each batch. Therefore every image
appears exactly once per epoch for any number of ranks, batches do not depend on the number of ranks, and `images_seen` is the
only state.
"""

import functools
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vae_scale.data.images import Rows
from vae_scale.randomness import derive_seed


def permutation(count: int, *parts: int | str) -> Rows:
    """Returns a random permutation of 0..count-1, seeded by `parts`.

    It sorts the raw output of Philox, which NumPy guarantees to stay the same, unlike its shuffles. The lowest bits of each
    number are replaced by its position, so that no two are equal and every sorting algorithm gives the same result.
    """
    mask = np.uint64((1 << max(count - 1, 0).bit_length()) - 1)
    values = np.random.Philox(key=derive_seed(*parts)).random_raw(count) & ~mask
    return (np.sort(values | np.arange(count, dtype=np.uint64)) & mask).astype(np.int64)


class _Epoch(NamedTuple):
    """Division of the images of an epoch into streams. Positions are indices into the images of its permuted shards."""

    shards: Rows  # permuted: int64 [shards]
    edges: Rows  # start of each shard, followed by the number of images: int64 [shards + 1]
    bounds: list[int]  # start of each stream, followed by the number of images: [streams + 1]
    shifts: list[int]  # position of an image minus its index in its stream, counted from the start of the run: [streams]


class _Window(NamedTuple):
    """Images of one stream, at positions `begin` to `end`, that are shuffled together."""

    epoch: int
    stream: int
    begin: int
    end: int


class Plan:
    """The order of training images.

    Args:
        sizes: Number of samples of each shard.
        seed: Seed of the permutations.
        batch: Global batch size, a multiple of `streams`.
        window: Number of shards whose rows are shuffled together.
        streams: Number of equal parts of a batch, read from different shards. A rank reads only the shards of its parts.
    """

    def __init__(self, sizes: Sequence[int], seed: int, batch: int, window: int, streams: int = 1) -> None:
        if batch % streams:
            raise ValueError(f"a batch of {batch} images is not divisible by {streams} streams")
        self.sizes, self.seed, self.batch, self.window, self.streams = sizes, seed, batch, window, streams
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        # Consecutive batches need the same epochs and windows, at most two windows per stream.
        self._epoch = functools.lru_cache(3)(self._divide_epoch)
        self._window_rows = functools.lru_cache(2 * streams)(self._shuffle_window)
        self._shards_to_load = functools.lru_cache(1)(self._list_shards)

    @property
    def images(self) -> int:
        """Number of images per epoch."""
        return int(self._starts[-1])

    def local_batch(self, images_seen: int, rank: int = 0, world_size: int = 1) -> tuple[Rows, list[int]]:
        """Returns the rows of `rank` in the batch that starts after `images_seen` images.

        A batch may cross the end of an epoch; nothing is dropped or padded.

        Returns:
            Rows, int64 [n], and the shards to load: first the shards of the rows, then the shards of the next windows.
        """
        size = self.batch // world_size
        segments = list(self._segments(images_seen + rank * size, size))
        rows = np.concatenate([self._window_rows(window)[part] for window, part in segments])
        return rows, self._shards_to_load(tuple(window for window, _ in segments))

    def rows(self, images_seen: int, rank: int = 0, world_size: int = 1) -> Rows:
        """Returns the rows of `local_batch`."""
        return self.local_batch(images_seen, rank, world_size)[0]

    def epoch_order(self, epoch: int) -> Rows:
        """Returns all rows in the order of an epoch: int64 [images]."""
        segments = self._segments(epoch * self.images, self.images)
        return np.concatenate([self._window_rows(window)[part] for window, part in segments])

    def _segments(self, position: int, count: int) -> Iterator[tuple[_Window, slice]]:
        """Yields windows and slices of their rows that contain the `count` images after the first `position` images."""
        stream_batch = self.batch // self.streams
        while count:
            number, offset = position // self.images, position % self.batch
            stream = offset // stream_batch
            begin = self._epoch(number).shifts[stream] + self._images_before(position, stream)
            window = self._window(number, stream, begin)
            # A segment ends with the stream's part of the batch, the epoch or the window.
            batch_rest = (stream + 1) * stream_batch - offset
            length = min(count, batch_rest, (number + 1) * self.images - position, window.end - begin)
            yield window, slice(begin - window.begin, begin - window.begin + length)
            position, count = position + length, count - length

    def _images_before(self, position: int, stream: int) -> int:
        """Returns the number of images of a stream among the first `position` images of the run."""
        stream_batch = self.batch // self.streams
        batches, remainder = divmod(position, self.batch)
        return batches * stream_batch + min(max(remainder - stream * stream_batch, 0), stream_batch)

    def _divide_epoch(self, number: int) -> _Epoch:
        shards = permutation(len(self.sizes), self.seed, number, "shards")
        edges = np.concatenate([[0], np.cumsum(np.diff(self._starts)[shards])])
        bounds, shifts = [0], []
        for stream in range(self.streams):
            before, after = (self._images_before(epoch * self.images, stream) for epoch in (number, number + 1))
            shifts.append(bounds[-1] - before)
            bounds.append(bounds[-1] + after - before)
        return _Epoch(shards, edges, bounds, shifts)

    def _window(self, number: int, stream: int, position: int) -> _Window:
        """Returns the window of a stream that contains a position of an epoch."""
        _, edges, bounds, _ = self._epoch(number)
        start, shard = bisect_right(edges, bounds[stream]) - 1, bisect_right(edges, position) - 1
        first = start + (shard - start) // self.window * self.window
        begin = max(bounds[stream], int(edges[first]))
        end = min(bounds[stream + 1], int(edges[min(first + self.window, len(self.sizes))]))
        return _Window(number, stream, begin, end)

    def _next_window(self, window: _Window) -> _Window:
        """Returns the next window of the same stream."""
        number, stream, _, position = window
        while position == self._epoch(number).bounds[stream + 1]:
            number += 1  # in a very small set, a stream may have no images in an epoch
            position = self._epoch(number).bounds[stream]
        return self._window(number, stream, position)

    def _shard_range(self, window: _Window) -> range:
        """Returns the indices of the window's shards in the permutation. The first and last may be shared by two streams."""
        edges = self._epoch(window.epoch).edges
        return range(bisect_right(edges, window.begin) - 1, bisect_left(edges, window.end))

    def _list_shards(self, windows: tuple[_Window, ...]) -> list[int]:
        """Returns the shards of `windows` and of the next window of each stream."""
        next_windows = [self._next_window(window) for window in {window.stream: window for window in windows}.values()]
        shards = [self._epoch(window.epoch).shards[self._shard_range(window)] for window in [*windows, *next_windows]]
        return list(dict.fromkeys(np.concatenate(shards).tolist()))

    def _shuffle_window(self, window: _Window) -> Rows:
        """Returns the shuffled rows of a window: int64 [images of the window]."""
        shards, edges, _, _ = self._epoch(window.epoch)
        indices = self._shard_range(window)
        rows_by_shard = []
        for index in sorted(indices, key=shards.__getitem__):
            positions = np.arange(max(edges[index], window.begin), min(edges[index + 1], window.end))
            rows_by_shard.append(self._starts[shards[index]] + positions - edges[index])
        rows = np.concatenate(rows_by_shard)
        return rows[permutation(len(rows), self.seed, window.epoch, indices[0], "rows")]


def evaluation_rows(images: int, batch: int, rank: int, world_size: int) -> list[tuple[Rows, npt.NDArray[np.float32]]]:
    """Returns the batches of `rank` in an evaluation of rows 0..images-1. Each row is on exactly one rank.

    Returns:
        For each batch, rows, int64 [batch], and weights, float32 [batch]: 1, or 0 for padding. All ranks have the same number
        of batches.
    """
    batches = []
    for begin in range(0, images, batch * world_size):
        rows = begin + rank * batch + np.arange(batch, dtype=np.int64)
        batches.append((np.minimum(rows, images - 1), (rows < images).astype(np.float32)))
    return batches
