"""A candidate in a few characters."""

from __future__ import annotations

from typing import Any

from .space import Candidate


def shown(candidate: Candidate) -> str:
    """Return a candidate for a person: weights, those of several places parted by bars, and options.

    Example:
        >>> shown(Candidate(weights=(0.9, 0.1), options={"density": 0.25}))
        '0.9/0.1 density=0.25'
    """
    if candidate.name:
        return candidate.name
    vectors = [point for override in candidate.overrides for point in override.points] or [candidate.weights]
    weights = " | ".join("/".join(f"{weight:g}" for weight in vector) for vector in vectors)
    return " ".join([weights, *(f"{key}={_short(value)}" for key, value in candidate.options.items())])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
