"""Who reads what, when: a pure function of the shards' sizes, the seed and the number of images seen.

Shards are permuted, dealt to S streams, and rows are permuted inside windows of W shards of a stream; epochs follow each
other without a gap. A batch is made of S equal parts, one of each stream, and each rank takes its slice of each batch.
So every image appears exactly once per epoch for any number of ranks, batches do not depend on that number, and
`images_seen` is the only state there is.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vae_scale.randomness import key

Rows = npt.NDArray[np.int64]


def permutation(count: int, *parts: int | str) -> Rows:
    """A random permutation of 0..count-1 keyed by `parts`.

    It sorts the raw output of Philox, which NumPy promises never to change, unlike its shuffles. The lowest bits of each
    number make room for its position: no two are equal, so every way to sort gives the same.
    """
    bits = np.uint64((1 << max(count - 1, 0).bit_length()) - 1)
    drawn = np.random.Philox(key=key(*parts)).random_raw(count) & ~bits
    return (np.sort(drawn | np.arange(count, dtype=np.uint64)) & bits).astype(np.int64)


@dataclass(frozen=True)
class _Epoch:
    """How the images of an epoch are dealt. Places count the images of its permuted shards, one shard after the other.

    Attributes:
        shards: The shards in their order: int64 [shards].
        ends: Place after each shard: int64 [shards].
        bounds: Places that divide the streams, [streams + 1].
        shifts: What takes an image's number in its stream, counted from the start of the run, to its place: [streams].
    """

    shards: Rows
    ends: Rows
    bounds: list[int]
    shifts: list[int]


@dataclass(frozen=True)
class _Window:
    """Neighbouring shards of one stream whose rows are mixed.

    Attributes:
        epoch: Its epoch.
        stream: Its stream.
        first: Position of its first shard among the epoch's; with epoch, this keys its permutation.
        last: Position of its last shard.
        begin: Place of its first image.
        end: Place after its last image.
    """

    epoch: int
    stream: int
    first: int
    last: int
    begin: int
    end: int


@dataclass
class Plan:
    """The order of training.

    Attributes:
        sizes: Samples of each shard.
        seed: Keys the permutations.
        batch: Images of a global batch, a multiple of `streams`.
        window: Shards among which rows are mixed.
        streams: Parts of a batch that come from different shards. The ranks that share a part need no other shards.
    """

    sizes: Sequence[int]
    seed: int
    batch: int
    window: int
    streams: int = 1
    _starts: Rows = field(init=False, repr=False)
    # Neighbouring batches need the same epochs and windows; a few are enough for every stream at the end of its window.
    _epochs: "OrderedDict[int, _Epoch]" = field(init=False, repr=False, default_factory=OrderedDict)
    _windows: "OrderedDict[_Window, Rows]" = field(init=False, repr=False, default_factory=OrderedDict)
    _current: dict[int, _Window] = field(init=False, repr=False, default_factory=dict)
    _needed: tuple[list[_Window], list[int]] = field(init=False, repr=False, default=([], []))

    def __post_init__(self) -> None:
        if self.batch % self.streams:
            raise ValueError(f"a batch of {self.batch} images cannot be made of {self.streams} equal streams")
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)

    @property
    def images(self) -> int:
        """Images of an epoch."""
        return int(self._starts[-1])

    def share(self, images_seen: int, rank: int = 0, ranks: int = 1) -> tuple[Rows, list[int]]:
        """What `rank` of `ranks` takes of the batch that starts after `images_seen` images.

        A batch may reach over the end of an epoch; nothing is dropped or padded.

        Returns:
            The samples, int64 [n], and the shards that hold them, followed by those of the windows that come next.
        """
        share = self.batch // ranks
        parts = list(self._parts(images_seen + rank * share, share))
        windows = [window for window, _ in parts]
        if windows != self._needed[0]:
            following = [self._next(window) for window in {window.stream: window for window in windows}.values()]
            numbers = [number for window in windows + following for number in self._shards(window).tolist()]
            self._needed = (windows, list(dict.fromkeys(numbers)))
        rows = [self._mixed(window)[part] for window, part in parts]
        return rows[0] if len(rows) == 1 else np.concatenate(rows), self._needed[1]

    def rows(self, images_seen: int, rank: int = 0, ranks: int = 1) -> Rows:
        """The samples alone."""
        return self.share(images_seen, rank, ranks)[0]

    def order(self, epoch: int) -> Rows:
        """Every sample of the set once, as an epoch takes them: int64 [images]."""
        return np.concatenate([self._mixed(window)[part] for window, part in self._parts(epoch * self.images, self.images)])

    def _parts(self, position: int, count: int) -> Iterator[tuple[_Window, slice]]:
        """Windows, and which of their mixed rows make up `count` images from `position` of the run on."""
        part = self.batch // self.streams
        while count:
            epoch, (block, offset) = position // self.images, divmod(position, self.batch)
            stream = offset // part
            place = self._epoch(epoch).shifts[stream] + self._dealt(position, stream)
            window = self._window(epoch, stream, place)
            # Up to the end of the batch's part of this stream, of the epoch, or of the window.
            run = min(count, block * self.batch + (stream + 1) * part - position, (epoch + 1) * self.images - position)
            run = min(run, window.end - place)
            yield window, slice(place - window.begin, place - window.begin + run)
            position, count = position + run, count - run

    def _dealt(self, position: int, stream: int) -> int:
        """Images that a stream gave to the first `position` images of the run."""
        part = self.batch // self.streams
        blocks, rest = divmod(position, self.batch)
        return blocks * part + min(max(rest - stream * part, 0), part)

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            shards = permutation(len(self.sizes), self.seed, number, "shards")
            before, after = ([self._dealt(end * self.images, s) for s in range(self.streams)] for end in (number, number + 1))
            bounds = [0, *itertools.accumulate(end - begin for begin, end in zip(before, after, strict=True))]
            ends = np.cumsum(np.asarray(self.sizes, np.int64)[shards])
            self._epochs[number] = _Epoch(
                shards, ends, bounds, [bound - begin for bound, begin in zip(bounds, before, strict=False)]
            )
            if len(self._epochs) > 3:
                self._epochs.popitem(last=False)
        return self._epochs[number]

    def _window(self, number: int, stream: int, place: int) -> _Window:
        """The window of a stream that holds the image at `place` of an epoch."""
        current = self._current.get(stream)
        if current and current.epoch == number and current.begin <= place < current.end:
            return current
        epoch = self._epoch(number)
        start, position = np.searchsorted(epoch.ends, [epoch.bounds[stream], place], side="right").tolist()
        first = start + (position - start) // self.window * self.window
        last = min(first + self.window, len(epoch.shards)) - 1
        begin = max(epoch.bounds[stream], int(epoch.ends[first - 1]) if first else 0)
        end = min(epoch.bounds[stream + 1], int(epoch.ends[last]))
        last = int(np.searchsorted(epoch.ends, end, side="left"))
        self._current[stream] = _Window(number, stream, first, last, begin, end)
        return self._current[stream]

    def _next(self, window: _Window) -> _Window:
        """The window of the same stream that comes after."""
        number, stream = window.epoch, window.stream
        place = window.end
        while place == self._epoch(number).bounds[stream + 1]:
            # In a tiny set a stream may have no image of an epoch.
            number += 1
            place = self._epoch(number).bounds[stream]
        return self._window(number, stream, place)

    def _shards(self, window: _Window) -> Rows:
        return self._epoch(window.epoch).shards[window.first : window.last + 1]

    def _mixed(self, window: _Window) -> Rows:
        """The samples of a window in their random order: int64 [images of the window]."""
        if window not in self._windows:
            ends, parts = self._epoch(window.epoch).ends[window.first : window.last + 1], []
            for shard, end in sorted(zip(self._shards(window).tolist(), ends.tolist(), strict=True)):
                # A stream may end, and the next begin, in the middle of a shard.
                first = self._starts[shard + 1] - end
                parts.append(np.arange(max(self._starts[shard], first + window.begin), first + min(end, window.end)))
            rows = np.concatenate(parts)
            self._windows[window] = rows[permutation(len(rows), self.seed, window.epoch, window.first, "rows")]
            if len(self._windows) > 2 * self.streams:
                self._windows.popitem(last=False)
        self._windows.move_to_end(window)
        return self._windows[window]


def evaluation_rows(images: int, batch: int, rank: int, ranks: int) -> list[tuple[Rows, npt.NDArray[np.float32]]]:
    """The samples 0..images-1 that `rank` of `ranks` evaluates, batch by batch, each image on exactly one rank.

    Returns:
        For every batch: rows int64 [batch], and weights [batch]: 1, or 0 for the padding of the tail. Every rank gets
        the same number of batches of the same size.
    """
    batches = []
    for begin in range(0, images, batch * ranks):
        rows = begin + rank * batch + np.arange(batch, dtype=np.int64)
        batches.append((np.minimum(rows, images - 1), (rows < images).astype(np.float32)))
    return batches
