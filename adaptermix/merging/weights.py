"""Read merge weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import UsageError


def split_weight(weight: float) -> tuple[float, float]:
    """Return (w, 1 - w), rounded, since 1 - 0.9 is 0.09999999999999998 in binary."""
    return weight, round(1.0 - weight, 12)


def resolve_weights(names: Sequence[str], weights: Sequence[float]) -> tuple[float, ...]:
    """Return one weight per adapter; a single weight w for two adapters means (w, 1 - w).

    Raises:
        PlanError: the counts do not match, or a weight is not finite.
    """
    weights = [float(weight) for weight in weights]  # so that 1, 1.0 and a NumPy scalar make one plan
    if len(names) == 2 and len(weights) == 1:
        weights = split_weight(weights[0])
    if len(weights) != len(names):
        raise UsageError(
            f"one weight per adapter is needed, got {len(weights)} for {len(names)} adapters ({', '.join(names)})."
            + (" With two adapters a single weight w means w and 1 - w." if len(names) == 2 else ""),
            code="merge.weights-count",
        )
    for name, weight in zip(names, weights, strict=True):
        if not math.isfinite(weight):
            raise UsageError(
                f"weights must be finite numbers, got {weight} for adapter '{name}'.", code="merge.weights-finite"
            )
    return tuple(weights)


def numbered(digests: Sequence[str], weights: Sequence[tuple[float, ...]]) -> tuple[str, ...]:
    """Return a unique name per adapter from a hash of its values; equal values are numbered by their weights.

    The names do not depend on the order of the adapters.

    Args:
        digests: Hash per adapter.
        weights: Weights per adapter, everywhere and in each override.
    """
    order = sorted(range(len(digests)), key=lambda index: (digests[index], weights[index]))
    labels, seen = {}, dict.fromkeys(digests, 0)
    for index in order:
        labels[index] = f"{digests[index]}#{seen[digests[index]]}"
        seen[digests[index]] += 1
    return tuple(labels[index] for index in range(len(digests)))
