"""A score with its interval."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..tasks import Metric

RESAMPLES = 1000
CONFIDENCE = 0.95
NORMAL = 1.959963984540054
"""97.5 % point of the standard normal distribution."""
_EACH = (2.0, 2.0)
"""Numbers of added clusters: answered perfectly, and wrongly (Agresti and Coull, 1998)."""
_PAIR = (0.5, 0.5, 0.5, 0.5)
"""The same for pairs: both perfect, the first alone, the second alone, neither (Agresti and Min, 2005)."""


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


class RowStatistics(list[Sequence[float]]):
    """Statistics of rows, with the cluster of each: rows of one cluster are resampled together.

    Args:
        rows: Statistics, one sequence per row; see `Metric.count`.
        clusters: Cluster of each row, such as the text that several questions are about; None where every row is
            independent of the others.
    """

    def __init__(self, rows: Iterable[Sequence[float]] = (), clusters: Iterable[str] | None = None) -> None:
        super().__init__(rows)
        self.clusters: list[str] | None = None if clusters is None else list(clusters)

    def add(self, row: Sequence[float], cluster: str | None) -> None:
        """Append the statistics of a row."""
        self.append(row)
        if cluster is not None:
            self.clusters = [*(self.clusters or []), cluster]


def cluster_numbers(rows: Statistics) -> NDArray[np.int64]:
    """Return the number of each row's cluster, counted from 0 in order of appearance.

    Shapes: returns [rows].
    """
    clusters = getattr(rows, "clusters", None)
    if clusters is None:
        return np.arange(len(rows))
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    return np.array([numbers[cluster] for cluster in clusters])


def count_units(rows: Statistics) -> int:
    """Return how many rows, or clusters of them, can be resampled."""
    return int(cluster_numbers(rows).max()) + 1


def count_rows(
    metric: Metric,
    languages: Sequence[str],
    rows: Sequence[Any],
    answers: Sequence[str],
    clusters: Sequence[str] | None = None,
) -> dict[str, RowStatistics]:
    """Return the statistics of the rows that the metric can score, by language.

    Args:
        metric: The metric.
        languages: Language of each row.
        rows: The rows.
        answers: Their answers.
        clusters: Cluster of each row; see `RowStatistics`.
    """
    found: dict[str, RowStatistics] = {}
    for place, (language, row, answer) in enumerate(zip(languages, rows, answers, strict=True)):
        counted = metric.count(row, answer)
        if counted is not None:
            found.setdefault(language, RowStatistics()).add(counted, clusters[place] if clusters else None)
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
    """Return the mean over languages of a metric, with a bootstrap interval (Efron, 1979; 1000 resamples).

    Clusters of rows are resampled within each language, see `draws`. So that few rows cannot give an interval of no
    width, two perfect and two wrong clusters are added in the resamples, and the interval is mean and spread of the
    resamples: for accuracy that of Agresti and Coull (Approximate is better than "exact" for interval estimation of
    binomial proportions, American Statistician 1998). Metrics without such rows (`Metric.ends`) have a percentile
    interval of plain resamples.

    Args:
        metric: The metric.
        languages: For each language the statistics of its rows.
        seed: Seed of the resampling.

    Raises:
        ValueError: no language, or one without rows.
    """
    if not languages or not all(map(len, languages)):
        raise ValueError("a score needs at least one row per language")
    values = [draws(metric, [counts], seed, hedge="each")[0] for counts in languages]
    return hedged_interval(metric, np.mean(values, axis=0), n=sum(map(len, languages)))


def paired_difference(
    metric: Metric, first: Sequence[Statistics], second: Sequence[Statistics], *, seed: int = 0
) -> Score:
    """Return by how much the second system's mean score exceeds the first's, with a paired bootstrap interval.

    Rows are resampled together for both, so what makes a row easy or hard for both does not widen the interval. Half a
    cluster is added for each way in which two systems can answer it (Agresti and Min, Simple improved confidence
    intervals for comparing matched proportions, Statistics in Medicine 2005); see `mean_score`.

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
    both = [draws(metric, sides, seed, hedge="pair") for sides in zip(first, second, strict=True)]
    gains = np.mean([two - one for one, two in both], axis=0)
    return hedged_interval(metric, gains, n=sum(map(len, first)), least=-1.0)


