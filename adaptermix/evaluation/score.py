"""Scores with their intervals."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidValueError, PlanError
from ..io.json_types import JsonObject
from ..models.languages import canonical_language
from ..tasks import Metric
from ..tasks.data.tables import Row

RESAMPLES = 1000
CONFIDENCE = 0.95
NORMAL = 1.959963984540054
"""97.5 % point of the standard normal distribution."""
_EACH = (2.0, 2.0)
"""Number of added clusters: answered perfectly, and wrongly (Agresti and Coull, 1998)."""
_PAIR = (0.5, 0.5, 0.5, 0.5)
"""Number of added clusters of pairs: both perfect, only the first, only the second, neither (Agresti and Min, 2005)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A value with a 95 % bootstrap interval over rows.

    Args:
        value: The score on all rows.
        low: Lower end of the interval; NaN if unknown.
        high: Upper end.
        n: Number of rows.
    """

    value: float
    low: float
    high: float
    n: int

    def document(self) -> dict[str, float | int | None]:
        """Return plain data, with None for unknown values."""
        known = {"value": self.value, "low": self.low, "high": self.high}
        return {name: None if math.isnan(value) else value for name, value in known.items()} | {"n": self.n}


def documents(scores: Mapping[str, Score]) -> JsonObject:
    """Return scores by name as plain data."""
    return {name: score.document() for name, score in scores.items()}


Statistics = Sequence[Sequence[float]]
"""One row of statistics per row of data; see `Metric.count`."""


class RowStatistics(list[Sequence[float]]):
    """Statistics of rows, with the cluster of each: rows of one cluster are resampled together.

    Args:
        rows: Statistics, one sequence per row; see `Metric.count`.
        clusters: Cluster of each row, such as the text that several questions are about; None if all rows are
            independent.
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
    """Return the number of rows, or clusters of rows, that can be resampled."""
    return int(cluster_numbers(rows).max()) + 1


def count_rows(
    metric: Metric,
    languages: Sequence[str],
    rows: Sequence[Row],
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
    counts: dict[str, RowStatistics] = {}
    for index, (language, row, answer) in enumerate(zip(languages, rows, answers, strict=True)):
        counted = metric.count(row, answer)
        if counted is not None:
            counts.setdefault(language, RowStatistics()).add(counted, clusters[index] if clusters else None)
    return counts


def known_languages(codes: Sequence[str], languages: Sequence[str], *, option: str) -> list[str]:
    """Return the languages that codes name, in the form that data files have.

    Args:
        codes: Codes as users write them, such as `deu`.
        languages: The languages of the data.
        option: Name of the option that has the codes, for messages.

    Raises:
        PlanError: a code is not one of the languages.
    """
    named = [canonical_language(code.strip()) or code.strip() for code in codes]
    if unknown := sorted(set(named) - set(languages)):
        raise PlanError(
            f"--{option} must be languages of the data ({', '.join(languages)}), got {unknown[0]!r}.",
            code="data.languages",
        )
    return named


def by_role(languages: Sequence[str], supervised: Collection[str], aligned: Collection[str]) -> dict[str, list[str]]:
    """Return the languages of each nonempty role: supervised, aligned, transfer, all.

    A language that is both supervised and aligned counts as supervised. Without any known role no language counts as
    transfer.
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

    Clusters of rows are resampled within each language, see `draws`. To avoid an interval of zero width for few rows,
    two perfect and two wrong clusters are added to the resamples, and the interval uses the mean and spread of the
    resamples. For accuracy this is the interval of Agresti and Coull (Approximate is better than "exact" for interval
    estimation of binomial proportions, American Statistician 1998). Metrics without such rows (`Metric.ends`) have a
    percentile interval of plain resamples.

    Args:
        metric: The metric.
        languages: For each language the statistics of its rows.
        seed: Seed of the resampling.

    Raises:
        ValueError: there is no language, or one has no rows.
    """
    if not languages or not all(map(len, languages)):
        raise InvalidValueError("a score needs at least one row per language", code="score.no-rows")
    values = [draws(metric, [counts], seed, hedge="each")[0] for counts in languages]
    return hedged_interval(metric, np.mean(values, axis=0), n=sum(map(len, languages)))


def paired_difference(
    metric: Metric, first: Sequence[Statistics], second: Sequence[Statistics], *, seed: int = 0
) -> Score:
    """Return the difference of the second system's mean score to the first's, with a paired bootstrap interval.

    Rows are resampled together for both, so rows that are easy or hard for both do not widen the interval. Half a
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
        raise InvalidValueError(
            "both systems must be scored on the same rows, at least one per language", code="score.rows-differ"
        )
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
    """Return a metric on the rows of one language and on resamples of them; all runs share the resamples.

    Clusters of rows are drawn with replacement; a row without a cluster counts as one. Languages with the same number
    of clusters share their draws as well: test sets in several languages are mostly translations, so that row i is hard
    or easy in all of them, and a mean over languages is less certain than over as many independent rows. Sharing draws
    is harmless for rows that are independent.

    Args:
        metric: The metric.
        runs: Statistics of the same rows, from several runs or systems.
        seed: Seed of the resampling.
        hedge: Add invented clusters to the resamples: perfect and wrong ones for `each` run, see `mean_score`, or for a
            `pair` of systems those in which they can differ, see `paired_difference`.
        first: Number of runs that belong to the first system of a pair.

    Shapes: returns [runs 1 + resamples], the first for the original rows.
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
    """Return the weight of each cluster: 1 in the first row, then its count in every resample.

    Args:
        clusters: The number of clusters.
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
    """Return the first value with the percentile interval of its resamples, widened to include the value."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values[1:], [tail, 100 - tail])
    value = float(values[0])
    return Score(value=value, low=min(float(low), value), high=max(float(high), value), n=n)


def hedged_interval(metric: Metric, values: NDArray[np.float64], *, n: int, least: float = 0.0) -> Score:
    """Return the first value with the normal interval of its hedged resamples.

    Args:
        metric: The metric; one without ends has a percentile interval.
        values: From `draws` with `hedge`. [1 + resamples]
        n: Number of rows.
        least: The lowest possible value; the highest is 1.
    """
    if not metric.ends:
        return with_interval(values, n=n)
    value, middle, width = float(values[0]), float(values[1:].mean()), NORMAL * float(values[1:].std())
    return Score(
        value=value, low=max(least, min(middle - width, value)), high=min(1.0, max(middle + width, value)), n=n
    )
