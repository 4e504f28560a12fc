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
        turn, place = divmod(position, len(self.groups))
        # groups take turns in an order that is drawn anew every round, so that none always opens a batch
        group = _permutation(self.seed, -1, turn, len(self.groups))[place]
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
    """Batches of rows of like length: of up to 50 batches of a sampler the rows are sorted by length and cut anew.

    Every row still comes once per pass, and the batches of a window come in an order that is drawn. A window is at
    most as long as a pass, since copies of a row would be of like length indeed; where it reaches into the next pass, a
    batch may hold a row twice.

    Args:
        sampler: Whose rows to take.
        lengths: Length of every row.
    """

    sampler: Sampler
    lengths: Sequence[int] = field(repr=False)

    def batch(self, number: int) -> list[int]:
        """Return the rows of batch `number`, from 0."""
        size = self.sampler.batch_size
        width = max(1, min(_MOST, len(self.lengths) // size))
        window, place = divmod(number, width)
        rows = [row for n in range(window * width, (window + 1) * width) for row in self.sampler.batch(n)]
        rows.sort(key=lambda row: self.lengths[row])  # stable, so a function of the seed alone
        start = _permutation(self.sampler.seed, -2, window, width)[place] * size
        return rows[start : start + size]
