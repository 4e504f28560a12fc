"""Whether systems differ from a baseline beyond chance, corrected for how many comparisons there are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .score import Score, with_interval

Draws = NDArray[np.float64]
"""Values of one quantity: that of the rows as they are, then those of the resamples [1 + resamples]."""


def p_value(gains: NDArray[np.float64]) -> float:
    """Return the two-sided p-value of a gain by the normal distribution, with the spread of its resamples.

    A gain whose resamples are all alike has no p-value below 1: as many rows cannot tell.

    Args:
        gains: The gain, then its resamples. [1 + resamples]
    """
    spread = float(gains[1:].std())
    return math.erfc(abs(float(gains[0])) / spread / math.sqrt(2)) if spread > 0 else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, so that the chance of any false finding stays below the level.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]

    Reference: Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 1979.
    """
    found, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda place: values[place])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        found[place] = largest
    return found


def against_baseline(
    languages: Mapping[str, Draws],
    groups: Mapping[str, Draws],
    whole: int,
    sizes: Mapping[str, int],
    baseline: str | None,
) -> tuple[dict[str, dict[str, Score]], dict[str, dict[str, float]]]:
    """Return by how much each system exceeds the baseline in each language, and the corrected p-values.

    Args:
        languages: For each system the scores of the languages. [languages 1 + resamples]
        groups: For each system the means over groups. [groups 1 + resamples]
        whole: Place of the group of all languages.
        sizes: Rows of each language.
        baseline: Name of the baseline, if there is one.
    """
    others = [name for name in languages if baseline is not None and name != baseline]
    if baseline is None or not others:
        return {}, {}
    gaps = {name: languages[name] - languages[baseline] for name in others}
    gains = {
        name: {key: with_interval(gap[i], n=n) for i, (key, n) in enumerate(sizes.items())}
        for name, gap in gaps.items()
    }
    means = holm([p_value(groups[name][whole] - groups[baseline][whole]) for name in others])
    each = iter(holm([p_value(row) for gap in gaps.values() for row in gap]))
    return gains, {
        name: {"all": mean} | {key: next(each) for key in sizes} for name, mean in zip(others, means, strict=True)
    }
