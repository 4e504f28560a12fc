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
