"""The order of training images: a pure function of shard sizes, seed and number of images seen.

Shards are permuted and divided into S streams, and rows are permuted within windows of W shards of a stream. Epochs are
concatenated. A batch has S equal parts, one per stream, and each rank takes its slice of each batch. Therefore every image
appears exactly once per epoch for any number of ranks, batches do not depend on the number of ranks, and `images_seen` is the
only state.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class _Epoch:
    """Division of the images of an epoch into streams. Positions are indices into the images of its permuted shards."""

    shards: Rows  # permuted: int64 [shards]
    ends: Rows  # position after each shard: int64 [shards]
    bounds: list[int]  # start of each stream, followed by the number of images: [streams + 1]
    shifts: list[int]  # position of an image minus its index in its stream, counted from the start of the run: [streams]


@dataclass(frozen=True)
class _Window:
    """Consecutive shards `first` to `last` of one stream whose rows, at positions `begin` to `end`, are shuffled together."""

    epoch: int
    stream: int
    first: int
    last: int
    begin: int
    end: int


@dataclass
class Plan:
    """The order of training images.

    Attributes:
        sizes: Number of samples of each shard.
        seed: Seed of the permutations.
        batch: Global batch size, a multiple of `streams`.
        window: Number of shards whose rows are shuffled together.
        streams: Number of equal parts of a batch, read from different shards. A rank reads only the shards of its parts.
    """

    sizes: Sequence[int]
    seed: int
    batch: int
    window: int
    streams: int = 1
    _starts: Rows = field(init=False, repr=False)
    # Consecutive batches need the same epochs and windows, at most two windows per stream.
    _epochs: "OrderedDict[int, _Epoch]" = field(init=False, repr=False, default_factory=OrderedDict)
    _windows: "OrderedDict[_Window, Rows]" = field(init=False, repr=False, default_factory=OrderedDict)
    _current: dict[int, _Window] = field(init=False, repr=False, default_factory=dict)
    _upcoming: tuple[list[_Window], list[int]] = field(init=False, repr=False, default=([], []))

    def __post_init__(self) -> None:
        if self.batch % self.streams:
            raise ValueError(f"a batch of {self.batch} images is not divisible by {self.streams} streams")
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)

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
        windows = [window for window, _ in segments]
        if windows != self._upcoming[0]:
            next_windows = [self._next_window(window) for window in {window.stream: window for window in windows}.values()]
            shards = [shard for window in windows + next_windows for shard in self._window_shards(window).tolist()]
            self._upcoming = (windows, list(dict.fromkeys(shards)))
        rows = [self._window_rows(window)[segment] for window, segment in segments]
        return rows[0] if len(rows) == 1 else np.concatenate(rows), self._upcoming[1]

    def rows(self, images_seen: int, rank: int = 0, world_size: int = 1) -> Rows:
        """Returns the rows of `local_batch`."""
        return self.local_batch(images_seen, rank, world_size)[0]

    def epoch_order(self, epoch: int) -> Rows:
        """Returns all rows in the order of an epoch: int64 [images]."""
        segments = self._segments(epoch * self.images, self.images)
        return np.concatenate([self._window_rows(window)[segment] for window, segment in segments])

    def _segments(self, position: int, count: int) -> Iterator[tuple[_Window, slice]]:
        """Yields windows and slices of their rows that contain the `count` images after the first `position` images."""
        stream_batch = self.batch // self.streams
        while count:
            epoch, (batch, offset) = position // self.images, divmod(position, self.batch)
            stream = offset // stream_batch
            begin = self._epoch(epoch).shifts[stream] + self._images_before(position, stream)
            window = self._window(epoch, stream, begin)
            # A segment ends with the stream's part of the batch, the epoch or the window.
            batch_end = batch * self.batch + (stream + 1) * stream_batch
            length = min(count, batch_end - position, (epoch + 1) * self.images - position, window.end - begin)
            yield window, slice(begin - window.begin, begin - window.begin + length)
            position, count = position + length, count - length

    def _images_before(self, position: int, stream: int) -> int:
        """Returns the number of images of a stream among the first `position` images of the run."""
        stream_batch = self.batch // self.streams
        batches, remainder = divmod(position, self.batch)
        return batches * stream_batch + min(max(remainder - stream * stream_batch, 0), stream_batch)

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            shards = permutation(len(self.sizes), self.seed, number, "shards")
            before, after = (
                [self._images_before(epoch * self.images, stream) for stream in range(self.streams)]
                for epoch in (number, number + 1)
            )
            bounds = [0, *itertools.accumulate(end - begin for begin, end in zip(before, after, strict=True))]
            ends = np.cumsum(np.asarray(self.sizes, np.int64)[shards])
            shifts = [bound - begin for bound, begin in zip(bounds, before, strict=False)]
            self._epochs[number] = _Epoch(shards, ends, bounds, shifts)
            if len(self._epochs) > 3:
                self._epochs.popitem(last=False)
        return self._epochs[number]

    def _window(self, number: int, stream: int, position: int) -> _Window:
        """Returns the window of a stream that contains a position of an epoch."""
        current = self._current.get(stream)
        if current and current.epoch == number and current.begin <= position < current.end:
            return current
        epoch = self._epoch(number)
        start, shard = np.searchsorted(epoch.ends, [epoch.bounds[stream], position], side="right").tolist()
        first = start + (shard - start) // self.window * self.window
        last = min(first + self.window, len(epoch.shards)) - 1
        begin = max(epoch.bounds[stream], int(epoch.ends[first - 1]) if first else 0)
        end = min(epoch.bounds[stream + 1], int(epoch.ends[last]))
        last = int(np.searchsorted(epoch.ends, end, side="left"))
        self._current[stream] = _Window(number, stream, first, last, begin, end)
        return self._current[stream]

    def _next_window(self, window: _Window) -> _Window:
        """Returns the next window of the same stream."""
        number, stream = window.epoch, window.stream
        position = window.end
        while position == self._epoch(number).bounds[stream + 1]:
            number += 1  # in a very small set, a stream may have no images in an epoch
            position = self._epoch(number).bounds[stream]
        return self._window(number, stream, position)

    def _window_shards(self, window: _Window) -> Rows:
        return self._epoch(window.epoch).shards[window.first : window.last + 1]

    def _window_rows(self, window: _Window) -> Rows:
        """Returns the shuffled rows of a window: int64 [images of the window]."""
        if window not in self._windows:
            rows_by_shard = []
            ends = self._epoch(window.epoch).ends[window.first : window.last + 1]
            for shard, end in sorted(zip(self._window_shards(window).tolist(), ends.tolist(), strict=True)):
                # A shard may be divided between two streams.
                first = self._starts[shard + 1] - end
                rows_by_shard.append(np.arange(max(self._starts[shard], first + window.begin), first + min(end, window.end)))
            rows = np.concatenate(rows_by_shard)
            self._windows[window] = rows[permutation(len(rows), self.seed, window.epoch, window.first, "rows")]
            if len(self._windows) > 2 * self.streams:
                self._windows.popitem(last=False)
        self._windows.move_to_end(window)
        return self._windows[window]


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
