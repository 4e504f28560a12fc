"""Dev scores of trials with the same resamples, the choice among them, and its significance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np

from ..evaluation.score import RowStatistics, Score, Statistics, count_units, draws, hedged_interval
from ..tasks import Metric
from ..tasks.data.tables import Row
from .crossfit import Rule, Values, choose, cross_fit
from .decision import Decision
from .trials import Trial

Objective = Literal["mean", "worst-language"]

_FEWEST = 5
_LEVEL_ERROR = 1e-12
"""A standard error below it means that all resamples are equal."""


class TrialScorer:
    """Scores trials on the rows that they answered, with the same resamples for all trials.

    Args:
        metric: The task's headline metric.
        languages: Language of each dev row.
        rows: The dev rows.
        objective: How the scores of the languages are combined.
        seed: Seed of the resampling.
        clusters: Cluster of each row: rows of one cluster are resampled together, and are in the same fold.
        floors: Scores of languages below which a trial is worth 0, for any other scores. They apply to trials
            that answered all rows of the language, since of a few rows one wrong answer may be too many, and without
            resampling: the resamples of a trial that reaches its floors are not cut.
        first: Index of the first of these rows among those that trials answer.
    """

    def __init__(
        self,
        metric: Metric,
        languages: Sequence[str],
        rows: Sequence[Row],
        *,
        objective: Objective,
        seed: int,
        clusters: Sequence[str] | None = None,
        floors: Mapping[str, float] | None = None,
        first: int = 0,
    ) -> None:
        self._metric, self._rows, self._objective, self._seed = metric, rows, objective, seed
        self._clusters, self._floors, self._first = clusters, floors or {}, first
        self._known: dict[tuple[int, str], Sequence[float] | None] = {}
        self._indices: dict[str, list[int]] = {}
        for index, language in enumerate(languages):
            self._indices.setdefault(language, []).append(index)

    def counts(self, trial: Trial) -> dict[str, RowStatistics]:
        """Return the statistics of the answered rows that can be scored, by language."""
        by_language = {}
        for language, indices in self._indices.items():
            statistics = RowStatistics()
            for index in indices:
                answer = trial.answers[self._first + index]
                counted = None if answer is None else self._count(index, answer)
                if counted is not None:
                    statistics.add(counted, self._clusters[index] if self._clusters else None)
            if statistics:
                by_language[language] = statistics
        return by_language

    def _count(self, index: int, answer: str) -> Sequence[float] | None:
        # Most trials give the same answer to a row, and each trial is scored several times.
        if (index, answer) not in self._known:
            self._known[index, answer] = self._metric.count(self._rows[index], answer)
        return self._known[index, answer]

    def values(self, counts: Mapping[str, Statistics]) -> Values:
        """Return the objective on these rows and on their resamples. Shapes: returns [1 + resamples]."""
        return self._join([draws(self._metric, [rows], self._seed)[0] for rows in counts.values()], counts)

    def _join(self, values: Sequence[Values], counts: Mapping[str, Statistics]) -> Values:
        joined: Values = np.min(values, axis=0) if self._objective == "worst-language" else np.mean(values, axis=0)
        for language, scores in zip(counts, values, strict=True):
            if language in self._floors and len(counts[language]) == len(self._indices[language]):
                joined = np.where(scores[..., :1] < self._floors[language], 0.0, joined)
        return joined

    def keeps(self, trial: Trial) -> bool | None:
        """Whether a trial reaches the floors of all languages that have one; None if it was stopped before."""
        if not trial.is_whole:
            return None
        counts = self.counts(trial)
        return all(
            float(self._metric.value(_sums(counts[language]))) >= floor
            for language, floor in self._floors.items()
            if language in counts
        )

    def score(self, trial: Trial) -> Score:
        """Return a trial's objective with its 95 % interval over rows."""
        counts = self.counts(trial)
        values = [self._hedged(rows) for rows in counts.values()]
        return hedged_interval(self._metric, self._join(values, counts), n=sum(map(len, counts.values())))

    def _hedged(self, rows: Statistics) -> Values:
        values: Values = draws(self._metric, [rows], self._seed, hedge="each")[0]
        return values

    def languages(self, trial: Trial) -> dict[str, Score]:
        """Return a trial's score per language."""
        counts = self.counts(trial)
        return {name: hedged_interval(self._metric, self._hedged(c), n=len(c)) for name, c in counts.items()}

    def exact(self, counts: Mapping[str, Statistics]) -> float:
        """Return the objective on these rows, without resamples."""
        return float(self._join([self._metric.value(_sums(rows)[None]) for rows in counts.values()], counts)[0])

    def decide(
        self,
        trials: Sequence[Trial],
        baseline: Trial,
        *,
        rule: Rule,
        stopped: Sequence[Trial] = (),
        raced: bool = False,
    ) -> Decision:
        """Choose among whole trials, and compare the choice with the baseline.

        Args:
            trials: All trials that ran to the end.
            baseline: The first adapter alone.
            rule: See `choose`.
            stopped: Trials that were stopped early; they count as candidates, since they could have been chosen.
            raced: Whether trials could be stopped early, so that all rows had a part in choosing the others.
        """
        counted = [self.counts(trial) for trial in trials]
        alone = self.counts(baseline)
        values = np.stack([self.values(counts) for counts in counted])
        distances = [trial.candidate.distance for trial in trials]
        chosen = choose(values, distances, rule)
        honest = None
        if not raced:
            join = partial(self._join, counts=alone)
            honest = cross_fit(self._metric, counted, alone, distances=distances, rule=rule, join=join, seed=self._seed)
        gains = [*(values - self.values(alone)), *(self._gain(trial, baseline) for trial in stopped)]
        rows = sum(map(len, alone.values()))
        is_baseline = trials[chosen] is baseline
        return Decision(
            chosen=chosen,
            difference=Score(value=0.0, low=0.0, high=0.0, n=rows)
            if is_baseline
            else self._difference(alone, counted[chosen], n=rows),
            honest=honest,
            chance=chance_of(np.stack(gains), chosen, rows=min(map(count_units, alone.values()))),
        )

    def difference(self, first: Trial, second: Trial) -> Score:
        """Return the second trial's difference from the first on the same rows, with its 95 % interval."""
        counts = self.counts(first)
        return self._difference(counts, self.counts(second), n=sum(map(len, counts.values())))

    def _difference(self, first: Mapping[str, Statistics], second: Mapping[str, Statistics], *, n: int) -> Score:
        """Return the second's difference from the first; as `paired_difference`, also for the worst language."""
        both = [draws(self._metric, [rows, second[name]], self._seed, hedge="pair") for name, rows in first.items()]
        gains = self._join([values for _, values in both], first) - self._join([base for base, _ in both], first)
        return hedged_interval(self._metric, gains, n=n, least=-1.0)

    def _gain(self, trial: Trial, baseline: Trial) -> Values:
        return self.values(self.counts(trial)) - self.values(self.counts(baseline.on_rows_of(trial)))


