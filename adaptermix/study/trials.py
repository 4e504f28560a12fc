"""Ask for weights, tell their scores; nothing here knows of models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..compose.plan import split_weight

_R = TypeVar("_R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial(Generic[_R]):
    """One candidate and what it scored.

    Args:
        weights: One per adapter.
        value: The objective, higher is better.
        result: What the objective was computed from.
    """

    weights: tuple[float, ...]
    value: float
    result: _R


def grid_search(grid: Sequence[float], score: Callable[[tuple[float, ...]], tuple[float, _R]]) -> list[Trial[_R]]:
    """Score every weight w of the grid as (w, 1 - w), in order."""
    trials = []
    for weight in grid:
        weights = split_weight(weight)
        value, result = score(weights)
        trials.append(Trial(weights=weights, value=value, result=result))
    return trials


def best(trials: Sequence[Trial[_R]]) -> Trial[_R]:
    """Return the trial of the highest value; among equals the one nearest to the first adapter alone.

    Raises:
        ValueError: no trial.
    """
    return max(trials, key=lambda trial: (trial.value, -abs(1.0 - trial.weights[0])))
