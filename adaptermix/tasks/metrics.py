"""Scores that are functions of sums over rows, so that a bootstrap needs no second look at the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Sums = NDArray[np.float64]


class Counts(NamedTuple):
    """True positives, false positives and false negatives."""

    hit: int
    spurious: int
    missed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """What a task measures.

    Args:
        name: Name in documents.
        count: From a row and a generated answer to the row's statistics, as many for every row; None where the row
            cannot be scored by this metric.
        value: From sums of statistics [... s] to values [...]; in [0, 1] but for those of machine translation, which
            are in [0, 100] as sacrebleu has them.
        ends: From the mean statistics of the rows [s] to those of a row that is answered perfectly and of one that is
            answered wrongly. Intervals of few rows need them. None where the metric has no such rows.
    """

    name: str
    count: Callable[[Any, str], Sequence[float] | None]
    value: Callable[[Sums], Sums]
    ends: Callable[[Sums], tuple[Sums, Sums]] | None = None


def micro_f1(sums: Sums) -> Sums:
    """Return F1 from sums of hits, spurious and missed; 1 if there are no right and no predicted parts.

    Shapes: [... 3] gives [...].
    """
    hit, spurious, missed = sums[..., 0], sums[..., 1], sums[..., 2]
    total = 2 * hit + spurious + missed
    return np.where(total > 0, 2 * hit / np.where(total > 0, total, 1.0), 1.0)


def mean(sums: Sums) -> Sums:
    """Return the mean over rows from sums of (value, 1), as of right answers for accuracy.

    Shapes: [... 2] gives [...].
    """
    values: Sums = sums[..., 0] / np.maximum(sums[..., 1], 1)
    return values


def f1_ends(average: Sums) -> tuple[Sums, Sums]:
    """Return the statistics of a perfect and of a wrong row of average size: (hit, spurious, missed), label by label.

    Shapes: [3 * labels] gives two of [3 * labels].
    """
    counts = average.reshape(-1, 3)
    gold = counts[:, 0] + counts[:, 2]
    nothing = np.zeros_like(gold)
    # A row without right parts is wrong if any part is predicted.
    spurious = np.where(gold > 0, gold, 1.0 if len(gold) == 1 else 0.0)
    best, worst = np.stack([gold, nothing, nothing], -1), np.stack([nothing, spurious, gold], -1)
    return best.ravel(), worst.ravel()


def mean_ends(average: Sums) -> tuple[Sums, Sums]:
    """Return the statistics of a row of value 1 and of a row of value 0.

    Shapes: [2] gives two of [2].
    """
    return np.array([average[1], average[1]]), np.array([0.0, average[1]])
