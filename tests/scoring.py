"""Scores of slot filling, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adaptermix.evaluation.score import Score, Statistics, mean_score
from adaptermix.tasks import Task, get_task

F1 = get_task("slots").metrics([])[0]


def micro_f1(rows: Statistics, *, seed: int = 0) -> Score:
    """Micro F1 of one language."""
    return mean_score(F1, [rows], seed=seed)


def count(task: Task, row: Any, answer: str) -> dict[str, Sequence[float]]:
    """Statistics of an answer by metric."""
    found = {metric.name: metric.count(row, answer) for metric in task.metrics([row])}
    return {name: statistics for name, statistics in found.items() if statistics is not None}
