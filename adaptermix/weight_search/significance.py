"""Which candidate is taken, and whether there was anything to find: dev scores, resampled alike for all trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from ..evaluation.score import RowStatistics, Score, Statistics, count_units, draws, hedged_interval
from ..tasks import Metric
from .control import Control
from .crossfit import Rule, Values, choose, cross_fit
from .trials import Trial

__all__ = ["LEVEL", "Board", "Objective", "Rule", "Values", "Verdict", "chance_of", "choose"]

Objective = Literal["mean", "worst-language"]

LEVEL = 0.025
"""Of chance at which something counts as found: one-sided, as a 95 % interval that lies above 0."""
_FEWEST = 5
_LEVEL_ERROR = 1e-12
"""Standard errors below it are those of resamples that are all alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a search found.

    Args:
        chosen: Place of the trial that is taken.
        difference: By how much it exceeds the first adapter alone on the rows that chose it, which flatters it.
        honest: The same for the choice among the trials, see `cross_fit`. Samplers have seen all rows when they
            proposed the trials, so it may still flatter a little. None after races, whose survivors all rows have
            chosen already.
        chance: How often a trial would look as good if none were better than the first adapter alone; see `chance_of`.
        control: How random adapters score in the place of the others; None where they were not asked.
    """

    chosen: int
    difference: Score
    honest: Score | None
    chance: float
    control: Control | None = None

    @property
    def is_better(self) -> bool:
        """Whether the chosen trial is better than the first adapter alone beyond chance."""
        return self.chance <= LEVEL

    @property
    def is_found(self) -> bool:
        """Whether it is, and better than random adapters in the place of the others, if these were asked."""
        return self.is_better and not (self.control and self.control.gains_too)

    def document(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "found": self.is_found,
            "chance": self.chance,
            "difference": self.difference.document(),
            "cross_fit": self.honest.document() if self.honest else None,
            **({"control": self.control.document()} if self.control else {}),
        }


class Board:
    """Dev scores of trials on the rows they were asked, with the same resamples for all.

    Args:
        metric: The task's headline metric.
        languages: Language of each dev row.
        rows: The dev rows.
        objective: What is made of the scores of the languages.
        seed: Seed of the resampling.
        clusters: Cluster of each row: rows of one cluster are resampled together, and are in the same fold.
        floors: Scores of languages below which a trial is worth nothing, whatever it has in the others. They hold for
            trials that answered all rows of the language, since of a few rows one wrong answer may be too many, and
            for these rows as they are: resamples of a trial that reaches them count whole.
        first: Number of the first of these rows among those that trials answer.
    """

    def __init__(
        self,
        metric: Metric,
        languages: Sequence[str],
        rows: Sequence[Any],
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
        self._places: dict[str, list[int]] = {}
        for place, language in enumerate(languages):
            self._places.setdefault(language, []).append(place)

    def counts(self, trial: Trial) -> dict[str, RowStatistics]:
        """Return the statistics of the rows that were asked and can be scored, by language."""
        found = {}
        for language, places in self._places.items():
            kept = RowStatistics()
            for place in places:
                answer = trial.answers[self._first + place]
                counted = None if answer is None else self._count(place, answer)
                if counted is not None:
                    kept.add(counted, self._clusters[place] if self._clusters else None)
            if kept:
                found[language] = kept
        return found

    def _count(self, place: int, answer: str) -> Sequence[float] | None:
        """Return a row's statistics; most trials answer it as others did, and each is looked at several times."""
        if (place, answer) not in self._known:
            self._known[place, answer] = self._metric.count(self._rows[place], answer)
        return self._known[place, answer]

    def values(self, counts: Mapping[str, Statistics]) -> Values:
        """Return the objective on these rows, and on their resamples.

        Shapes: returns [1 + resamples].
        """
        return self._join([draws(self._metric, [rows], self._seed)[0] for rows in counts.values()], counts)

    def _join(self, values: Sequence[Values], counts: Mapping[str, Statistics]) -> Values:
        joined: Values = np.min(values, axis=0) if self._objective == "worst-language" else np.mean(values, axis=0)
        for language, own in zip(counts, values, strict=True):
            if language in self._floors and self._is_whole(language, counts):
                joined = np.where(own[..., :1] < self._floors[language], 0.0, joined)
        return joined

    def _is_whole(self, language: str, counts: Mapping[str, Statistics]) -> bool:
        return len(counts[language]) == len(self._places[language])

    def keeps(self, trial: Trial) -> bool | None:
        """Whether a trial reaches the floors of the languages that have some; None if it was stopped before."""
        if not trial.is_whole:
            return None
        counts = self.counts(trial)
        return all(
            float(self._metric.value(np.sum(np.asarray(counts[language], dtype=np.float64), axis=0))) >= floor
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
        sums = [np.sum(np.asarray(rows, dtype=np.float64), axis=0)[None] for rows in counts.values()]
        return float(self._join([self._metric.value(total) for total in sums], counts)[0])

    def verdict(
        self,
        trials: Sequence[Trial],
        baseline: Trial,
        *,
        rule: Rule,
        stopped: Sequence[Trial] = (),
        raced: bool = False,
    ) -> Verdict:
        """Choose among whole trials, and say whether the choice is better than the baseline.

        Args:
            trials: All that ran to the end, of which one is chosen.
            baseline: The first adapter alone.
            stopped: Those that were stopped early; they had their chance to look good too.
            rule: See `choose`.
            raced: Whether trials were stopped early, so that those that were not are a choice of all rows.
        """
        counted = [self.counts(trial) for trial in trials]
        alone = self.counts(baseline)
        values = np.stack([self.values(counts) for counts in counted])
        distances = [trial.candidate.distance for trial in trials]
        chosen = choose(values, distances, rule)
        gains = values - self.values(alone)
        rows = sum(map(len, alone.values()))
        honest = None
        if not raced:
            join = partial(self._join, counts=alone)
            honest = cross_fit(self._metric, counted, alone, distances=distances, rule=rule, join=join, seed=self._seed)
        every = np.stack([*gains, *(self._gain(trial, baseline) for trial in stopped)])
        return Verdict(
            chosen=chosen,
            difference=self._difference(alone, counted[chosen], n=rows)
            if trials[chosen] is not baseline
            else Score(value=0.0, low=0.0, high=0.0, n=rows),
            honest=honest,
            chance=chance_of(every, chosen, rows=min(map(count_units, alone.values()))),
        )

    def difference(self, first: Trial, second: Trial) -> Score:
        """Return by how much a trial exceeds another on the same rows, with its 95 % interval."""
        counts = self.counts(first)
        return self._difference(counts, self.counts(second), n=sum(map(len, counts.values())))

    def _difference(self, first: Mapping[str, Statistics], second: Mapping[str, Statistics], *, n: int) -> Score:
        """Return by how much the second exceeds the first; as `paired_difference`, also for the worst language."""
        both = [draws(self._metric, [rows, second[name]], self._seed, hedge="pair") for name, rows in first.items()]
        gains = self._join([own for _, own in both], first) - self._join([base for base, _ in both], first)
        return hedged_interval(self._metric, gains, n=n, least=-1.0)

    def _gain(self, trial: Trial, baseline: Trial) -> Values:
        return self.values(self.counts(trial)) - self.values(self.counts(baseline.on_rows_of(trial)))


def chance_of(gains: Values, chosen: int, *, rows: int) -> float:
    r"""Return how often some candidate would look as good as the chosen one if none were better than the baseline.

    Each gain is measured in its own standard error, $t_c = g_c / s_c$, and that of the chosen one is held against the
    largest of $(g^*_c - g_c) / s_c$ in each resample, so that trying more candidates makes chance findings no more
    likely.

    Args:
        gains: [trials 1 + resamples], by how much each trial exceeds the baseline.
        chosen: Which of them was taken.
        rows: Rows (or clusters of them) of the language that has fewest; with fewer than 5 nothing can be said, and
            chance is 1. Where all resamples are alike, each row has gained as much, which by chance happens once in
            2^rows.

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
