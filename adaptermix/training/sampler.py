"""Which rows belong to which batch: a pure function of the seed and the batch number, so resuming needs no state."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache


@lru_cache(maxsize=4096)
def _permutation(seed: int, stream: int, epoch: int, size: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(f"{seed}/{stream}/{epoch}").shuffle(order)  # noqa: S311  (a string seed is hashed, the same everywhere)
    return tuple(order)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Draws rows from groups, every group equally often; within a group every row once per pass.

    Args:
        groups: Row numbers of each group. One group is plain shuffling; one per language is language-balanced sampling.
        batch_size: Rows per batch.
        seed: Seed of all permutations.
    """

    groups: Sequence[Sequence[int]] = field(repr=False)
    batch_size: int
    seed: int

    def row(self, position: int) -> int:
        """Return the row at a position of the endless stream."""
        turn, slot = divmod(position, len(self.groups))
        # Groups take turns in another random order every round, so that no group is always first in a batch.
        group = _permutation(self.seed, -1, turn, len(self.groups))[slot]
        rows = self.groups[group]
        epoch, index = divmod(turn, len(rows))
        return rows[_permutation(self.seed, group, epoch, len(rows))[index]]

    def batch(self, number: int) -> list[int]:
        """Return the rows of batch `number`, from 0."""
        start = number * self.batch_size
        return [self.row(position) for position in range(start, start + self.batch_size)]


_MOST = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthSampler:
    """Batches of rows of similar length: rows of up to 50 batches of a sampler are sorted by length and split again.

    Windows of batches end with an epoch, so every row comes once per epoch, as with the sampler alone: the batches of k
    epochs have the same rows as the sampler's. A window with the batch in which the next epoch starts may have a few
    rows twice. The batches of a window come in random order.

    Args:
        sampler: Whose rows to take; a pass is as many draws as its groups have rows.
        lengths: Length of every row.
    """

    sampler: Sampler
    lengths: Sequence[int] = field(repr=False)

    def _window(self, number: int) -> range:
        """Return the batches that share their rows with batch `number`."""
        size, rows = self.sampler.batch_size, sum(map(len, self.sampler.groups))
        epoch = number * size // rows
        # Batches that start in this epoch, in windows of similar size.
        first, stop = (-(-one * rows // size) for one in (epoch, epoch + 1))
        count = stop - first
        windows = -(-count // _MOST)
        window = ((number - first + 1) * windows - 1) // count
        return range(first + window * count // windows, first + (window + 1) * count // windows)

    def batch(self, number: int) -> list[int]:
        """Return the rows of batch `number`, from 0."""
        size, window = self.sampler.batch_size, self._window(number)
        rows = [row for n in window for row in self.sampler.batch(n)]
        rows.sort(key=lambda row: self.lengths[row])  # stable, so a function of the seed alone
        order = _permutation(self.sampler.seed, -2, window.start, len(window))
        start = order[number - window.start] * size
        return rows[start : start + size]
