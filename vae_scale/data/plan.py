"""Who reads what, when: a pure function of the shards' sizes, the seed and the number of images seen.

Shards are permuted; rows are permuted inside windows of W shards; epochs follow each other without a gap. Batch b of
the run is the b-th slice of that endless order, and each rank takes its slice of each batch. So every image appears
exactly once per epoch for any number of ranks, batches do not depend on that number, and `images_seen` is the only
state there is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vae_scale.randomness import key

Rows = npt.NDArray[np.int64]


def permutation(count: int, *parts: int | str) -> Rows:
    """A random permutation of 0..count-1 keyed by `parts`.

    It sorts the raw output of Philox, which NumPy promises never to change, unlike its shuffles.
    """
    return np.argsort(np.random.Philox(key=key(*parts)).random_raw(count), kind="stable").astype(np.int64)


@dataclass
class Plan:
    """The order of training.

    Attributes:
        sizes: Samples of each shard.
        seed: Keys the permutations.
        batch: Images of a global batch.
        window: Shards among which rows are mixed.
    """

    sizes: Sequence[int]
    seed: int
    batch: int
    window: int
    _starts: Rows = field(init=False, repr=False)
    _epoch: tuple[int, Rows] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)

    @property
    def images(self) -> int:
        """Images of an epoch."""
        return int(self._starts[-1])

    def shards(self, epoch: int) -> Rows:
        """The shards of an epoch in the order in which windows take them."""
        return permutation(len(self.sizes), self.seed, epoch, "shards")

    def epoch(self, epoch: int) -> Rows:
        """Every sample of the set once, in the order of this epoch: int64 [images]."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = self.shards(epoch)
            parts = []
            for begin in range(0, len(order), self.window):
                shards = np.sort(order[begin : begin + self.window])
                rows = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in shards])
                parts.append(rows[permutation(len(rows), self.seed, epoch, begin, "rows")])
            self._epoch = (epoch, np.concatenate(parts))
        return self._epoch[1]

    def rows(self, images_seen: int, rank: int, ranks: int) -> Rows:
        """The samples that `rank` of `ranks` takes of the batch that starts after `images_seen` images.

        A batch may reach over the end of an epoch; nothing is dropped or padded.
        """
        share = self.batch // ranks
        first = images_seen + rank * share
        parts = []
        while share:
            epoch, offset = divmod(first, self.images)
            part = self.epoch(epoch)[offset : offset + share]
            parts.append(part)
            first, share = first + len(part), share - len(part)
        return np.concatenate(parts)


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
