"""Names of a demo's results, for its output and its figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Document = dict[str, Any]
"""A result as the JSON document of the command that it comes from: parts are read by their names."""
TITLES = {"supervised": "task data", "aligned": "aligned", "transfer": "not aligned"}
"""Names of the groups of languages, by their role."""


def is_task_alone(weights: Sequence[float]) -> bool:
    """Return whether weights are those of the task adapter alone."""
    return weights[0] == 1.0 and not any(weights[1:])


def merge_name(weights: Sequence[float], *, alignment: str = "alignment") -> str:
    """Return the name of a merge from the name of its second adapter.

    Example:
        >>> merge_name([1.0, 0.5]), merge_name([0.9, 0.1]), merge_name([1.0, 0.0])
        ('task + 0.5 alignment', '0.9 task + 0.1 alignment', 'task only')
    """
    if is_task_alone(weights):
        return "task only"
    task = "task" if weights[0] == 1.0 else f"{weights[0]:g} task"
    return f"{task} + {weights[1]:g} {alignment}"


def label_of(name: str, results: Document) -> str:
    """Return the label of a tested system for tables, from its name in the results."""
    if name == "closed form":
        return merge_name(results["closed_form"]["search"]["best"]["weights"], alignment=name)
    return merge_name(results["search"]["best"]["weights"]) if name == "chosen" else name


def verdict(results: Document) -> str:
    """Return a sentence: whether the merge that was chosen on dev data helps on the test rows."""
    best = results["search"]["best"]["weights"]
    if is_task_alone(best):
        return "On dev no merge was better than the task adapter alone, so the task adapter alone was chosen."
    result = results["difference"]["without task data"]
    gain = f"{result['value']:+.3f} {results['score']} (95 % interval {result['low']:+.3f} to {result['high']:+.3f})"
    if result["low"] > 0:
        return f"The merge helps in languages without task data, beyond chance: {gain}."
    if result["high"] < 0:
        return f"The merge hurts in languages without task data, beyond chance: {gain}."
    return f"The gain of the merge in languages without task data is not distinguishable from chance: {gain}."