def _sums(rows: Statistics) -> Values:
    return np.asarray(np.sum(np.asarray(rows, dtype=np.float64), axis=0))


def chance_of(gains: Values, chosen: int, *, rows: int) -> float:
    r"""Return how often some candidate would look as good as the chosen one if all were as good as the baseline.

    Each gain is measured in its own standard error, $t_c = g_c / s_c$, and the chosen candidate's value is compared
    with the largest of $(g^*_c - g_c) / s_c$ in each resample, so that more candidates do not make chance findings more
    likely.

    Args:
        gains: [trials 1 + resamples], each trial's difference from the baseline.
        chosen: Index of the chosen trial.
        rows: Rows (or clusters of them) of the language that has fewest; with fewer than 5 no statement is possible,
            and the result is 1. Where all resamples are equal, each row has gained as much, which happens by chance
            once in 2^rows.

    Reference: White, A reality check for data snooping, Econometrica 2000; studentised and by candidate as in Romano
    and Wolf, Stepwise multiple testing, Econometrica 2005, section 3.
    """
    gain = float(gains[chosen, 0])
    if gain <= 0 or rows < _FEWEST:
        return 1.0
    errors = gains[:, 1:].std(axis=1)
    moving = errors > _LEVEL_ERROR
    if not moving[chosen]:
        return min(1.0, len(gains) * 0.5**rows)
    by_chance = ((gains[moving, 1:] - gains[moving, :1]) / errors[moving, None]).max(axis=0)
    return float((1 + (by_chance >= gain / errors[chosen]).sum()) / gains.shape[1])
