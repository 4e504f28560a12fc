"""A score with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..tasks import Counts

RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A value with a 95 % bootstrap interval over rows.

    Args:
        value: The score on all rows.
        low: Lower end of the interval.
        high: Upper end.
        n: Number of rows.
    """

    value: float
    low: float
    high: float
    n: int

    def document(self) -> dict[str, float | int]:
        """Return plain data."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def _f1(sums: NDArray[np.int64]) -> NDArray[np.float64]:
    """Micro F1 from sums [... 3] of hits, spurious and missed; 1 where nothing was to be found and nothing was."""
    hit, spurious, missed = sums[..., 0], sums[..., 1], sums[..., 2]
    total = 2 * hit + spurious + missed
    return np.where(total > 0, 2 * hit / np.maximum(total, 1), 1.0)


def micro_f1(counts: Sequence[Counts], *, seed: int = 0) -> Score:
    """Return micro F1 with a percentile bootstrap interval over rows (Efron, 1979; 1000 resamples).

    Args:
        counts: One per row.
        seed: Seed of the resampling.

    Raises:
        ValueError: no row.
    """
    return macro_f1([counts], seed=seed)


def macro_f1(languages: Sequence[Sequence[Counts]], *, seed: int = 0) -> Score:
    """Return the mean over languages of micro F1, with an interval from resampling the rows of each language.

    Args:
        languages: For each language one count per row.
        seed: Seed of the resampling.

    Raises:
        ValueError: no language, or one without rows.
    """
    if not languages or not all(languages):
        raise ValueError("a score needs at least one row per language")
    rng = np.random.default_rng(seed)
    tables = [np.array(counts, dtype=np.int64) for counts in languages]
    drawn = np.mean([_f1(_resample(table, rng)) for table in tables], axis=0)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    value = float(np.mean([_f1(table.sum(0)) for table in tables]))
    return Score(value=value, low=float(low), high=float(high), n=sum(map(len, tables)))


def paired_difference(first: Sequence[Sequence[Counts]], second: Sequence[Sequence[Counts]], *, seed: int = 0) -> Score:
    """Return by how much the second system's mean micro F1 exceeds the first's, with a paired bootstrap interval.

    Rows are resampled together for both, so what makes a row easy or hard for both does not widen the interval.

    Args:
        first: For each language one count per row.
        second: The same rows in the same order.
        seed: Seed of the resampling.

    Raises:
        ValueError: the two differ in their rows.
    """
    if [len(counts) for counts in first] != [len(counts) for counts in second] or not all(map(len, first)):
        raise ValueError("both systems must be scored on the same rows, at least one per language")
    rng = np.random.default_rng(seed)
    drawn, values = [], []
    for one, two in zip(first, second, strict=True):
        both = np.hstack([np.array(one, dtype=np.int64), np.array(two, dtype=np.int64)])
        sums = _resample(both, rng)
        drawn.append(_f1(sums[:, 3:]) - _f1(sums[:, :3]))
        whole = both.sum(0)
        values.append(_f1(whole[3:]) - _f1(whole[:3]))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.mean(drawn, axis=0), [tail, 100 - tail])
    return Score(value=float(np.mean(values)), low=float(low), high=float(high), n=sum(map(len, first)))


def _resample(table: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Sums of the counts [resamples 3] of as many rows, drawn with replacement."""
    rows = len(table)
    sums: NDArray[np.int64] = rng.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES) @ table
    return sums
