"""The reference answers of a search: labels of dev rows, or the task adapter's answers to the source side of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..evaluation.run import Evaluation, score_answers
from ..evaluation.score import Score
from ..io.json_types import JsonObject
from ..options import SearchSettings
from ..tasks import Metric, Task, clusters_of, metrics_of
from ..tasks.data.tables import Row
from .crossfit import choose
from .prepare import Prepared
from .significance import TrialScorer
from .space import label_of
from .trials import Answers, Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """Rows with their right answers.

    Args:
        task: The task.
        rows: The rows.
        metrics: All metrics, the headline metric first.
        scorer: Scores trials by the headline metric.
        first: Index of the first of these rows among those that trials answer.
    """

    task: Task
    rows: Sequence[Row]
    metrics: tuple[Metric, ...]
    scorer: TrialScorer
    first: int = 0

    def evaluation(self, trial: Trial, roles: Mapping[str, Sequence[str]], settings: SearchSettings) -> Evaluation:
        """Return all scores of a trial that ran to the end."""
        answers = [answer or "" for answer in trial.answers[self.first : self.first + len(self.rows)]]
        return score_answers(
            self.task, self.rows, answers, roles, seed=settings.seed, metrics=self.metrics, scorer=settings.scorer
        )


def references_of(prepared: Prepared, settings: SearchSettings, alone: Answers) -> References:
    """Return the references that decide: dev rows, or pairs.

    Args:
        prepared: The checked search.
        settings: Its settings.
        alone: The first adapter's answers to all rows.

    Raises:
        PlanError: pairs decide, and the first adapter has one answer to all of them.
    """
    task, rows, pairs = prepared.task, prepared.rows, prepared.pairs
    if pairs is None:
        metrics = metrics_of(task, rows, metric=settings.metric, scorer=settings.scorer)
        return _references(task, settings, rows, metrics, clusters=clusters_of(task, rows))
    rows = pairs.labelled(alone)
    metrics = _headline_first(pairs.task.agreement(rows), settings.metric)
    floors = pairs.floors(metrics[0], alone)
    named = tuple(replace(metric, name=f"agreement ({metric.name})") for metric in metrics)
    return _references(task, settings, rows, named, clusters=pairs.clusters, floors=floors)


def dev_references(prepared: Prepared, settings: SearchSettings) -> References | None:
    """Return the dev rows if pairs decide, so that the dev rows have no part in the choice. None without such rows."""
    if prepared.pairs is None or not prepared.dev_rows:
        return None
    task, rows = prepared.task, prepared.dev_rows
    metrics = _headline_first(metrics_of(task, rows, scorer=settings.scorer), settings.metric)
    first = len(prepared.pairs.rows)
    return _references(task, settings, rows, metrics, clusters=clusters_of(task, rows), first=first)


def _headline_first(metrics: Sequence[Metric], name: str | None) -> tuple[Metric, ...]:
    return tuple(sorted(metrics, key=lambda metric: metric.name != name))


def _references(
    task: Task,
    settings: SearchSettings,
    rows: Sequence[Row],
    metrics: tuple[Metric, ...],
    *,
    clusters: Sequence[str] | None,
    floors: Mapping[str, float] | None = None,
    first: int = 0,
) -> References:
    scorer = TrialScorer(
        metrics[0],
        [task.language(row) for row in rows],
        rows,
        objective="worst-language" if settings.objective == "worst-language" else "mean",
        seed=settings.seed,
        clusters=clusters,
        floors=floors,
        first=first,
    )
    return References(task=task, rows=rows, metrics=metrics, scorer=scorer, first=first)


@dataclass(frozen=True, slots=True, kw_only=True)
class DevScores:
    """Scores on dev rows that had no part in a choice by pairs.

    Args:
        metric: The task's headline metric.
        trials: Score of each trial.
        alone: Score of the first adapter alone.
        chosen: Score of the chosen trial.
        best: The trial that the dev rows would have chosen.
        best_score: Its score.
    """

    metric: str
    trials: list[Score]
    alone: Score
    chosen: Score
    best: Trial
    best_score: Score

    @classmethod
    def of(
        cls, references: References, trials: Sequence[Trial], eligible: Sequence[Trial], chosen: Trial, baseline: Trial,
        *, settings: SearchSettings,
    ) -> DevScores:  # fmt: skip
        """Score all trials, and choose among the eligible ones by dev rows and the rule of the search."""
        scorer = references.scorer
        values = np.stack([scorer.values(scorer.counts(trial)) for trial in eligible])
        best = eligible[choose(values, [trial.candidate.distance for trial in eligible], settings.choose)]
        return cls(
            metric=references.metrics[0].name,
            trials=[scorer.score(trial) for trial in trials],
            alone=scorer.score(baseline),
            chosen=scorer.score(chosen),
            best=best,
            best_score=scorer.score(best),
        )

    def document(self) -> JsonObject:
        """Return plain data."""
        return {
            "metric": self.metric,
            "trials": [score.value for score in self.trials],
            "task_alone": self.alone.document(),
            "chosen": self.chosen.document(),
            "best": {**self.best.candidate.document(), **self.best_score.document()},
        }

    def sentence(self) -> str:
        """Return one sentence for people."""
        more = self.best_score.value - self.chosen.value
        other = (
            f"{label_of(self.best.candidate)} ({self.best_score.value:.3f}, {more:+.3f})" if more else "nothing better"
        )
        return (
            f"on the dev rows, which had no part in the choice, it has {self.metric} {self.chosen.value:.3f}, the task "
            f"adapter alone {self.alone.value:.3f}; labels would have chosen {other}."
        )
