"""Tasks: rows to prompts and answers, and answers to scores. Training and evaluation use the same."""

from .base import (
    TASKS,
    ComparableTask,
    JoinableTask,
    LabelTask,
    SpanTask,
    Task,
    TokenTask,
    clusters_of,
    get_task,
    get_template,
    metrics_of,
)
from .metrics import Counts, Metric
from .prompts import Template

__all__ = [
    "TASKS",
    "ComparableTask",
    "Counts",
    "JoinableTask",
    "LabelTask",
    "Metric",
    "SpanTask",
    "Task",
    "Template",
    "TokenTask",
    "clusters_of",
    "get_task",
    "get_template",
    "metrics_of",
]
