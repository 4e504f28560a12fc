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
    """

    name: str
    count: Callable[[Any, str], Sequence[float] | None]
    value: Callable[[Sums], Sums]


def micro_f1(sums: Sums) -> Sums:
    """Return F1 from sums of hits, spurious and missed; 1 where nothing was to be found and nothing was.

    Shapes: [... 3] gives [...].
    """
    hit, spurious, missed = sums[..., 0], sums[..., 1], sums[..., 2]
    total = 2 * hit + spurious + missed
    return np.where(total > 0, 2 * hit / np.maximum(total, 1), 1.0)


def mean(sums: Sums) -> Sums:
    """Return the mean over rows from sums of (value, 1), as of right answers for accuracy.

    Shapes: [... 2] gives [...].
    """
    values: Sums = sums[..., 0] / np.maximum(sums[..., 1], 1)
    return values
