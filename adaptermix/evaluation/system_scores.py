"""Scores of systems with one or several runs each, on the same rows, and their uncertainty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..io.json_types import JsonObject
from ..tasks import Metric
from .score import RESAMPLES, RowStatistics, Score, count_units, draws, hedged_interval, with_interval
from .significance import Draws


def over_runs(values: NDArray[np.float64], seed: int) -> Draws:
    """Return the mean over runs; its draws vary as the mean of other runs would, in the same way for every system.

    To the mean over runs of each resample of rows it adds a draw from Student's t distribution with runs - 1 degrees of
    freedom, scaled by the standard error of the runs' mean. Runs are too few to be resampled. For a single run the
    variation between runs is unknown and is left out.

    Shapes: values [... runs 1 + resamples]; returns [... 1 + resamples].
    """
    runs = values.shape[-2]
    mean: Draws = values.mean(-2)
    if runs == 1:
        return mean
    rng = np.random.default_rng((seed, 0, runs))
    normal = rng.standard_normal((RESAMPLES, runs))
    scale = np.sqrt(rng.chisquare(runs - 1, size=(RESAMPLES, 1)) / (runs - 1))
    # With these weights the runs' deviations have the variance of their mean, and all systems share the weights.
    weights = (normal - normal.mean(1, keepdims=True)) / (scale * np.sqrt(runs * (runs - 1)))
    mean[..., 1:] += values[..., 0] @ weights.T
    return mean


class Scored:
    """Scores of systems on the same rows, which share their resamples, so that all differences are paired.

    Args:
        metric: The headline metric.
        counts: For each system and language the statistics of each run.
        seed: Seed of the resampling.

    Attributes:
        sizes: Rows of each language.
        units: Rows, or clusters of rows, of each language.
    """

    def __init__(
        self, metric: Metric, counts: Mapping[str, Mapping[str, Sequence[RowStatistics]]], *, seed: int
    ) -> None:
        self._metric, self._counts, self._seed = metric, counts, seed
        languages = next(iter(counts.values()))
        self.sizes = {language: len(runs[0]) for language, runs in languages.items()}
        self.units = {language: count_units(runs[0]) for language, runs in languages.items()}

    def plain(self, name: str) -> Draws:
        """Return a system's scores. [languages runs 1 + resamples]."""
        return np.stack([draws(self._metric, runs, self._seed) for runs in self._counts[name].values()])

    def hedged(self, name: str) -> Draws:
        """Return a system's scores for intervals, see `mean_score`. [languages 1 + resamples]."""
        scores = [draws(self._metric, runs, self._seed, hedge="each") for runs in self._counts[name].values()]
        return over_runs(np.stack(scores), self._seed)

    def gains(self, name: str, baseline: str) -> Draws:
        """Return the gains of a system for intervals, see `paired_difference`. [languages 1 + resamples]."""
        values = []
        for language, runs in self._counts[name].items():
            base = self._counts[baseline][language]
            both = draws(self._metric, [*base, *runs], self._seed, hedge="pair", first=len(base))
            values.append(over_runs(both[len(base) :], self._seed) - over_runs(both[: len(base)], self._seed))
        return np.stack(values)

    def interval(self, names: Sequence[str], values: Draws, *, n: int, least: float = 0.0) -> Score:
        """Return a value of hedged draws with its interval: as in `evaluate` if each system has one run.

        The draws of several runs have the tails of Student's t distribution, so their percentiles are used.
        """
        if all(len(runs) == 1 for name in names for runs in self._counts[name].values()):
            return hedged_interval(self._metric, values, n=n, least=least)
        return with_interval(values, n=n)


def group_means(values: Draws, members: Mapping[str, Sequence[int]]) -> Draws:
    """Return the means over the languages of each role. [languages ...] gives [roles ...]."""
    return np.stack([values[list(indices)].mean(0) for indices in members.values()])


def shares_of_gap(system: Draws, base: Draws, top: Draws, gained: Mapping[str, Score]) -> dict[str, Score]:
    """Return the share of the gap that each role's gain closes. Shapes: [roles 1 + resamples], and the gap."""
    gap = top - base
    shares = np.divide(system - base, gap, out=np.full_like(gap, np.nan), where=gap != 0)
    shares[gap[:, 0] <= 0] = np.nan  # A gap of zero has no shares.
    shares_by_role = {role: with_interval(each, n=gained[role].n) for role, each in zip(gained, shares, strict=True)}
    return {
        role: share if gained[role].low > 0 else replace(share, low=np.nan, high=np.nan)
        for role, share in shares_by_role.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviations:
    """Standard deviations of the gains of a system over the baseline, with n - 1 in the denominator.

    Args:
        runs: Over runs, of the mean gain of each role; empty if one of the two systems has one run.
        runs_of_languages: Likewise of the gain of each language.
        languages: Over the languages of each role that has several, of the gain averaged over runs: how unevenly the
            languages gain.
    """

    runs: Mapping[str, float]
    runs_of_languages: Mapping[str, float]
    languages: Mapping[str, float]

    def document(self) -> JsonObject:
        """Return plain data."""
        return {
            "runs": dict(self.runs),
            "runs_of_languages": dict(self.runs_of_languages),
            "languages": dict(self.languages),
        }


def deviations(
    system: NDArray[np.float64], base: NDArray[np.float64], members: Mapping[str, Sequence[int]], names: Sequence[str]
) -> Deviations:
    """Return the standard deviations of a system's gains.

    Run i of the system is compared with run i of the baseline, so both should have the same seeds. With unequal numbers
    of runs they are independent, and the variances of the two systems are added.

    Args:
        system: Score per language and run. [languages runs].
        base: That of the baseline. [languages runs].
        members: Indices of the languages of each role.
        names: The languages.

    Reference: table 3 of the mid-align paper (arXiv 2502.14830) has the deviation over transfer languages, and table 1
    of the FLARE paper those over seeds.
    """
    gain = system.mean(1) - base.mean(1)
    return Deviations(
        runs=_over_runs(group_means(system, members), group_means(base, members), list(members)),
        runs_of_languages=_over_runs(system, base, names),
        languages={
            role: float(np.std(gain[list(indices)], ddof=1)) for role, indices in members.items() if len(indices) > 1
        },
    )


def _over_runs(system: NDArray[np.float64], base: NDArray[np.float64], names: Sequence[str]) -> dict[str, float]:
    """Return for each row of [rows runs] the deviation of the gain over runs."""
    if 1 in (system.shape[1], base.shape[1]):
        return {}
    if system.shape == base.shape:
        values = np.std(system - base, axis=1, ddof=1)
    else:
        values = np.sqrt(np.var(system, axis=1, ddof=1) + np.var(base, axis=1, ddof=1))
    return dict(zip(names, values.tolist(), strict=True))
