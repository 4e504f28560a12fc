"""Tasks: rows to prompts and answers, and answers to scores. Training and evaluation use the same.

A task is one file of this folder, or a class of another package with an entry point in the group `adaptermix.tasks`.
"""

from importlib import import_module

from .base import (
    TASKS,
    BaseTask,
    ChoiceTask,
    ComparableTask,
    FullyTaggedTask,
    JoinableTask,
    LabelTask,
    Marked,
    MarkedTask,
    RankingTask,
    SpanTask,
    Task,
    TokenTask,
    clusters_of,
    get_task,
    get_template,
    metrics_of,
    task,
)
from .metrics import Counts, Metric
from .prompts import Template

for _name in TASKS.built_in:
    import_module(f".{_name.replace('-', '_')}", __name__)

__all__ = [
    "TASKS",
    "BaseTask",
    "ChoiceTask",
    "ComparableTask",
    "Counts",
    "FullyTaggedTask",
    "JoinableTask",
    "LabelTask",
    "Marked",
    "MarkedTask",
    "Metric",
    "RankingTask",
    "SpanTask",
    "Task",
    "Template",
    "TokenTask",
    "clusters_of",
    "get_task",
    "get_template",
    "metrics_of",
    "task",
]
