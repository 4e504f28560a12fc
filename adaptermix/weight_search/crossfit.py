"""The gain of a choice among candidates on rows that had no part in the choice, with an unbiased interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..evaluation.score import NORMAL, RESAMPLES, Score, Statistics, cluster_sums, count_units, resampled_counts
from ..evaluation.significance import units_of_mean
from ..tasks import Metric

Rule = Literal["best", "one-se"]
Values = NDArray[np.float64]

FOLDS = 5
_UNITS = 60
"""Most groups of rows to resample: enough for a stable variance, and a bounded cost for any number of rows."""


def cross_fit(
    metric: Metric,
    candidates: Sequence[Mapping[str, Statistics]],
    baseline: Mapping[str, Statistics],
    *,
    distances: Sequence[float],
    rule: Rule,
    join: Callable[[Sequence[Values]], Values],
    seed: int,
) -> Score:
    """Return the chosen candidate's gain over the baseline on rows that had no part in the choice.

    The rows are split into 5 folds, and each fold is scored for the candidate that the other folds choose. The choice
    depends on chance, so the whole procedure, including the choice, is repeated on resamples of the rows, and the value
    is the mean over them (bagging). The standard error is the root mean square of two estimates: the infinitesimal
    jackknife of the bagged value, which is too large here, since equally good candidates differ in the resampled rows;
    and the spread with a fixed mixture of chosen candidates per fold, which is too small. In simulations with 3 to 50
    equally good candidates the 95 % interval contains 0 in 94 to 97 % of the searches. Few rows may all agree; then
    the error is that of rows that gain nothing, with half a row gained and half a row lost in addition.

    Args:
        metric: The metric.
        candidates: For each candidate the statistics of its rows, by language.
        baseline: The same for the baseline, on the same rows.
        distances: Distance of each candidate from the baseline; among equally good ones the nearest is chosen.
        rule: See `choose`.
        join: Combines the values of the languages.
        seed: Seed of the resampling.

    Reference: Efron, Estimation and accuracy after model selection, JASA 2014, equations 3.6 and 4.6.
    """
    sums: dict[str, Values] = {}
    weights: dict[str, Values] = {}
    for language, rows in baseline.items():
        table = cluster_sums([rows, *(counted[language] for counted in candidates)])
        sums[language] = _units(table)
        weights[language] = resampled_counts(sums[language].shape[1], seed)
    folded = {language: _by_fold(table, weights[language]) for language, table in sums.items()}
    order = np.asarray(distances)
    pooled = {language: np.zeros_like(table[0, 0]) for language, table in folded.items()}
    mixed = {language: np.zeros_like(table[0, 0]) for language, table in folded.items()}
    is_itself = True  # The baseline may be a candidate, and its difference from itself is exactly 0.
    for fold in range(FOLDS):
        others = [metric.value((table.sum(0) - table[fold])[1:]) for table in folded.values()]
        chosen = _choose(np.asarray(join(others)), order, rule)
        is_itself = is_itself and not order[chosen].any()
        shares = np.bincount(chosen[1:], minlength=len(candidates)) / RESAMPLES
        for language, table in folded.items():
            pooled[language] += table[fold, chosen + 1, np.arange(len(chosen))]
            mixed[language] += np.tensordot(shares, table[fold, 1:], axes=1)
    alone = join([metric.value(table.sum(0)[0]) for table in folded.values()])
    found = join([metric.value(table) for table in pooled.values()]) - alone
    fixed = join([metric.value(table) for table in mixed.values()]) - alone
    value = float(found[1:].mean())
    variance = (_jackknife(found[1:], weights.values()) + float(fixed[1:].var())) / 2
    most = math.inf
    if metric.ends and not is_itself:  # Metrics with ends have values in [0, 1].
        units = units_of_mean([count_units(rows) for rows in baseline.values()])
        variance, most = max(variance, value**2 / units + 1 / (units + 2) ** 2), 1.0
    width = NORMAL * math.sqrt(variance)
    rows_in_all = sum(map(len, baseline.values()))
    return Score(value=value, low=max(value - width, -most), high=min(value + width, most), n=rows_in_all)


def choose(values: Values, distances: Sequence[float], rule: Rule) -> int:
    """Return the index of the candidate that a rule chooses.

    Args:
        values: [candidates 1 + resamples], first the values on the rows as they are.
        distances: Distance of each candidate from the baseline; among equally good ones the nearest is chosen.
        rule: `best`, the highest value; or `one-se`, the nearest to the baseline of those that are less than one
            standard error below the best (Breiman et al., 1984, section 3.4.3; the error here is that of the paired
            difference).
    """
    return int(_choose(values, np.asarray(distances), rule)[0])


def _choose(values: Values, distances: Values, rule: Rule) -> NDArray[np.int64]:
    """Return the index of the candidate that a rule chooses on the rows and on each resample. [1 + resamples]."""
    best = _nearest(values == values.max(0), distances, values)
    if rule == "best":
        return best
    spread = np.cov(values[:, 1:]) if len(values) > 1 else np.zeros((1, 1))
    variances = np.diag(spread)
    errors = np.sqrt(np.maximum(variances[:, None] + variances[None] - 2 * spread, 0.0))
    gaps = np.take_along_axis(values, best[None], axis=0) - values
    return _nearest(gaps <= errors[best].T, distances, values)


def _nearest(eligible: NDArray[np.bool_], distances: Values, values: Values) -> NDArray[np.int64]:
    """Return the eligible candidate nearest to the baseline; among several the best, and then the first."""
    far = np.where(eligible, distances[:, None], np.inf)
    near = far == far.min(0)
    return np.asarray(np.where(near, values, -np.inf).argmax(0))


def _units(table: Values) -> Values:
    """Return sums over at most 60 groups of clusters, of about equal size. [candidates clusters s] to [... units s]."""
    clusters = table.shape[1]
    if clusters <= _UNITS:
        return table
    sums = np.zeros((_UNITS, table.shape[0], table.shape[2]))
    np.add.at(sums, np.arange(clusters) % _UNITS, table.swapaxes(0, 1))
    return sums.swapaxes(0, 1)


def _by_fold(table: Values, weights: Values) -> Values:
    """Return the weighted sums of each fold.

    Shapes: [candidates units s] and [1 + resamples, units] give [folds candidates 1 + resamples s].
    """
    folds = np.arange(table.shape[1]) % FOLDS
    return np.stack([weights[:, folds == fold] @ table[:, folds == fold] for fold in range(FOLDS)])


def _jackknife(values: Values, weights: Iterable[Values]) -> float:
    """Return the variance of the mean of resampled values by the infinitesimal jackknife, corrected for their number.

    Languages with equal numbers of units share their draws, so they count as one.
    """
    centred = values - values.mean()
    drawn = {each.shape[1]: each[1:] for each in weights}
    total = 0.0
    for counts in drawn.values():
        covariances = (counts - 1).T @ centred / len(values)
        total += float(covariances @ covariances) - counts.shape[1] / len(values) * float(values.var())
    return max(total, 0.0)
