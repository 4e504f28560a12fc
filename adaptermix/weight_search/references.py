"""What trials are scored against: labels of dev rows, or what the task adapter alone says of pairs' source side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..evaluation.run import Evaluation, score_answers
from ..evaluation.score import Score
from ..options import SearchSettings
from ..tasks import Metric, Task, clusters_of, metrics_of
from .label import shown
from .prepare import Prepared
from .significance import Board, choose
from .trials import Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Marking:
    """Rows with their right answers, and the board that scores trials on them.

    Args:
        task: The task.
        rows: The rows.
        metrics: How answers are scored, the headline metric first.
        board: Scores trials by the headline metric.
        first: Number of the first of these rows among those that trials answer.
    """

    task: Task
    rows: Sequence[Any]
    metrics: tuple[Metric, ...]
    board: Board
    first: int = 0

    def evaluation(self, trial: Trial, roles: Mapping[str, Sequence[str]], settings: SearchSettings) -> Evaluation:
        """Return all scores of a trial that ran whole."""
        answers = [answer or "" for answer in trial.answers[self.first : self.first + len(self.rows)]]
        return score_answers(
            self.task, self.rows, answers, roles, seed=settings.seed, metrics=self.metrics, scorer=settings.scorer
        )


def marking_of(prepared: Prepared, settings: SearchSettings, alone: Sequence[str | None]) -> Marking:
    """Return what decides: dev rows, or pairs.

    Args:
        prepared: The checked search.
        settings: Its settings.
        alone: What the first adapter alone answers to all rows.

    Raises:
        PlanError: pairs decide, and the first adapter answers all of them alike.
    """
    if prepared.pairs is None:
        rows = prepared.rows
        return _marking(
            prepared, settings, rows, _metrics(prepared, settings), clusters=clusters_of(prepared.task, rows)
        )
    rows = prepared.pairs.labelled(alone)
    metrics = _in_order(prepared.pairs.task.agreement(rows), settings.metric)
    floors = prepared.pairs.floors(metrics[0], alone)
    named = tuple(replace(metric, name=f"agreement ({metric.name})") for metric in metrics)
    return _marking(prepared, settings, rows, named, clusters=prepared.pairs.clusters, floors=floors)


def dev_marking(prepared: Prepared, settings: SearchSettings) -> Marking | None:
    """Return the scores on dev rows that have no part in a choice by pairs, None where there are none."""
    if prepared.pairs is None or not prepared.dev_rows:
        return None
    rows = prepared.dev_rows
    metrics = _in_order(metrics_of(prepared.task, rows, scorer=settings.scorer), settings.metric)
    clusters = clusters_of(prepared.task, rows)
    return _marking(prepared, settings, rows, metrics, clusters=clusters, first=len(prepared.pairs.rows))


def _in_order(metrics: Sequence[Metric], asked: str | None) -> tuple[Metric, ...]:
    """Return the metrics, the one that is asked for first; in their order where they do not have it."""
    return tuple(sorted(metrics, key=lambda metric: metric.name != asked))


def _metrics(prepared: Prepared, settings: SearchSettings) -> tuple[Metric, ...]:
    return metrics_of(prepared.task, prepared.rows, metric=settings.metric, scorer=settings.scorer)


def _marking(
    prepared: Prepared,
    settings: SearchSettings,
    rows: Sequence[Any],
    metrics: tuple[Metric, ...],
    *,
    clusters: Sequence[str] | None,
    floors: Mapping[str, float] | None = None,
    first: int = 0,
) -> Marking:
    task = prepared.task
    board = Board(
        metrics[0],
        [task.language(row) for row in rows],
        rows,
        objective="worst-language" if settings.objective == "worst-language" else "mean",
        seed=settings.seed,
        clusters=clusters,
        floors=floors,
        first=first,
    )
    return Marking(task=task, rows=rows, metrics=metrics, board=board, first=first)


@dataclass(frozen=True, slots=True, kw_only=True)
class DevScores:
    """How a choice without labels stands on dev rows that had no part in it.

    Args:
        metric: The task's headline metric.
        trials: Score of each trial.
        alone: Score of the first adapter alone.
        chosen: Score of the choice.
        best: What the dev rows would have chosen.
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
        cls, marking: Marking, trials: Sequence[Trial], eligible: Sequence[Trial], chosen: Trial, baseline: Trial,
        *, settings: SearchSettings,
    ) -> DevScores:  # fmt: skip
        """Score all trials, and choose among the eligible ones by dev rows and the rule of the search."""
        board = marking.board
        values = np.stack([board.values(board.counts(trial)) for trial in eligible])
        best = eligible[choose(values, [trial.candidate.distance for trial in eligible], settings.choose)]
        return cls(
            metric=marking.metrics[0].name,
            trials=[board.score(trial) for trial in trials],
            alone=board.score(baseline),
            chosen=board.score(chosen),
            best=best,
            best_score=board.score(best),
        )

    def document(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "metric": self.metric,
            "trials": [score.value for score in self.trials],
            "task_alone": self.alone.document(),
            "chosen": self.chosen.document(),
            "best": {**self.best.candidate.document(), **self.best_score.document()},
        }

    def sentence(self) -> str:
        """Return in words what the dev rows say of the choice."""
        more = self.best_score.value - self.chosen.value
        other = f"{shown(self.best.candidate)} ({self.best_score.value:.3f}, {more:+.3f})" if more else "nothing better"
        return (
            f"on the dev rows, which had no part in the choice, it has {self.metric} {self.chosen.value:.3f}, the task "
            f"adapter alone {self.alone.value:.3f}; labels would have chosen {other}."
        )