def draws(
    metric: Metric,
    runs: Sequence[Statistics],
    seed: int,
    *,
    hedge: Literal["each", "pair"] | None = None,
    first: int = 1,
) -> NDArray[np.float64]:
    """Return what a metric gives for the rows of one language, and for its resamples, drawn alike for all runs.

    Clusters of rows are drawn with replacement; a row without a cluster is one of its own. Languages with as many
    clusters as each other are drawn alike too: test sets in several languages are mostly translations, so that row i is
    hard or easy in all of them, and a mean over languages is less certain than one of as many independent rows. Where
    rows are independent after all, drawing them together does no harm.

    Args:
        metric: The metric.
        runs: Statistics of the same rows, from several runs or systems.
        seed: Seed of the resampling.
        hedge: Add invented clusters in the resamples: perfect and wrong ones for `each` run, see `mean_score`, or for
            a `pair` of systems those in which they can differ, see `paired_difference`.
        first: How many of the runs are of the first system of a pair.

    Shapes: returns [runs 1 + resamples], first that of the rows as they are.
    """
    tables = cluster_sums(runs)
    extra: tuple[float, ...] = ()
    if hedge and metric.ends:
        best, worst = metric.ends(tables.mean((0, 1)))
        pairs = [[best, best, worst, worst]] * first + [[best, worst, best, worst]] * (len(runs) - first)
        extra, invented = (_EACH, [[best, worst]] * len(runs)) if hedge == "each" else (_PAIR, pairs)
        tables = np.concatenate([tables, np.array(invented)], axis=1)
    weights = resampled_counts(tables.shape[1] - len(extra), seed, extra)
    return metric.value(np.stack([weights @ table for table in tables]))


def cluster_sums(runs: Sequence[Statistics]) -> NDArray[np.float64]:
    """Return the sums of the statistics over each cluster of the same rows in several runs.

    Shapes: returns [runs clusters s].
    """
    tables = np.array(runs, dtype=np.float64)
    numbers = cluster_numbers(runs[0])
    count = int(numbers.max()) + 1
    if count == len(numbers):
        return tables
    sums = np.zeros((count, len(runs), tables.shape[2]))
    np.add.at(sums, numbers, tables.swapaxes(0, 1))
    return sums.swapaxes(0, 1)


@lru_cache(maxsize=16)
def resampled_counts(clusters: int, seed: int, extra: tuple[float, ...] = ()) -> NDArray[np.float64]:
    """Return how often each cluster counts: once in the first row, then in every resample.

    Args:
        clusters: How many clusters there are.
        seed: Seed of the draws.
        extra: Expected counts of invented clusters, which count in resamples only.

    Shapes: returns [1 + resamples, clusters + extra].
    """
    expected = np.array([*np.ones(clusters), *extra])
    size = round(float(expected.sum()))
    drawn = np.random.default_rng((seed, clusters)).multinomial(size, expected / expected.sum(), size=RESAMPLES)
    whole = np.array([[*np.ones(clusters), *np.zeros(len(extra))]])
    return np.vstack([whole, drawn])


def with_interval(values: NDArray[np.float64], *, n: int) -> Score:
    """Return the first value with the percentile interval of its resamples, widened to hold the value."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values[1:], [tail, 100 - tail])
    value = float(values[0])
    return Score(value=value, low=min(float(low), value), high=max(float(high), value), n=n)


def hedged_interval(metric: Metric, values: NDArray[np.float64], *, n: int, least: float = 0.0) -> Score:
    """Return the first value with the interval that its hedged resamples have by the normal distribution.

    Args:
        metric: The metric; one without ends has a percentile interval.
        values: From `draws` with `hedge`. [1 + resamples]
        n: Number of rows.
        least: The lowest value there is; the highest is 1.
    """
    if not metric.ends:
        return with_interval(values, n=n)
    value, middle, width = float(values[0]), float(values[1:].mean()), NORMAL * float(values[1:].std())
    return Score(
        value=value, low=max(least, min(middle - width, value)), high=min(1.0, max(middle + width, value)), n=n
    )
