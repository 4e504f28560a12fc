"""A score with its interval."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..tasks import Metric

RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A value with a 95 % bootstrap interval over rows.

    Args:
        value: The score on all rows.
        low: Lower end of the interval; NaN where it is unknown.
        high: Upper end.
        n: Number of rows.
    """

    value: float
    low: float
    high: float
    n: int

    def document(self) -> dict[str, float | int | None]:
        """Return plain data; what is not known is None."""
        known = {"value": self.value, "low": self.low, "high": self.high}
        return {name: None if math.isnan(value) else value for name, value in known.items()} | {"n": self.n}


Statistics = Sequence[Sequence[float]]
"""One row of statistics per row of data; see `Metric.count`."""


def count_rows(
    metric: Metric, languages: Sequence[str], rows: Sequence[Any], answers: Sequence[str]
) -> dict[str, list[Sequence[float]]]:
    """Return the statistics of the rows that the metric can score, by language.

    Args:
        metric: The metric.
        languages: Language of each row.
        rows: The rows.
        answers: Their answers.
    """
    found: dict[str, list[Sequence[float]]] = {}
    for language, row, answer in zip(languages, rows, answers, strict=True):
        counted = metric.count(row, answer)
        if counted is not None:
            found.setdefault(language, []).append(counted)
    return found


def by_role(languages: Sequence[str], supervised: Collection[str], aligned: Collection[str]) -> dict[str, list[str]]:
    """Return the languages of each role that has some: supervised, aligned, transfer, all.

    A language supervised and aligned counts as supervised; where no role is known nothing counts as transfer.
    """
    known = {*supervised, *aligned}
    roles = {
        "supervised": [name for name in languages if name in supervised],
        "aligned": [name for name in languages if name in aligned and name not in supervised],
        "transfer": [name for name in languages if known and name not in known],
        "all": list(languages),
    }
    return {role: names for role, names in roles.items() if names}


def mean_score(metric: Metric, languages: Sequence[Statistics], *, seed: int = 0) -> Score:
    """Return the mean over languages of a metric, with a percentile bootstrap interval (Efron, 1979; 1000 resamples).

    Rows are resampled within each language, see `draws`.

    Args:
        metric: The metric.
        languages: For each language the statistics of its rows.
        seed: Seed of the resampling.

    Raises:
        ValueError: no language, or one without rows.
    """
    if not languages or not all(map(len, languages)):
        raise ValueError("a score needs at least one row per language")
    values = [draws(metric, [counts], seed)[0] for counts in languages]
    return with_interval(np.mean(values, axis=0), n=sum(map(len, languages)))


def paired_difference(
    metric: Metric, first: Sequence[Statistics], second: Sequence[Statistics], *, seed: int = 0
) -> Score:
    """Return by how much the second system's mean score exceeds the first's, with a paired bootstrap interval.

    Rows are resampled together for both, so what makes a row easy or hard for both does not widen the interval.

    Args:
        metric: The metric.
        first: For each language the statistics of its rows.
        second: The same rows in the same order.
        seed: Seed of the resampling.

    Raises:
        ValueError: the two differ in their rows.
    """
    if [len(counts) for counts in first] != [len(counts) for counts in second] or not all(map(len, first)):
        raise ValueError("both systems must be scored on the same rows, at least one per language")
    both = [draws(metric, sides, seed) for sides in zip(first, second, strict=True)]
    return with_interval(np.mean([two - one for one, two in both], axis=0), n=sum(map(len, first)))


def draws(metric: Metric, runs: Sequence[Statistics], seed: int) -> NDArray[np.float64]:
    """Return what a metric gives for the rows of one language, and for its resamples, drawn alike for all runs.

    Languages with as many rows as each other are drawn alike too: test sets in several languages are mostly
    translations, so that row i is hard or easy in all of them, and a mean over languages is less certain than one of
    as many independent rows. Where rows are independent after all, drawing them together does no harm.

    Args:
        metric: The metric.
        runs: Statistics of the same rows, from several runs or systems.
        seed: Seed of the resampling.

    Shapes: returns [runs 1 + resamples], first that of the rows as they are.
    """
    tables = np.array(runs, dtype=np.float64)
    rows = tables.shape[1]
    weights = _resamples(rows, seed)
    return metric.value(np.stack([weights @ table for table in tables]))


@lru_cache(maxsize=16)
def _resamples(rows: int, seed: int) -> NDArray[np.float64]:
    """Return how often each row counts: once, and in every resample. [1 + resamples rows]."""
    drawn = np.random.default_rng((seed, rows)).multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
    return np.vstack([np.ones((1, rows)), drawn])


def with_interval(values: NDArray[np.float64], *, n: int) -> Score:
    """Return the first value with the percentile interval of the others, its resamples."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values[1:], [tail, 100 - tail])
    return Score(value=float(values[0]), low=float(low), high=float(high), n=n)
